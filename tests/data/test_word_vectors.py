"""GloVe's and fastText's text files: what is found, what is refused and in which line."""

import tracemalloc

import numpy as np
import pytest

from trm_jax.data import word_vectors
from trm_jax.types import UserError

GLOVE = "the 0.5 -1 2e-1\ndog 1 2 3\nCafé -0.25 0 7\n"


def _file(tmp_path, text, name="vectors.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_vectors_stand_where_their_words_do(tmp_path):
    words = ("", "zebra", "Café", "the", "", "Dog")
    matrix, found = word_vectors.read(_file(tmp_path, GLOVE), words, 3)
    expected = np.zeros((6, 3), np.float32)
    expected[2], expected[3] = [-0.25, 0, 7], [0.5, -1, 0.2]
    np.testing.assert_array_equal(matrix, expected)
    assert found.tolist() == [False, False, True, True, False, False]
    assert matrix.dtype == np.float32


@pytest.mark.parametrize(
    "text",
    [
        "3 3\n" + GLOVE.replace("\n", " \n"),  # fastText: a header, and a space at each end
        GLOVE.removesuffix("\n"),
        GLOVE.replace("\n", "\r\n"),
        GLOVE + "dog 9 9 9\n",  # again: the first counts
    ],
)
def test_other_writings_of_one_file_are_the_same(tmp_path, text):
    words = ("the", "dog", "Café")
    matrix, found = word_vectors.read(_file(tmp_path, text), words)
    np.testing.assert_array_equal(matrix, np.array([[0.5, -1, 0.2], [1, 2, 3], [-0.25, 0, 7]], "f"))
    assert found.all()


def test_words_may_hold_spaces_and_separators_of_unicode(tmp_path):
    # As in the GloVe of 840 billion tokens; str.split and text files would divide some of these.
    text = "the 1 2\n. . . 3 4\nat name@domain.com 5 6\na\u00a0b 7 8\nc\u0085d 9 1\n\u2028 2 3\n"
    words = (". . .", "at name@domain.com", "a\u00a0b", "c\u0085d", "\u2028", "name@domain.com")
    matrix, found = word_vectors.read(_file(tmp_path, text), words)
    np.testing.assert_array_equal(matrix[:5], [[3, 4], [5, 6], [7, 8], [9, 1], [2, 3]])
    assert found.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GLOVE + "cat 1 2\n", "line 4 has 2 numbers, not 3;"),
        (GLOVE + "cat 1 2 3 4\n", "line 4 has 4 numbers, not 3;"),
        (GLOVE + "\nthe 1 2 3\n", "line 4 has 0 numbers"),
        ("9 3\n" + GLOVE + "cat\n", "line 5 has 0 numbers"),
        ("the 1 2\ndog 1 x2\n", "line 2 has 'x2' in place of a number"),
        ("the 1 2\ndog nan 2\n", "line 2 has a number that is not finite"),
        ("the 1 2\ndog 1e60 2\n", "line 2 has a number that is not finite"),
        ("4 3\n" + GLOVE, "has 3 words, its first line says 4"),
        ("the\n", "line 1 is not a word and its numbers"),
        ("", "is empty"),
        (b"PK\x03\x04glove", "is a zip archive; unpack it"),
        (b"\x1f\x8bglove", "is a gzip archive; unpack it"),
        (b"the\x00\x01", "is no text"),
        ("the 1 2\n" + "x" * 2_000_000, "line 2 is too long"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path, text, message):
    path = _file(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        word_vectors.read(path, ("the", "dog"))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_another_width_than_the_models_is_refused(tmp_path):
    message = r"width 3, the model embeds words in 300; set model.matching.text.embedding=3 or"
    with pytest.raises(UserError, match=message):
        word_vectors.read(_file(tmp_path, GLOVE), ("the",), 300)
    with pytest.raises(UserError, match="cannot be read"):
        word_vectors.read(tmp_path / "missing.txt", ("the",))


def test_memory_holds_the_answer_not_the_file(tmp_path):
    numbers = " 0.123456" * 50
    path = _file(tmp_path, "".join(f"word{number}{numbers}\n" for number in range(20_000)))
    assert path.stat().st_size > 9_000_000
    tracemalloc.start()
    try:
        matrix, found = word_vectors.read(path, [f"word{n}" for n in range(0, 20_000, 400)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.all() and np.all(matrix == np.float32(0.123456))
    assert peak < 1_000_000


@pytest.mark.realdata
def test_published_glove_vectors_are_read(data_root):
    path = data_root / "words" / "glove.twitter.25d.12k.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines = lines[:-1] if not lines[-1] else lines
    words = [line.split(" ")[0] for line in lines]
    matrix, found = word_vectors.read(path, words, 25)
    assert found.all() and len(words) == 11_925
    expected = [[float(x) for x in line.split(" ")[1:]] for line in lines]
    np.testing.assert_array_equal(matrix, np.array(expected, np.float32))
    # Words that occur together lie together.
    places = {word: number for number, word in enumerate(words)}
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    near, far = (unit[places["dog"]] @ unit[places[word]] for word in ("cat", "government"))
    assert near > 0.8 > far + 0.2

"""Files of word vectors in all formats: what is found, what is refused, what is kept of them."""

import os
import tracemalloc

import numpy as np
import pytest

from trm_jax.data import word_vector_files, word_vector_index, word_vectors
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


# The words of the tests of all formats; the last is no UTF-8, and stands twice.
WORDS = (b"the", b"Traffic", b"light", b"New_York", "café".encode(), b"\xff\xfebad", b"the")
NUMBERS = np.random.default_rng(0).normal(size=(len(WORDS), 5)).astype(np.float32)
NUMBERS[1] = 10, 32, 13, 0, -0.0
# Bytes that could be the ends of words and lines.
NUMBERS[2] = np.frombuffer(b"\n \n  \n\n \n\n  \n \n  \n \n", np.float32)


def _text(words, numbers, header=False, tail=""):
    lines = [f"{len(words)} {numbers.shape[1]}".encode()] if header else []
    for word, row in zip(words, numbers, strict=True):
        lines.append(word + b" " + " ".join(repr(float(x)) for x in row).encode() + tail.encode())
    return b"\n".join(lines) + b"\n"


def _binary(words, numbers, newline, count=None):
    """As the program word2vec (`newline`) and as gensim writes it."""
    data = f"{len(words) if count is None else count} {numbers.shape[1]}\n".encode()
    for word, row in zip(words, numbers, strict=True):
        data += word + b" " + row.astype("<f4").tobytes() + (b"\n" if newline else b"")
    return data


FORMATS = {
    "GloVe": _text(WORDS, NUMBERS),
    "fastText": _text(WORDS, NUMBERS, header=True, tail=" "),
    "word2vec": _text(WORDS, NUMBERS, header=True),
    "word2vec binary": _binary(WORDS, NUMBERS, newline=True),
    "gensim binary": _binary(WORDS, NUMBERS, newline=False),
}


@pytest.fixture
def kept(monkeypatch):
    """Indices of small files are kept too; the list gets an entry for each scan of a file."""
    scans, records = [], word_vector_files.records

    def counted(path, file, layout):
        scans.append(path)
        return records(path, file, layout)

    monkeypatch.setattr(word_vector_index, "_SMALL", 0)
    monkeypatch.setattr(word_vector_files, "records", counted)
    return scans


@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_hold_the_same(tmp_path, kept, name):
    path = _file(tmp_path, FORMATS[name], "vectors")
    words = ("light", "", "the", "bad", "traffic", "New_York", "café", "Traffic", "light")
    order = [2, None, 0, None, None, 3, 4, 1, 2]
    expected = [np.zeros(5) if row is None else NUMBERS[row] for row in order]
    for _ in range(2):  # the second time by the kept index
        opened = word_vectors.open_file(path, 5)
        for matrix, found in (word_vectors.read(path, words, 5), opened.read(words)):
            np.testing.assert_array_equal(matrix, np.array(expected, np.float32))
            assert found.tolist() == [row is not None for row in order]
            assert matrix.dtype == np.float32
        assert opened.width == 5 and len(opened) == 7
        assert "light" in opened and "Light" not in opened and "" not in opened
    # `read` scans each time, `open_file` did once.
    assert len(kept) == 3
    assert opened.read(())[0].shape == (0, 5)


@pytest.mark.parametrize("newline", [True, False])
def test_bad_binary_files_are_refused(tmp_path, newline):
    whole = _binary(WORDS, NUMBERS, newline)
    more, fewer = (_binary(WORDS, NUMBERS, newline, count) for count in (8, 6))
    wide = whole.replace(b"7 5\n", b"7 6\n", 1)
    damaged = NUMBERS.copy()
    damaged[2, 3] = np.inf
    for data, message in {
        whole[:-6]: "ends within word 7, its first line says 7; the file was cut off",
        whole[:60]: "ends within word 3, its first line says 7",
        more: "ends within word 8, its first line says 8",
        fewer: "does not end with word 6, as its first line says",
        wide: "ends within word|does not end with word",
        whole[:28] + b"x" * 5000 + whole[28:]: "no word ends where word 2 of the binary file",
        _binary(WORDS, damaged, newline): "(word 3|the vector of 'light') has a number that is not",
    }.items():
        path = _file(tmp_path, data)
        for use in (word_vectors.read, lambda p, words: word_vectors.open_file(p).read(words)):
            with pytest.raises(UserError, match=message) as error:
                use(path, ("light",))
            assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    # What is asked for is checked; the bad number is of another word.
    assert word_vectors.read(_file(tmp_path, _binary(WORDS, damaged, newline)), ("the",))[1].all()


def test_formats_are_told_by_content(tmp_path):
    def layout(data):
        path = _file(tmp_path, data, "vectors.bin")
        with path.open("rb") as file:
            return word_vector_files.layout_of(path, file)

    assert layout(FORMATS["GloVe"]) == (False, 5, None, 0)
    assert layout(FORMATS["word2vec"]) == (False, 5, 7, 4)
    assert layout(FORMATS["gensim binary"]) == (True, 5, 7, 4)
    # A text in another encoding, and short numbers beside a word that is no ASCII.
    assert not layout(b"2 2\ncaf\xe9 1 2\n\xff 1 2\n").binary
    assert not layout("2 3\na 1 2 3\nçé 1 2 3\n".encode()).binary
    # A damaged text is still one, so that the message names the line.
    assert not layout(b"2 3\ncat 1 2\ndog 1 2 3\n").binary
    with pytest.raises(UserError, match=r"a model of fastText \(.bin\); give the text form"):
        layout(b"\xba\x16\x4f\x2f\x0c\x00\x00\x00")
    for head in (b"7 99999999\n", b"7 0\n", b"A man runs .\n"):
        with pytest.raises(UserError, match="line 1 is not a word and its numbers"):
            layout(head + b"the 1 2\n")


def test_binary_records_do_not_depend_on_where_a_file_is_cut_for_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(word_vector_files, "_LONGEST_WORD", 12)
    for newline in (True, False):
        path = _file(tmp_path, _binary(WORDS, NUMBERS, newline))
        for chunk in range(1, 60):
            monkeypatch.setattr(word_vector_files, "_CHUNK", chunk)
            with path.open("rb") as file:
                layout = word_vector_files.layout_of(path, file)
                found = list(word_vector_files.records(path, file, layout))
            data = path.read_bytes()
            assert [record.word for record in found] == list(WORDS)
            assert [record.payload for record in found] == [row.tobytes() for row in NUMBERS]
            assert all(data.startswith(record.word + b" ", record.offset) for record in found)


def test_a_bad_text_is_refused_when_it_is_opened_or_read(tmp_path):
    for text, message in {
        GLOVE + "cat 1 2\n": "line 4 has 2 numbers, not 3",
        "4 3\n" + GLOVE: "has 3 words, its first line says 4",
        "the 1 2\ndog 1 x2\n": "the vector of 'dog' has 'x2' in place of a number",
        "": "is empty",
    }.items():
        with pytest.raises(UserError, match=message):
            word_vectors.open_file(_file(tmp_path, text)).read(("dog",))
    path = _file(tmp_path, GLOVE)
    with pytest.raises(UserError, match="has vectors of width 3, 300 is needed"):
        word_vectors.open_file(path, 300)
    opened = word_vectors.open_file(path)
    path.unlink()
    for use in (lambda: opened.read(("dog",)), lambda: word_vectors.open_file(path)):
        with pytest.raises(UserError, match=r"cannot be read \(No such file"):
            use()


def test_the_index_is_made_anew_for_a_changed_file(tmp_path, kept, capsys):
    path = _file(tmp_path, GLOVE)
    opened = word_vectors.open_file(path)
    assert [entry.name for entry in tmp_path.iterdir() if entry != path] == ["vectors.txt.index"]
    for text in (GLOVE + "cat 4 5 6\n", GLOVE + "CAT 7 8 9\n"):
        before = path.stat()
        path.write_text(text)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        again = word_vectors.open_file(path)
        word = text.split()[-4]
        assert again.read((word,))[0].sum() == (15 if word == "cat" else 24)
        assert "of an older version of the file; the index is made anew" in capsys.readouterr().out
    assert "cat" not in again and "CAT" not in opened and len(kept) == 3
    # What was opened before the change does not give another word's numbers.
    path.write_text("x" + GLOVE)
    with pytest.raises(UserError, match=r"is not as its index says; delete vectors.txt\*.index"):
        opened.read(("dog",))


def test_a_damaged_index_is_made_anew(tmp_path, kept, capsys):
    path = _file(tmp_path, GLOVE)
    word_vectors.open_file(path)
    index = tmp_path / "vectors.txt.index"
    whole = index.read_bytes()
    assert len(whole) == 256 + 3 * 16
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for number, data in enumerate((b"", whole[:-1], whole + b"\0", bytes(flipped), b"[1]" + whole)):
        index.write_bytes(data)
        matrix, found = word_vectors.open_file(path).read(("dog",))
        assert matrix.tolist() == [[1, 2, 3]] and found.all()
        assert "is damaged; the index is made anew" in capsys.readouterr().out
        assert index.read_bytes() == whole and len(kept) == number + 2
    assert len(list(tmp_path.iterdir())) == 2


def test_the_index_lies_in_the_cache_where_the_folder_is_read_only(tmp_path, kept, capsys):
    folders = [tmp_path / name for name in ("a", "b")]
    cache = tmp_path / "cache" / "words"
    for number, folder in enumerate(folders):
        folder.mkdir()
        _file(folder, GLOVE.replace("dog 1", f"dog {number}"))
        folder.chmod(0o555)
    try:
        for _ in range(2):
            for number, folder in enumerate(folders):  # of one name: they must not be mixed up
                opened = word_vectors.open_file(folder / "vectors.txt", cache=cache)
                assert opened.read(("dog",))[0][0, 0] == number
        assert len(kept) == 2 and len(list(cache.iterdir())) == 2
        assert not capsys.readouterr().out
        word_vectors.open_file(folders[0] / "vectors.txt")
        assert "cannot be written (the folder is read-only): the index is made" in (
            capsys.readouterr().out
        )
        assert [len(list(folder.iterdir())) for folder in folders] == [1, 1]
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_of_small_files_nothing_is_kept(tmp_path):
    path = _file(tmp_path, GLOVE)
    assert "dog" in word_vectors.open_file(path, cache=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == [path]


def test_a_word_is_found_in_lower_case_and_by_its_parts(tmp_path):
    path = _file(
        tmp_path,
        "traffic 1 0\nlight 0 2\nLight 8 8\nNew_York 3 3\nhot dog 4 0\nman 5 5\nMan 6 6\na 7 0\n",
    )
    source = word_vectors.open_file(path, 2)
    expected = {
        "Man": [6, 6],
        "MAN": [5, 5],
        "New York": [3, 3],
        "New_York": [3, 3],
        "new york": None,  # nothing is written in upper case for a lookup
        "hot_dog": [4, 0],
        "Hot Dog": [4, 0],
        "traffic light": [0.5, 1],
        "traffic_light": [0.5, 1],
        "Traffic Light": [4.5, 4],
        "light of a man": [4, 7 / 3],  # 0 2, 7 0 and 5 5: there is no "of"
        "zebra": None,
        "zebra crossing": None,
        "": None,
        "_": None,
    }
    got = word_vectors.read_any_case(source, list(expected))
    for row, (word, vector) in enumerate(expected.items()):
        np.testing.assert_allclose(got.vectors[row], vector or [0, 0], err_msg=word, rtol=1e-6)
        assert got.found[row] == (vector is not None), word
    composed = [word for word, flag in zip(expected, got.composed, strict=True) if flag]
    assert composed == ["traffic light", "traffic_light", "Traffic Light", "light of a man"]
    assert got.missing == 5
    assert word_vectors.read_any_case(source, ()).vectors.shape == (0, 2)


def test_memory_of_a_lookup_does_not_grow_with_the_file(tmp_path, kept):
    numbers = " 0.123456" * 50
    path = _file(tmp_path, "".join(f"word{number}{numbers}\n" for number in range(8_000)))
    words = [f"word{n}" for n in range(0, 8_000, 400)]
    peaks = []
    for _ in range(2):
        tracemalloc.start()
        try:
            matrix, found = word_vectors.open_file(path).read(words)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert found.all() and np.all(matrix == np.float32(0.123456))
    assert path.stat().st_size > 3_500_000
    # Mostly a megabyte of the index at a time; the file itself is never held.
    assert peaks[0] < 2_000_000 and peaks[1] < 1_500_000
    assert len(kept) == 1


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


@pytest.mark.realdata
def test_published_vectors_are_the_same_by_their_index(data_root, tmp_path, kept):
    path = data_root / "words" / "glove.twitter.25d.12k.txt"
    words = ("dog", "Dog", "traffic light", "Zürich airport", "of", "xyzzy")
    for _ in range(2):
        # The data's own folder is read-only.
        opened = word_vectors.open_file(path, 25, cache=tmp_path)
        got = word_vectors.read_any_case(opened, words)
    assert len(kept) == 1 and len(opened) == 11_925
    parts = ("dog", "traffic", "light", "airport", "of")
    dog, traffic, light, airport, of = word_vectors.read(path, parts)[0]
    expected = [dog, dog, (traffic + light) / 2, airport, of, np.zeros(25, np.float32)]
    np.testing.assert_allclose(got.vectors, expected, rtol=1e-6)
    assert got.found.tolist() == [True] * 5 + [False] and got.composed.sum() == 2

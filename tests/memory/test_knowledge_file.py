"""Knowledge sets: files bit for bit, refusals, merging as if built at once, neighbours."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from trm_jax.memory import knowledge_file
from trm_jax.memory.knowledge_file import Knowledge, load, merge, save
from trm_jax.types import UserError

WORDS = ("dog", "traffic light", "café", "Red", "red", "\udc80odd")


def make(words=WORDS, seed=0, word_width=3, width=4, **provenance):
    """A knowledge whose word vectors depend on the words alone."""
    rng = np.random.default_rng(seed)
    matrix = lambda width: rng.normal(size=(len(words), width)).astype(np.float32)  # noqa: E731
    of_word = lambda word: np.random.default_rng([ord(c) for c in word])  # noqa: E731
    known = [of_word(word).normal(size=word_width) for word in words]
    return Knowledge(
        words=tuple(words),
        word_vectors=np.array(known, np.float32).reshape(len(words), word_width),
        prototypes=matrix(width),
        counts=rng.integers(1, 50, len(words)),
        random_regions=matrix(width),
        provenance=provenance,
    )


def assert_same_bits(a, b):
    assert a.words == b.words
    assert a.provenance == b.provenance
    for field in ("word_vectors", "prototypes", "counts", "random_regions"):
        x, y = getattr(a, field), getattr(b, field)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), field
        assert x.tobytes() == y.tobytes(), field


@pytest.mark.parametrize("word_width", [3, 0])
def test_a_file_gives_back_every_bit(tmp_path, word_width):
    saved = make(word_width=word_width, encoder={"sha256": "ab", "layers": [3, 1]}, note="ü\n")
    saved.prototypes[0] = [-0.0, 1e-42, np.finfo(np.float32).max, 1 / 3]
    saved = saved._replace(random_regions=np.asfortranarray(saved.random_regions))
    path = tmp_path / "new" / "knowledge.safetensors"
    save(saved, path)
    assert_same_bits(load(path, word_width=word_width, width=4), saved)
    assert [file.name for file in path.parent.iterdir()] == ["knowledge.safetensors"]
    # Any reader of the format finds the arrays.
    arrays = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(arrays["prototypes"], saved.prototypes)
    assert arrays["words"].tobytes().decode(errors="surrogatepass").split("\n") == list(WORDS)


def fine_tuned(seed=0, **provenance):
    matrix = np.random.default_rng([seed, 9]).normal(size=(4, 4)).astype(np.float32)
    return knowledge_file.transform(make(**provenance), matrix)


def test_a_fine_tuned_set_keeps_its_map(tmp_path):
    path = tmp_path / "k.safetensors"
    save(fine_tuned(note="n"), path)
    read = load(path)
    assert_same_bits(read, fine_tuned(note="n"))
    assert read.region_map.tobytes() == fine_tuned().region_map.tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(read.region_map.tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="k.safetensors is damaged"):
        load(path)
    save(make(), path)
    assert load(path).region_map is None
    assert "region_map" not in safetensors.numpy.load_file(path)


def test_transform_hand_worked():
    known = make(("a", "b"), width=2)._replace(
        prototypes=np.array([[1, 2], [0, 3]], np.float32),
        random_regions=np.array([[1, 0], [0, 1]], np.float32),
    )
    turn, stretch = np.array([[0, 1], [-1, 0]], np.float32), np.diag([2, 5]).astype(np.float32)
    once = knowledge_file.transform(known, turn)
    np.testing.assert_array_equal(once.prototypes, [[-2, 1], [-3, 0]])
    np.testing.assert_array_equal(once.random_regions, turn)
    np.testing.assert_array_equal(once.region_map, turn)
    # The second map meets what the first one made: a region goes through both.
    twice = knowledge_file.transform(once, stretch)
    np.testing.assert_array_equal(twice.prototypes, [[-4, 5], [-6, 0]])
    np.testing.assert_array_equal(twice.region_map, [[0, 5], [-2, 0]])
    said = knowledge_file.describe(twice)["region_map"]
    assert said == pytest.approx({"least_stretch": 2, "most_stretch": 5})
    np.testing.assert_array_equal(known.prototypes, [[1, 2], [0, 3]])
    for wrong in (np.eye(3, dtype=np.float32), np.full((2, 2), np.nan, np.float32)):
        with pytest.raises(UserError, match=r"need finite numbers \[2, 2\]"):
            knowledge_file.transform(known, wrong)


def test_a_changed_file_is_refused_wherever_it_changed(tmp_path):
    path = tmp_path / "k.safetensors"
    save(make(note="n"), path)
    content = path.read_bytes()
    for length in (0, 4, 8, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=re.escape(str(path)) + ".*launch/match.py build"):
            load(path)
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=re.escape(str(path))):
            load(path)
    path.write_bytes(content)
    load(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"kernel": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(UserError, match="model.safetensors is a safetensors file, but no"):
        load(path)
    header = {"format": "trm_jax knowledge", "version": "2"}
    safetensors.numpy.save_file({"kernel": np.zeros(2)}, path, header)
    with pytest.raises(UserError, match="is a knowledge of another version; build it again"):
        load(path)
    safetensors.numpy.save_file({"kernel": np.zeros(2)}, path, header | {"version": "1"})
    with pytest.raises(UserError, match="it has {'kernel': 'F64'}; build it again"):
        load(path)
    path.write_text("word 0.1 0.2\n" * 100)
    with pytest.raises(UserError, match="is no knowledge, or is cut off or damaged"):
        load(path)
    for place in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match=re.escape(f"{place} ")):
            load(place)


def changed(field, index, value):
    def change(knowledge):
        array = getattr(knowledge, field).copy()
        array[index] = value
        return knowledge._replace(**{field: array})

    return change


WRONG = [
    (changed("prototypes", (1, 2), np.nan), "1 words, 'traffic light' the first, have prototypes"),
    (changed("word_vectors", 4, np.inf), "'red' the first, have word_vectors not finite"),
    (changed("random_regions", [0, 2], -np.inf), "2 words, 'dog' the first, have random_regions"),
    (changed("counts", 3, 0), "1 words, 'Red' the first, have no region"),
    (lambda k: k._replace(words=(*WORDS[:-1], "dog")), "the word 'dog' 2 times"),
    (lambda k: k._replace(words=(*WORDS[:-1], "")), "the word '', which is none"),
    (lambda k: k._replace(words=(*WORDS[:-1], "a\nb")), r"the word 'a\\nb', which is none"),
    (lambda k: k._replace(words=WORDS[:-1]), r"counts is int64\[6\], not int64\[5\]"),
    (lambda k: k._replace(counts=k.counts.astype(float)), r"counts is float64\[6\]"),
    (lambda k: k._replace(prototypes=k.prototypes[:2]), r"is float32\[2, 4\], not float32\[6, wid"),
    (lambda k: k._replace(word_vectors=k.word_vectors.astype(float)), r"word_vectors is float64"),
    (lambda k: k._replace(random_regions=k.random_regions[:, :1]), "width 1, prototypes 4"),
    (lambda k: knowledge_file.select(k, np.zeros(6, bool)), "holds no word"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_content_is_refused_on_both_ways(tmp_path, monkeypatch, change, message):
    path = tmp_path / "k.safetensors"
    wrong = change(make())
    with pytest.raises(UserError, match=message) as caught:
        save(wrong, path)
    assert str(path) in str(caught.value)
    assert "build it again with launch/match.py build" in str(caught.value)
    assert not path.exists()
    if "int64[5]" in message or "a\\nb" in message or wrong.counts.dtype != np.int64:
        return
    # A file of another writer may hold anything.
    with monkeypatch.context() as patch:
        patch.setattr(knowledge_file, "check", lambda *_: None)
        save(wrong, path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load(path)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(4), r"region_map is float64\[4, 4\], not float32\[4, 4\]"),
        (np.eye(3, dtype=np.float32), r"float32\[3, 3\], not float32\[4, 4\]"),
        (np.full((4, 4), np.inf, np.float32), "region_map is not finite"),
    ],
)
def test_a_wrong_map_is_refused(tmp_path, matrix, message):
    with pytest.raises(UserError, match=f"{message}; fine-tune it again with launch/match.py fi"):
        save(make()._replace(region_map=matrix), tmp_path / "k.safetensors")


def test_other_widths_are_refused(tmp_path):
    path = tmp_path / "k.safetensors"
    save(make(), path)
    with pytest.raises(UserError, match="k.safetensors has prototypes of width 4, not 512; take"):
        load(path, width=512)
    with pytest.raises(UserError, match="k.safetensors has word vectors of width 3, not 300; take"):
        load(path, word_width=300)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="k cannot be written .*; choose another"):
        save(make(), tmp_path / "file" / "k")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder cannot be written"):
        save(make(), tmp_path / "folder")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_merge_hand_worked():
    a = make(("dog", "cat"), seed=1, encoder="x", note="a")
    b = make(("sun", "dog"), seed=2, encoder="x")
    a.prototypes[0], b.prototypes[1] = [1, 2, 3, 4], [5, 2, -1, 0]
    a.counts[0], b.counts[1] = 1, 3
    whole = merge(a, b)
    assert whole.words == ("dog", "cat", "sun")
    assert whole.counts.tolist() == [4, a.counts[1], b.counts[0]]
    np.testing.assert_array_equal(whole.prototypes[0], [4, 2, 0, 1])
    for rows, origin, row in ((1, a, 1), (2, b, 0)):
        for field in ("word_vectors", "prototypes", "random_regions"):
            np.testing.assert_array_equal(getattr(whole, field)[rows], getattr(origin, field)[row])
    np.testing.assert_array_equal(whole.word_vectors[0], a.word_vectors[0])
    assert whole.provenance == {"merged": [a.provenance, b.provenance], "encoder": "x"}
    np.testing.assert_array_equal(a.prototypes[0], [1, 2, 3, 4])  # the parts stay as they are
    assert whole.region_map is None
    tuned = fine_tuned()
    np.testing.assert_array_equal(merge(tuned, tuned).region_map, tuned.region_map)


LETTERS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True)


def by_word(knowledge):
    """Word -> (count, prototype, word vector)."""
    columns = (knowledge.counts.tolist(), knowledge.prototypes, knowledge.word_vectors)
    return dict(zip(knowledge.words, zip(*columns, strict=True), strict=True))


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(LETTERS, min_size=3, max_size=3), seed=st.integers(0, 2**16))
def test_merge_is_the_mean_of_all_regions_in_any_order(parts, seed):
    a, b, c = (make(words, seed=seed + place) for place, words in enumerate(parts))
    expected = {}
    for part in (a, b, c):
        for word, (count, prototype, vector) in by_word(part).items():
            number, total, _ = expected.get(word, (0, 0.0, None))
            expected[word] = number + count, total + count * prototype.astype(float), vector
    orders = [merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, a), b)]
    for whole in orders:
        knowledge_file.check(whole)
        merged = by_word(whole)
        assert merged.keys() == expected.keys()
        for word, (count, prototype, vector) in merged.items():
            number, total, known = expected[word]
            assert count == number
            np.testing.assert_allclose(prototype, total / number, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(vector, known)
    # Two sets give the same bits in both orders.
    one, other = by_word(merge(a, b)), by_word(merge(b, a))
    for word in one:
        np.testing.assert_array_equal(one[word][1], other[word][1])


def test_merge_draws_random_regions_by_the_counts():
    words = tuple(f"w{number}" for number in range(2000))
    a, b = make(words, seed=1), make(words, seed=2)
    a, b = a._replace(counts=np.full(2000, 3)), b._replace(counts=np.full(2000, 1))
    whole = merge(a, b, seed=5)
    is_a = (whole.random_regions == a.random_regions).all(1)
    assert (is_a | (whole.random_regions == b.random_regions).all(1)).all()
    assert abs(is_a.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 2000)
    assert_same_bits(merge(a, b, seed=5), whole)
    assert (merge(a, b, seed=6).random_regions != whole.random_regions).any()


def test_what_does_not_fit_together_is_not_merged():
    a = make(encoder="x")
    with pytest.raises(UserError, match="word vectors of widths 3 and 2; build both"):
        merge(a, make(word_width=2, encoder="x"))
    with pytest.raises(UserError, match="prototypes of widths 4 and 9; build both"):
        merge(a, make(width=9, encoder="x"))
    with pytest.raises(UserError, match="different encoders; build both with the same one"):
        merge(a, make(encoder="y"))
    for one, other in ((a, fine_tuned(encoder="x")), (fine_tuned(1, encoder="x"), fine_tuned())):
        with pytest.raises(UserError, match="were not fine-tuned alike; merge them before"):
            merge(one, other._replace(provenance=a.provenance))
    b = changed("word_vectors", (3, 0), 0.5)(make(encoder="x"))
    with pytest.raises(UserError, match="vectors for 1 words, 'Red' the first; build both with"):
        merge(a, b)


def test_select_keeps_rows():
    whole = make(note=1)
    part = knowledge_file.select(whole, np.array([True, False, True, False, False, True]))
    assert part.words == ("dog", "café", WORDS[-1])
    assert part.provenance == whole.provenance
    for field in ("word_vectors", "prototypes", "counts", "random_regions"):
        np.testing.assert_array_equal(getattr(part, field), getattr(whole, field)[[0, 2, 5]])


def test_describe_hand_worked():
    knowledge = make(("a b", "c", "d"), note="n")._replace(
        counts=np.array([4, 10, 1]),
        prototypes=np.array([[3, 4, 0, 0], [0, 0, 0, 1], [0, 0, 9, 0]], np.float32),
    )
    said = knowledge_file.describe(knowledge)
    assert json.loads(json.dumps(said)) == {
        "words": 3,
        "words_of_several_tokens": 1,
        "word_width": 3,
        "prototype_width": 4,
        "regions": 15,
        "regions_per_word": {"least": 1, "median": 4.0, "most": 10},
        "most_frequent": [["c", 10], ["a b", 4], ["d", 1]],
        "least_frequent": [["c", 10], ["a b", 4], ["d", 1]],
        "prototype_norm": {"least": 1.0, "mean": 5.0, "most": 9.0},
        "region_map": None,
        "provenance": {"note": "n"},
    }


def test_nearest_hand_worked():
    knowledge = make(("dog", "puppy", "sun", "zero"))._replace(
        word_vectors=np.array([[3, 4], [4, 3], [-3, -4], [0, 0]], np.float32),
        prototypes=np.array([[1, 0], [0, 2], [5, 0], [0, 0]], np.float32),
        random_regions=np.zeros((4, 2), np.float32),
    )
    near = knowledge_file.nearest(knowledge, "dog", top=2)
    assert [word for word, _ in near["word_vectors"]] == ["puppy", "zero"]
    assert [word for word, _ in near["prototypes"]] == ["sun", "puppy"]
    np.testing.assert_allclose([cosine for _, cosine in near["word_vectors"]], [0.96, 0.0])
    np.testing.assert_allclose([cosine for _, cosine in near["prototypes"]], [1.0, 0.0])
    everything = knowledge_file.nearest(knowledge, "zero", top=99)
    assert everything["word_vectors"] == [("dog", 0.0), ("puppy", 0.0), ("sun", 0.0)]
    with pytest.raises(UserError, match="has no word 'pupy'; the likest is 'puppy'"):
        knowledge_file.nearest(knowledge, "pupy")

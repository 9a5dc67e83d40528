"""Scores of all pairs against the definition written as a loop over pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from trm_jax.data.caption_words import CaptionWords
from trm_jax.evaluate import knowledge_matching as matching
from trm_jax.types import UserError


def _index(captions):
    """Captions given as lists of words."""
    words = tuple(dict.fromkeys(word for caption in captions for word in caption))
    return CaptionWords(
        indptr=np.cumsum([0, *map(len, captions)], dtype=np.int64),
        indices=np.array([words.index(w) for caption in captions for w in caption], np.int32),
        words=words,
        known=np.ones(len(words), bool),
        dropped={},
    )


RNG = np.random.default_rng(0)
VOCABULARY = [f"word{i}" for i in range(23)]
CAPTIONS = [
    *(RNG.choice(VOCABULARY, size=size).tolist() for size in (5, 1, 9, 3, 12, 2)),
    [],  # no usable word
    ["word3", "word3", "word7"],  # a repeat counts twice in the mean over words
    ["word7", "word3"],
    ["word3", "word7"],
]
INDEX = _index(CAPTIONS)
PROTOTYPES = RNG.normal(size=(len(INDEX.words), 8)).astype(np.float32)
REGIONS = (3 * RNG.normal(size=(11, 6, 8))).astype(np.float32)
MASK = np.arange(6) < RNG.integers(1, 7, size=11)[:, None]
MASK[4] = False  # an image without a region
REGIONS[~MASK] = np.nan  # whatever is there does not count
BATCH = [(REGIONS, MASK)]


def _naive(regions, mask, prototypes, pooling):
    """Pair by pair, in float64."""
    unit = {
        word: vector / np.linalg.norm(vector)
        for word, vector in zip(INDEX.words, prototypes.astype(np.float64), strict=True)
    }
    scores = np.zeros((len(regions), len(CAPTIONS)))
    for i, (vectors, kept) in enumerate(zip(regions.astype(np.float64), mask, strict=True)):
        for j, words in enumerate(CAPTIONS):
            if not words or not kept.any():
                continue
            own = vectors[kept] / np.linalg.norm(vectors[kept], axis=1, keepdims=True)
            cosines = own @ np.stack([unit[word] for word in words]).T
            scores[i, j] = {
                "max_mean": cosines.max(axis=0).mean(),
                "global_mean": cosines.mean(),
                "bidirectional": (cosines.max(axis=0).mean() + cosines.max(axis=1).mean()) / 2,
            }[pooling]
    return scores


def test_hand_worked_case():
    captions = _index([["dog", "red"], ["dog", "dog", "red"], [], ["red"]])
    assert captions.words == ("dog", "red")
    regions = np.array([[[2.0, 0.0], [3.0, 4.0]], [[0.0, -1.0], [9.0, 9.0]]])
    mask = np.array([[True, True], [True, False]])
    prototypes = np.array([[5.0, 0.0], [0.0, 0.1]])
    # Cosines of image 0: dog 1 and 0.6, red 0 and 0.8; of image 1: dog 0, red -1.
    scores = matching.score_all([(regions, mask)], prototypes, captions)
    wanted = [[0.9, 2.8 / 3, 0.0, 0.8], [-0.5, -1 / 3, 0.0, -1.0]]
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    scores = matching.score_all([(regions, mask)], prototypes, captions, pooling="global_mean")
    wanted = [[0.6, 2.0 / 3, 0.0, 0.4], [-0.5, -1 / 3, 0.0, -1.0]]
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    scores = matching.score_all([(regions, mask)], prototypes, captions, pooling="bidirectional")
    wanted = [[0.9, (2.8 / 3 + 0.9) / 2, 0.0, 0.6], [-0.25, -1 / 6, 0.0, -1.0]]
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    place, cosine = matching.best_regions(regions[0], mask[0], prototypes)
    assert place.tolist() == [0, 1]
    np.testing.assert_allclose(cosine, [1.0, 0.8], atol=1e-6)
    assert matching.best_regions(regions[1], mask[1], prototypes)[0].tolist() == [0, 0]


@pytest.mark.parametrize("pooling", matching.POOLINGS)
def test_equals_the_loop_over_pairs(pooling):
    wanted = _naive(REGIONS, MASK, PROTOTYPES, pooling)
    got = matching.score_all(BATCH, PROTOTYPES, INDEX, pooling=pooling)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert not got[4].any()
    assert not got[:, 6].any()
    # Batches of other sizes, on the device, in blocks of one and of a few images, into a file.
    batches = [
        (jnp.asarray(REGIONS[:0]), jnp.asarray(MASK[:0])),
        (jnp.asarray(REGIONS[:5]), jnp.asarray(MASK[:5])),
        (REGIONS[5:9], MASK[5:9]),
        (REGIONS[9:], MASK[9:]),
    ]
    for memory_mb in (1e-6, 0.02):
        out = np.full(wanted.shape, 7.0, np.float32)
        got = matching.score_all(
            batches, PROTOTYPES, INDEX, pooling=pooling, memory_mb=memory_mb, out=out
        )
        assert got is out
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_the_word_table_is_the_score_of_each_word():
    for pooling in ("max_mean", "global_mean"):
        table = matching.word_table(BATCH, PROTOTYPES, pooling=pooling, memory_mb=1e-3)
        scores = matching.score_all(BATCH, PROTOTYPES, INDEX, pooling=pooling)
        np.testing.assert_allclose(
            matching.caption_scores(table, INDEX, block=4), scores, 1e-6, 1e-7
        )
        single = _index([[word] for word in INDEX.words])
        of_words = matching.score_all(BATCH, PROTOTYPES, single, pooling=pooling)
        np.testing.assert_allclose(table, of_words, atol=1e-6)


def test_the_order_of_words_changes_no_bit():
    words = RNG.choice(VOCABULARY, size=15).tolist()
    captions = _index([words, words[::-1], sorted(words)])
    prototypes = RNG.normal(size=(len(captions.words), 8))
    scores = matching.score_all(BATCH, prototypes, captions)
    np.testing.assert_array_equal(scores[:, [0, 0]], scores[:, 1:])


@pytest.mark.parametrize("pooling", matching.POOLINGS)
def test_captions_without_any_word_score_zero(pooling):
    captions = _index([[], []])
    scores = matching.score_all(BATCH, np.zeros((0, 8)), captions, pooling=pooling)
    assert scores.shape == (11, 2)
    assert not scores.any()


def test_zero_vectors_have_cosine_zero():
    captions = _index([["a"], ["b"]])
    regions = np.array([[[0.0, 0.0], [-1.0, 0.0]]])
    mask = np.ones((1, 2), bool)
    scores = matching.score_all([(regions, mask)], np.array([[1.0, 0.0], [0.0, 0.0]]), captions)
    np.testing.assert_array_equal(scores, [[0.0, 0.0]])


@pytest.mark.parametrize("pooling", matching.POOLINGS)
def test_a_block_keeps_within_its_memory(pooling, monkeypatch):
    """The compiled program's temporaries and results, at the size of block that was chosen."""
    n, r, width, n_words, m = 400, 8, 64, 700, 2000
    captions = _index([[f"word{(7 * j + i) % n_words}" for i in range(10)] for j in range(m)])
    shape = (n, r, width)
    regions, mask = np.ones(shape, np.float32), np.ones(shape[:2], bool)
    seen = []

    def record(name):
        program = getattr(matching, name)

        def measured(*arrays, **settings):
            if not seen:
                analysis = program.lower(*arrays, **settings).compile().memory_analysis()
                seen.append(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)
                seen.append(len(arrays[0]))
            sizes = (len(arrays[2]), len(arrays[0])), (2048, len(arrays[0]))
            table, side = (jnp.zeros(size) for size in sizes)
            return (table, side) if name == "_both_sides" else table

        monkeypatch.setattr(matching, name, measured)

    record("_table")
    record("_both_sides")
    prototypes = np.ones((n_words, width), np.float32)
    matching.score_all([(regions, mask)], prototypes, captions, pooling=pooling, memory_mb=8)
    taken, images = seen
    assert taken <= 8e6
    assert 1 < images < n  # the bound is what decided


@pytest.mark.parametrize(
    ("images", "prototypes", "options", "message"),
    [
        (BATCH, PROTOTYPES[:, :5], {}, "image 0 on are 8 wide, the prototypes 5"),
        (BATCH, PROTOTYPES[1:], {}, rf"they must be \[{len(PROTOTYPES)}, width\]"),
        (BATCH, np.where(np.eye(len(PROTOTYPES), 8), np.nan, 1.0), {}, "8 of .* not finite, first"),
        ([], PROTOTYPES, {}, "no image to match"),
        (BATCH, PROTOTYPES, {"pooling": "max"}, "pooling 'max' is unknown; choose one of max_mean"),
        (
            [*BATCH, (REGIONS, MASK[:3])],
            PROTOTYPES,
            {},
            r"image 11 on has .* and a mask bool\[3, 6",
        ),
        ([(REGIONS, MASK.astype(np.float32))], PROTOTYPES, {}, r"a mask float32\[11, 6\]"),
        ([(REGIONS[0], MASK[0])], PROTOTYPES, {}, r"regions \[6, 8\]"),
        (BATCH, PROTOTYPES, {"out": np.zeros((11, 9))}, "10 columns, one for each caption"),
        (BATCH, PROTOTYPES, {"out": np.zeros((10, 10))}, "at least 11"),
        (BATCH, PROTOTYPES, {"out": np.zeros((12, 10))}, "12 rows, there are 11 images"),
    ],
)
def test_refusals(images, prototypes, options, message):
    with pytest.raises(UserError, match=message):
        matching.score_all(images, prototypes, INDEX, **options)


@pytest.mark.parametrize("pooling", matching.POOLINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_region_that_is_not_finite_is_named(pooling, value):
    regions = np.nan_to_num(REGIONS)
    regions[7, 0, 2] = value
    batches = [(regions[:5], MASK[:5]), (regions[5:], MASK[5:])]
    with pytest.raises(UserError, match=r"regions of image 7 \(counted from 0\) are not finite"):
        matching.score_all(batches, PROTOTYPES, INDEX, pooling=pooling)


def test_other_refusals():
    with pytest.raises(UserError, match="no caption to match"):
        matching.score_all(BATCH, np.zeros((0, 8)), _index([]))
    with pytest.raises(UserError, match="no word table"):
        matching.word_table(BATCH, PROTOTYPES, pooling="bidirectional")
    with pytest.raises(UserError, match="no image to match"):
        matching.word_table([], PROTOTYPES)
    with pytest.raises(UserError, match=r"the word table is \[11, 3\]"):
        matching.caption_scores(np.zeros((11, 3)), INDEX)
    with pytest.raises(UserError, match="has no region"):
        matching.best_regions(REGIONS[4], MASK[4], PROTOTYPES)


def test_batches_of_any_size_compile_once():
    before = matching._table._cache_size()
    for part in (REGIONS[:, :5], REGIONS[:7, :5], REGIONS[:1, :5]):
        batches = [(part, MASK[: len(part), :5]), (jnp.asarray(part), MASK[: len(part), :5])]
        matching.score_all([(REGIONS[:, :5], MASK[:, :5]), *batches], PROTOTYPES, INDEX)
    assert matching._table._cache_size() - before <= 2  # host and device arrays

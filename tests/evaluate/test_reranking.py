"""Re-ranking against hand-worked cases and a ranking written as loops."""

import statistics

import numpy as np
import pytest

from trm_jax.evaluate import reranking, retrieval
from trm_jax.types import UserError

# Every second image has one text more, some share a score: ties in both directions.
OWNER = np.array([0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8])


def _matrices(digits=None, seed=0):
    rng = np.random.default_rng(seed)
    base, other = rng.normal(size=(2, 9, len(OWNER)))
    base[OWNER, np.arange(len(OWNER))] += 0.8
    return (base, other) if digits is None else (np.round(base, digits), np.round(other, digits))


def _zscores(values):
    deviation = statistics.pstdev(values)
    return [0.0 if deviation < 1e-8 else (v - statistics.fmean(values)) / deviation for v in values]


def _slow(base, other, alpha, top):
    """Eq. 15 query by query: the whole new order of each row."""
    orders = []
    for row, extra in zip(base.tolist(), other.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j: -row[j])
        first = order[:top]
        ours, theirs = (_zscores([values[j] for j in first]) for values in (row, extra))
        mixed = [a + alpha * b for a, b in zip(ours, theirs, strict=True)]
        again = sorted(range(top), key=lambda i: -mixed[i])
        orders.append([first[i] for i in again] + order[top:])
    return np.array(orders)


def test_hand_worked_case():
    base = np.array([[3.0, 2.0, 1.0, 0.0]])
    other = np.array([[0.0, 0.0, 1.0, 5.0]])
    found = reranking.rerank_rows(base, other, alpha=1.0, top=3)
    # z of 3, 2, 1: 1.2247, 0, -1.2247; z of 0, 0, 1: -0.7071, -0.7071, 1.4142. The fourth
    # candidate, which the other model likes best, is below the first three and stays there.
    assert found.before.tolist() == [[0, 1, 2]]
    assert found.order.tolist() == [[0, 2, 1]]
    assert found.moves.tolist() == [[0, 1, -1]]
    np.testing.assert_allclose(found.scores, [[0.517638, 0.189469, -0.707107]], atol=1e-6)
    assert reranking.place_scores(base, found).tolist() == [[0.0, -2.0, -1.0, -3.0]]


def test_texts_are_queries_too():
    base = np.array([[0.9, 0.5], [0.8, 0.6]])
    other = np.array([[0.0, 1.0], [1.0, 0.0]])
    found = reranking.rerank(base, other, alpha=0.5, top=2)
    assert found.to_text.order.tolist() == [[0, 1], [0, 1]]  # image 0 likes text 0, image 1 too
    assert found.to_image.order.tolist() == [[0, 1], [1, 0]]  # of text 0 and of text 1
    strong = reranking.rerank(base, other, alpha=2.0, top=2)
    assert strong.to_text.order.tolist() == [[1, 0], [0, 1]]
    assert strong.to_image.order.tolist() == [[1, 0], [0, 1]]
    assert strong.to_image.moves.tolist() == [[1, -1], [1, -1]]


@pytest.mark.parametrize("digits", [None, 0])
@pytest.mark.parametrize(("top", "alpha", "block"), [(1, 0.15, 256), (5, 0.6, 4), (9, 3.0, 1)])
def test_equals_the_slow_re_ranking(digits, top, alpha, block):
    base, other = _matrices(digits)
    found = reranking.rerank(base, other, alpha=alpha, top=top, block=block)
    for ours, rows, extra in (
        (found.to_text, base, other),
        (found.to_image, base.T, other.T),
    ):
        slow = _slow(rows, extra, alpha, top)
        np.testing.assert_array_equal(ours.order, slow[:, :top])
        places = -reranking.place_scores(rows, ours, block=block)
        np.testing.assert_array_equal(np.argsort(places, axis=1), slow)
        before = np.argsort(-rows, axis=1, kind="stable")
        np.testing.assert_array_equal(ours.before, before[:, :top])
        # A move is the difference of the two places.
        where = np.argsort(before, axis=1)
        moved = np.take_along_axis(where, ours.order, axis=1) - np.arange(top)
        np.testing.assert_array_equal(ours.moves, moved)
        assert (np.diff(ours.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("digits", [None, 0])
@pytest.mark.parametrize("top", [1, 4, 9])
def test_ranks_and_recalls_are_those_of_the_re_ranked_scores(digits, top):
    base, other = _matrices(digits, seed=1)
    found = reranking.rerank(base, other, alpha=0.7, top=top)
    to_text, to_image = reranking.ranks(base, OWNER, found)
    by_text = reranking.place_scores(base, found.to_text)
    by_image = reranking.place_scores(base.T, found.to_image).T
    np.testing.assert_array_equal(to_text, retrieval.ranks(by_text, OWNER)[0])
    np.testing.assert_array_equal(to_image, retrieval.ranks(by_image, OWNER)[1])
    values = reranking.recalls(base, OWNER, found)
    wanted = {
        name: (retrieval.recalls(by_text if name.startswith("i2t") else by_image, OWNER))[name]
        for name in values
        if name != "Rsum"
    }
    assert values == pytest.approx(wanted | {"Rsum": sum(wanted.values())})


@pytest.mark.parametrize("digits", [None, 0])
def test_alpha_zero_changes_nothing(digits):
    base, other = _matrices(digits)
    found = reranking.rerank(base, other, alpha=0.0, top=9)
    assert not found.to_text.moves.any()
    assert not found.to_image.moves.any()
    assert reranking.recalls(base, OWNER, found) == retrieval.recalls(base, OWNER)


def test_scores_that_hardly_differ_count_nothing():
    base = np.array([[0.3, 0.2, 0.1]])
    nearly = 0.7 + np.array([[0.0, 1e-9, 2e-9]])  # standard deviation 8e-10
    assert not reranking.rerank_rows(base, nearly, alpha=100.0, top=3).moves.any()
    found = reranking.rerank_rows(nearly, base[:, ::-1], alpha=1e-3, top=2)
    # The base model says nothing about its first two (2 and 1): the other one decides.
    assert found.before.tolist() == [[2, 1]]
    assert found.order.tolist() == [[2, 1]]
    assert reranking.rerank_rows(nearly, base, alpha=1e-3, top=2).order.tolist() == [[1, 2]]
    # A hundred times further apart they count in full.
    further = 0.7 + np.array([[0.0, 1e-7, 2e-7]])
    assert reranking.rerank_rows(base, further, alpha=100.0, top=3).order.tolist() == [[2, 1, 0]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, np.uint8])
def test_any_number_type_and_files(dtype, tmp_path):
    rng = np.random.default_rng(2)
    base, other = rng.integers(0, 100, size=(2, 9, 13)).astype(dtype)
    np.save(tmp_path / "base.npy", base)
    found = reranking.rerank(np.load(tmp_path / "base.npy", mmap_mode="r"), other, top=6)
    exact = [matrix.astype(np.float64) for matrix in (base, other)]
    np.testing.assert_array_equal(found.to_text.order, _slow(*exact, 0.15, 6)[:, :6])
    turned = _slow(exact[0].T, exact[1].T, 0.15, 6)
    np.testing.assert_array_equal(found.to_image.order, turned[:, :6])


def test_examples_are_chosen_as_in_table_10():
    before, after = np.array([[3, 0, 0, 9, 2, 5], [1, 4, 0, 0, 6, 5]])
    positive, negative = reranking.examples(before, after)
    assert positive.tolist() == [3, 0]  # gained 9 and 2 places
    assert negative.tolist() == [1]  # query 4 fell too, but was not first


NAN = np.array([[0.1, 0.2, 0.3], [0.4, np.nan, np.inf]])


@pytest.mark.parametrize(
    ("base", "other", "options", "message"),
    [
        (np.eye(3), np.ones((3, 4)), {}, r"base scores are \[3, 3\], the other scores \[3, 4\]"),
        (np.ones((2, 3)), np.ones((3, 2)), {}, "transpose one of them"),
        (np.ones(3), np.ones(3), {}, r"base scores are float64\[3\]; re-ranking needs"),
        (np.ones((0, 3)), np.ones((0, 3)), {}, r"\[0, 3\]"),
        (np.ones((2, 3)), np.full((2, 3), "a"), {}, "the other scores are <U1"),
        (np.ones((2, 3)), NAN, {}, "2 of 6 other scores are not finite, the first at row 1, col"),
        (NAN, np.ones((2, 3)), {"names": ("clip.npy", "mask.npy")}, "2 of 6 clip.npy scores"),
        (np.ones((2, 3)), np.ones((2, 3)), {"top": 3}, "there are 2 images: set k to 2 or less"),
        (np.ones((3, 2)), np.ones((3, 2)), {"top": 3}, "there are 2 texts: set k to 2"),
        (np.ones((3, 2)), np.ones((3, 2)), {"top": 0}, "k >= 1"),
        (np.eye(2), np.eye(2), {"top": 2, "alpha": -0.1}, "alpha is -0.1; it must be 0 or more"),
        (np.eye(2), np.eye(2), {"top": 2, "alpha": np.nan}, "alpha is nan"),
    ],
)
def test_refusals(base, other, options, message):
    with pytest.raises(UserError, match=message):
        reranking.rerank(base, other, **options)


def test_a_ranking_of_other_scores_is_refused():
    base, other = _matrices()
    found = reranking.rerank(base, other, top=9)
    with pytest.raises(UserError, match="13 queries, the scores are .9, 13."):
        reranking.place_scores(base, found.to_image)
    with pytest.raises(UserError, match="9 queries, the scores are .8, 11."):
        reranking.ranks(base[:8, :11], OWNER[:11], found)

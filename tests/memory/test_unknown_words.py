"""Prototypes of unknown words against hand-worked cases, a planted map, loops and SciPy."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from trm_jax.memory import unknown_words
from trm_jax.memory.unknown_words import apply_procrustes, fit_procrustes, interpolate
from trm_jax.types import UserError


def test_interpolation_hand_worked():
    words = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], np.float32)
    prototypes = np.array([[0.0, 10.0], [5.0, 5.0], [10.0, 0.0]], np.float32)
    # (2, 1): cosines 0.894, 0.447 and 0.949 choose words 2 and 0, whose dot products are 6 and 2.
    result = interpolate(words, prototypes, np.array([[2.0, 1.0]]), top=2)
    weight = 1 / (1 + np.exp(-4.0))
    assert result.neighbours.tolist() == [[2, 0]]
    np.testing.assert_allclose(result.weights, [[weight, 1 - weight]], rtol=1e-12)
    np.testing.assert_allclose(result.prototypes, [[10 * weight, 10 * (1 - weight)]], rtol=1e-12)
    # With all three the dot products are 6, 2 and 1.
    terms = np.exp([6.0, 2.0, 1.0]) / np.exp([6.0, 2.0, 1.0]).sum()
    result = interpolate(words, prototypes, np.array([[2.0, 1.0]]), top=3)
    expected = [[10 * terms[0] + 5 * terms[2], 10 * terms[1] + 5 * terms[2]]]
    np.testing.assert_allclose(result.prototypes, expected, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    size=st.integers(1, 12),
    unknown=st.integers(0, 7),
    top=st.integers(1, 15),
)
def test_interpolation_follows_the_loop(seed, size, unknown, top):
    rng = np.random.default_rng(seed)
    words = rng.normal(size=(size, 3)).astype(np.float32)
    prototypes = rng.normal(size=(size, 4)).astype(np.float32)
    queries = rng.normal(size=(unknown, 3)).astype(np.float32)
    result = interpolate(words, prototypes, queries, top=top)
    m = min(top, size)
    assert result.top == m
    assert result.prototypes.shape == (unknown, 4)
    for row, query in enumerate(queries.astype(np.float64)):
        cosines = [w @ query / np.linalg.norm(w) / np.linalg.norm(query) for w in words]
        order = sorted(range(size), key=lambda k: -cosines[k])[:m]
        weights = np.exp([float(words[k].astype(np.float64) @ query) for k in order])
        weights /= weights.sum()
        assert result.neighbours[row].tolist() == order
        np.testing.assert_allclose(result.weights[row], weights, rtol=1e-9)
        expected = sum(w * prototypes[k].astype(float) for w, k in zip(weights, order, strict=True))
        np.testing.assert_allclose(result.prototypes[row], expected, rtol=1e-9, atol=1e-12)
        chosen = prototypes[order]
        assert (result.prototypes[row] >= chosen.min(0) - 1e-9).all()
        assert (result.prototypes[row] <= chosen.max(0) + 1e-9).all()


def test_interpolation_in_blocks_equals_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    words, prototypes, queries = (rng.normal(size=(n, 6)) for n in (20, 20, 11))
    whole = interpolate(words, prototypes, queries, top=5)
    monkeypatch.setattr(unknown_words, "_BLOCK", 4)
    parts = interpolate(words, prototypes, queries, top=5)
    np.testing.assert_array_equal(whole.neighbours, parts.neighbours)
    np.testing.assert_allclose(whole.prototypes, parts.prototypes, rtol=1e-12)


def test_equal_cosines_take_the_first_words():
    # Four vectors of one direction, exact in binary: the cosines are equal, the lengths are not.
    words = np.array([[-1.0, 0.0], [1.0, 0.0], [4.0, 0.0], [2.0, 0.0], [8.0, 0.0]])
    result = interpolate(words, np.eye(5), np.array([[0.5, 0.0]]), top=3)
    assert result.neighbours.tolist() == [[1, 2, 3]]
    expected = np.exp([0.5, 2.0, 1.0]) / np.exp([0.5, 2.0, 1.0]).sum()
    np.testing.assert_allclose(result.prototypes, [[0, *expected, 0]], rtol=1e-12)


def test_long_vectors_do_not_overflow():
    words = np.array([[60.0, 0.0], [0.0, 60.0]], np.float16)
    result = interpolate(words, np.eye(2), np.array([[50.0, 1.0]]), top=2)
    np.testing.assert_allclose(result.prototypes, [[1.0, np.exp(-2940.0)]])


def planted(rng, size, width, word_width, *, reflection=None, rank=None):
    """Words, prototypes v = c A w + b and the map; A^T A = I."""
    matrix = np.linalg.qr(rng.normal(size=(width, width)))[0][:, :word_width]
    if reflection is not None:
        sign = -1.0 if reflection else 1.0
        matrix[:, 0] *= sign * np.sign(np.linalg.det(matrix))
        assert np.sign(np.linalg.det(matrix)) == sign
    words = rng.normal(size=(size, rank or word_width)) * 3
    if rank:
        words = words @ rng.normal(size=(rank, word_width))
    words += rng.normal(size=word_width) * 5
    offset, scale = rng.normal(size=width) * 4, float(rng.uniform(0.05, 20))
    return words, scale * words @ matrix.T + offset, (scale, matrix, offset)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    word_width=st.integers(1, 6),
    wider=st.integers(0, 5),
    reflection=st.booleans(),
)
def test_procrustes_recovers_a_planted_map(seed, word_width, wider, reflection):
    rng = np.random.default_rng(seed)
    width = word_width + wider
    words, prototypes, (scale, matrix, offset) = planted(
        rng, 3 * word_width + 8, width, word_width, reflection=reflection if not wider else None
    )
    found = fit_procrustes(words, prototypes)
    assert found.rank == word_width
    np.testing.assert_allclose(found.matrix, matrix, atol=1e-10)
    np.testing.assert_allclose(found.matrix.T @ found.matrix, np.eye(word_width), atol=1e-12)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-11)
    queries = rng.normal(size=(7, word_width)) * 10
    expected = scale * queries @ matrix.T + offset
    bound = 1e-10 * np.abs(expected).max()
    np.testing.assert_allclose(apply_procrustes(found, queries), expected, atol=bound)


def test_procrustes_hand_worked():
    # A quarter turn to the left, twice as long, then a step of (10, 20).
    words = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    prototypes = np.array([[10.0, 22.0], [8.0, 20.0], [10.0, 18.0], [12.0, 20.0]])
    found = fit_procrustes(words, prototypes)
    np.testing.assert_allclose(found.matrix, [[0, -1], [1, 0]], atol=1e-15)
    np.testing.assert_allclose(found.scale, 2.0)
    np.testing.assert_allclose(apply_procrustes(found, np.array([[3.0, 4.0]])), [[2.0, 26.0]])


def test_procrustes_of_lower_rank_is_exact_where_the_words_differ():
    rng = np.random.default_rng(1)
    words, prototypes, (scale, matrix, offset) = planted(rng, 30, 8, 5, rank=3)
    found = fit_procrustes(words, prototypes)
    assert found.rank == 3
    np.testing.assert_allclose(found.scale, scale, rtol=1e-11)
    mixed = rng.dirichlet(np.ones(30), size=4) @ words  # in the span of the words
    expected = scale * mixed @ matrix.T + offset
    np.testing.assert_allclose(apply_procrustes(found, mixed), expected, rtol=1e-9, atol=1e-9)
    # What the words do not span is lost: only its projection counts.
    inside = np.linalg.svd(words - words.mean(0))[2][:3]
    query = rng.normal(size=(1, 5))
    projected = words.mean(0) + (query - words.mean(0)) @ inside.T @ inside
    np.testing.assert_allclose(
        apply_procrustes(found, query), scale * projected @ matrix.T + offset, rtol=1e-9, atol=1e-9
    )
    # Fewer words than the width: K - 1 directions.
    assert fit_procrustes(words[:3], prototypes[:3]).rank == 2


def test_procrustes_of_noisy_float32_data_is_the_least_squares_solution():
    rng = np.random.default_rng(2)
    words, prototypes, _ = planted(rng, 60, 7, 4)
    words = words.astype(np.float32)
    prototypes = (prototypes + rng.normal(size=prototypes.shape)).astype(np.float32)
    found = fit_procrustes(words, prototypes)
    # SciPy wants equal widths: zeros beside the words change nothing.
    centred = words.astype(np.float64) - words.mean(0, dtype=np.float64)
    target = prototypes.astype(np.float64) - prototypes.mean(0, dtype=np.float64)
    rotation, total = scipy.linalg.orthogonal_procrustes(np.pad(centred, ((0, 0), (0, 3))), target)
    np.testing.assert_allclose(found.matrix, rotation[:4].T, atol=1e-10)
    np.testing.assert_allclose(found.scale, total / np.square(centred).sum(), rtol=1e-12)

    def error(scale, matrix):
        return np.square(target - scale * centred @ matrix.T).sum()

    least = error(found.scale, found.matrix)
    for _ in range(50):
        skew = rng.normal(size=(7, 7))
        turn = scipy.linalg.expm(0.05 * (skew - skew.T))
        scale = found.scale * (1 + 0.02 * rng.normal())
        assert error(scale, turn @ found.matrix) > least


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda w, v: interpolate(w, v, w, top=0), "top=0 neighbours"),
        (lambda w, v: interpolate(w, v, w[:, :2]), "width 2, the knowledge of 3; read both from"),
        (lambda w, v: interpolate(w, v, w), "number 3 is zero"),
        (lambda w, v: interpolate(w, v, w / w), "number 3 is zero or not finite; drop the word"),
        (lambda w, v: fit_procrustes(w, v[:, :2]), "at least as wide as word vectors, not 2 < 3"),
        (lambda w, v: fit_procrustes(w[:1], v[:1]), "words whose vectors and prototypes differ"),
        (lambda w, v: fit_procrustes(0 * w + 0.1, v), "this knowledge has none"),
        (lambda w, v: fit_procrustes(w, 0 * v + 0.7), "this knowledge has none"),
        (lambda w, v: apply_procrustes(fit_procrustes(w, v), w[:, :1]), "have vectors of width 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_refusals(run, message):
    words = np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 7.0], [3.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
    with pytest.raises(UserError, match=message):
        run(words, np.random.default_rng(0).normal(size=(4, 5)))

"""SCAN and its attention: against torch, against built contexts, by hand, under padding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.models.matching.pairs import least_gap, padded, pairs, unit
from trm_jax.models.matching import attention
from trm_jax.models.matching.scan import SCALES, Scan
from trm_jax.types import UserError

KINDS = [(d, p) for d in ("t2i", "i2t") for p in ("mean", "lse")]


def _scores(direction, pooling, regions, words, mask):
    return Scan(direction, pooling).apply({}, regions, words, mask)


SCORES = jax.jit(_scores, static_argnums=(0, 1))


@pytest.mark.parity
@pytest.mark.parametrize("direction, pooling", KINDS)
def test_scores_match_torch(direction, pooling):
    import torch

    from tests.oracles import matching

    regions, words, mask = pairs((7, 3, 1, 6, 5, 2), images=5, regions=4, width=12)
    captions = matching.captions_of(words, mask)
    expected = matching.scan(
        torch.tensor(regions), captions, direction, pooling, *SCALES[direction]
    )
    found = SCORES(direction, pooling, regions, words, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def _with_contexts(regions, words):
    """t2i with mean pooling, contexts built and the softmax divided; no padding."""
    similarity = jnp.einsum("nrd,mtd->nmtr", regions, words)
    rectified = jnp.maximum(similarity, 0.1 * similarity)
    rectified = rectified / jnp.linalg.norm(rectified, axis=2, keepdims=True)
    contexts = jnp.einsum("nmtr,nrd->nmtd", jax.nn.softmax(9 * rectified, axis=-1), regions)
    products = (contexts * words[None]).sum(-1)
    return (products / jnp.linalg.norm(contexts, axis=-1)).mean(-1)


def test_values_and_gradients_are_those_of_built_contexts():
    regions, words, mask = pairs((4,) * 5, images=3, regions=6, width=8, dtype=np.float64)
    weights = np.random.default_rng(1).normal(size=(3, 5))

    def of(scores):
        return jax.jit(jax.value_and_grad(lambda v, w: (scores(v, w) * weights).sum(), (0, 1)))

    with jax.enable_x64(True):
        arrays = jnp.asarray(regions), jnp.asarray(words)
        found = of(lambda v, w: _scores("t2i", "mean", v, w, mask))(*arrays)
        expected = of(_with_contexts)(*arrays)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-12)
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("direction, pooling", [KINDS[1], KINDS[2]])
def test_gradients_by_finite_differences(direction, pooling):
    regions, words, mask = pairs((3, 2), images=2, regions=3, width=4, seed=3, dtype=np.float64)
    assert least_gap(regions, words, mask) > 1e-3
    with jax.enable_x64(True):
        check_grads(
            jax.jit(lambda v, w: _scores(direction, pooling, v, w, mask)),
            (jnp.asarray(regions), jnp.asarray(words)),
            order=1,
            modes=("rev",),
        )


def test_one_word_and_two_regions_by_hand():
    # Similarities 0.6 and -0.8, rectified 0.6 and -0.08, over a single word normalised to +-1.
    regions = np.array([[[0.6, 0.8], [-0.8, 0.6]]], np.float32)
    words, mask = np.array([[[1.0, 0.0]]], np.float32), np.ones((1, 1), bool)
    a = 1 / (1 + math.exp(-18))  # softmax of (9, -9)
    context = a * regions[0, 0] + (1 - a) * regions[0, 1]
    expected = context[0] / np.linalg.norm(context)
    np.testing.assert_allclose(SCORES("t2i", "mean", regions, words, mask), expected, rtol=1e-6)
    # A single word is all that regions can see: their cosines with it are 0.6 and -0.8.
    expected = math.log(math.exp(3) + math.exp(-4)) / 5
    np.testing.assert_allclose(SCORES("i2t", "lse", regions, words, mask), expected, rtol=1e-6)
    np.testing.assert_allclose(SCORES("i2t", "mean", regions, words, mask), -0.1, rtol=1e-5)


@pytest.mark.parametrize("direction, pooling", KINDS)
def test_padding_and_blocks_change_nothing(direction, pooling):
    regions, words, mask = pairs((4, 2, 3), images=3, regions=4, width=6)
    scores = SCORES(direction, pooling, regions, words, mask)
    more = SCORES(direction, pooling, regions, *padded(words, mask))
    np.testing.assert_allclose(more, scores, atol=1e-6)
    block = SCORES(direction, pooling, regions[1:], words[:1], mask[:1])
    np.testing.assert_allclose(block, scores[1:, :1], atol=1e-6)
    alone = SCORES(direction, pooling, regions, words[1:2, :2], mask[1:2, :2])
    np.testing.assert_allclose(alone, scores[:, 1:2], atol=1e-6)


@pytest.mark.parametrize("direction, pooling", KINDS)
def test_captions_without_words_and_images_of_zeros(direction, pooling):
    regions, words, mask = pairs((4, 0, 3), images=3, regions=4, width=6)
    regions[1] = 0.0
    words[2, 1] = 0.0  # a real word that is zero

    def total(regions, words):
        scores = _scores(direction, pooling, regions, words, mask)
        return (scores**2).sum() + scores.sum(), scores

    function = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, scores), gradients = function(regions, words)
    np.testing.assert_array_equal(scores[:, 1], 0.0)
    assert np.isfinite(scores).all() and np.abs(scores[0, 0]) > 1e-3
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradients[1][~mask], 0.0)


def test_a_context_that_nearly_cancels_out_makes_no_cosine_beyond_one():
    rng = np.random.default_rng(0)
    regions = unit(rng.normal(size=(40, 9, 4)))
    # Weights that make almost nothing of the regions: as little as their squared norm's rounding.
    weights = np.linalg.svd(regions.swapaxes(1, 2))[2][:, -1]
    weights = weights / np.abs(weights).max(axis=1, keepdims=True)
    weights = weights + 1e-5 * rng.normal(size=weights.shape)
    regions = jnp.asarray(regions, jnp.float32)
    words = jnp.asarray(unit(rng.normal(size=(20, 3, 4))), jnp.float32)
    similarity = attention.similarities(regions, attention.columns(words))
    weights = jnp.broadcast_to(jnp.float32(weights)[..., None, None], similarity.shape)
    gram = attention.gram(regions)
    assert attention.squared_norms(weights, gram).min() < 0.0
    cosines = attention.attended_cosine(weights, similarity, gram)
    assert 0.0 < np.abs(cosines).max() <= 1.0


def test_attention_is_a_softmax_over_what_may_be_seen():
    regions, words, mask = pairs((4, 2, 3), images=2, regions=5, width=6)
    # Words as the context of regions, so that some of it is padding.
    similarity = np.asarray(attention.similarities(words, attention.columns(regions)))
    weights = np.asarray(attention.attention(similarity, 30.0, mask))
    x = np.where(similarity > 0, similarity, 0.1 * similarity)
    x = x[mask] / np.linalg.norm(x[mask], axis=1, keepdims=True)
    expected = np.zeros_like(weights)
    expected[mask] = np.exp(30.0 * x)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights / weights.sum(axis=1, keepdims=True), expected, atol=1e-6)
    np.testing.assert_allclose(weights.max(axis=1), 1.0)


def test_matched_attention_is_the_diagonal_of_all_pairs():
    regions, words, mask = pairs((4, 0, 3), images=3, regions=5, width=6)
    weights, contexts = attention.matched_attention(regions, *padded(words, mask, extra=0))
    similarity = attention.similarities(regions, attention.columns(words))
    unnormalised = attention.attention(similarity, 9.0)
    own = np.einsum("nrtn->ntr", np.asarray(unnormalised))
    np.testing.assert_allclose(
        weights, (own / own.sum(-1, keepdims=True)) * mask[..., None], atol=1e-6
    )
    expected = np.einsum("ntr,nrd->ntd", weights, regions)
    np.testing.assert_allclose(contexts[mask], unit(expected[mask]), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(contexts)[~mask], 0.0)
    np.testing.assert_allclose(weights.sum(-1), mask, atol=1e-6)
    cosines = (np.asarray(contexts) * words).sum(-1)
    scores = SCORES("t2i", "mean", regions, words, mask)
    expected = cosines.sum(1) / np.maximum(mask.sum(1), 1)
    np.testing.assert_allclose(np.diag(scores), expected, atol=1e-5)


def test_unknown_names_are_refused():
    regions, words, mask = pairs((2,), images=1, regions=2, width=3)
    with pytest.raises(UserError, match="scorer.direction = 'both' must be one of t2i, i2t"):
        _scores("both", "mean", regions, words, mask)
    with pytest.raises(UserError, match="scorer.pooling = 'max' must be one of mean, lse"):
        _scores("t2i", "max", regions, words, mask)

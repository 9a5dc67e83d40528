"""MASK's losses against loops in float64, finite differences, and appendix F on real networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.oracles import knowledge as oracle
from tests.oracles.random_variables import random_module
from trm_jax.losses.knowledge import (
    at_samples,
    cross_modal_loss,
    prototype_contrastive_loss,
    reconstruction_loss,
    region_numbers,
    total_loss,
)
from trm_jax.models import knowledge

# Regions 0 and 3 carry two words each; words 7 and 2 occur in several regions; 4 and 9 are padding
# that looks like a sample of region 0.
WORD = np.array([7, 2, 7, 5, 7, 2, 7, 8, 2, 5])
REGION = np.array([0, 0, 1, 2, 0, 3, 3, 4, 5, 0])
WHERE = np.array([1, 1, 1, 1, 0, 1, 1, 1, 1, 0], bool)
S, N, Z = 10, 4, 5
REGIONS = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
NEGATIVES = ("others", "unlabelled", "all")


def _samples():
    """(w', w, mu, prototypes) of any length, float64."""
    rng = np.random.default_rng(0)
    return [3 * rng.normal(size=(S, width)) for width in (N, N, Z, Z)]


def _regions():
    """(mu, sigma, reconstruction, features), float64."""
    rng = np.random.default_rng(1)
    mu, sigma = rng.normal(size=(2, *REGIONS.shape, Z))
    return [mu, np.abs(sigma) + 0.1, *rng.normal(size=(2, *REGIONS.shape, 6))]


def _losses(regions, samples, where, region_where):
    """The total, and all its parts."""
    mu, sigma, back, features = regions
    mapped, words, sample_mu, prototypes = samples
    parts = reconstruction_loss(mu, sigma, back, features, where=region_where)
    parts += cross_modal_loss(mapped, words, sample_mu, where=where)
    ids = jnp.asarray(WORD), jnp.asarray(REGION)
    parts += (prototype_contrastive_loss(sample_mu, prototypes, *ids, where=where),)
    return total_loss(*parts, regions=region_where, samples=where), parts


RUN = jax.jit(jax.value_and_grad(_losses, argnums=(0, 1), has_aux=True))


def _float32(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def test_all_losses_equal_the_oracle_and_finite_differences():
    regions, samples = _regions(), _samples()
    mapped, words, mu, prototypes = samples
    expected = (
        *oracle.reconstruction(*regions, REGIONS),
        *oracle.cross_modal(mapped, words, mu, WHERE),
        oracle.contrastive(mu, prototypes, WORD, REGION, WHERE),
    )
    assert (expected[4][WHERE] > 0.01).all()
    kl, error, first, second, contrast = expected
    wanted = (kl + error)[REGIONS].mean()
    wanted += 3 * (first[WHERE].mean() + second) + 3 * contrast[WHERE].mean()
    with jax.enable_x64(True):
        regions, samples = ([jnp.asarray(x) for x in group] for group in (regions, samples))
        where = jnp.asarray(WHERE), jnp.asarray(REGIONS)
        (total, parts), _ = RUN(regions, samples, *where)
        for actual, value in zip(parts, expected, strict=True):
            np.testing.assert_allclose(actual, value, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(total, wanted, rtol=1e-9)
        # The prototypes are constants, so they are no argument here.
        run = jax.jit(lambda r, s: _losses(r, [*s, samples[3]], *where)[0])
        check_grads(run, (regions, samples[:3]), order=1, modes=("rev",))


def test_weights_of_the_total():
    kl, error, contrast = jnp.array([[1.0, 9.0]]), jnp.array([[2.0, 9.0]]), jnp.array([5.0, 7.0])
    first, second = jnp.array([0.5, 1.5]), jnp.array(0.25)
    total = total_loss(kl, error, first, second, contrast, regions=jnp.array([[True, False]]))
    assert total == 3 + 3 * (1 + 0.25) + 3 * 6
    weights = {"cross_modal_weight": 1.0, "contrastive_weight": 5.0}
    total = total_loss(kl, error, first, second, contrast, **weights)
    assert total == 10.5 + 1.25 + 30
    none = {"regions": jnp.zeros((1, 2), bool), "samples": jnp.zeros(2, bool)}
    assert total_loss(kl, error, first, second * 0, contrast, **none) == 0


def test_kl_and_error_by_hand():
    mu, sigma = jnp.array([[[0.0, 2.0], [0.0, 0.0]]]), jnp.array([[[1.0, 0.5], [1.0, 1.0]]])
    back, features = jnp.array([[[3.0, 4.0, 0.0], [1.0, 1.0, 1.0]]]), jnp.zeros((1, 2, 3))
    kl, error = reconstruction_loss(mu, sigma, back, features)
    np.testing.assert_allclose(kl, [[0.5 * (4 + 0.25 - 1 + 2 * np.log(2)), 0.0]], rtol=1e-6)
    np.testing.assert_allclose(error, [[25.0, 3.0]])
    # 2,048 squares of 10 leave the range of float16.
    half = jnp.full((1, 1, 2048), 10, jnp.float16)
    _, error = reconstruction_loss(mu[:, :1], sigma[:, :1], half, half * 0)
    np.testing.assert_allclose(error, [[204_800.0]])


def test_an_isometry_onto_the_words_has_no_cross_modal_loss():
    rng = np.random.default_rng(2)
    mu = rng.normal(size=(6, 3))
    turn, _ = np.linalg.qr(rng.normal(size=(8, 3)))
    mapped = mu @ turn.T * rng.uniform(0.1, 9, (6, 1))
    words = mapped * rng.uniform(0.1, 9, (6, 1))
    first, second = cross_modal_loss(*_float32((mapped, words, mu)))
    np.testing.assert_allclose(first, 0, atol=1e-6)
    np.testing.assert_allclose(second, 0, atol=1e-10)
    # Two samples: w' at 60 degrees, mu at a right angle, words opposite and at a right angle.
    half = [[1.0, 0.0], [0.5, 0.75**0.5]]
    first, second = cross_modal_loss(*_float32((half, [[-2, 0], [-(0.75**0.5), 0.5]], np.eye(2))))
    np.testing.assert_allclose(first, [2, 1], atol=1e-6)
    np.testing.assert_allclose(second, 0.25, rtol=1e-6)
    # A sample is no pair with itself, where a zero vector's cosine is 0 and not 1.
    _, second = cross_modal_loss(*_float32((np.eye(2), np.eye(2), np.zeros((2, 3)))))
    assert second == 0


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_each_anchor_sees_the_samples_it_should(negatives):
    _, _, mu, prototypes = _samples()
    ids = jnp.asarray(WORD), jnp.asarray(REGION)
    with jax.enable_x64(True):

        @jax.jit
        def run(mu, prototypes):
            values = prototype_contrastive_loss(
                mu, prototypes, *ids, negatives=negatives, temperature=0.5, where=jnp.asarray(WHERE)
            )
            return values, values

        gradient, values = jax.jit(jax.jacrev(run, has_aux=True))(
            jnp.asarray(mu), jnp.asarray(prototypes)
        )
    expected = oracle.contrastive(mu, prototypes, WORD, REGION, WHERE, 0.5, negatives)
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    seen = np.zeros((S, S), bool)
    for k in np.flatnonzero(WHERE):
        seen[k, [k, *oracle.negatives_of(k, WORD, REGION, WHERE, negatives)]] = True
    np.testing.assert_array_equal((np.asarray(gradient) != 0).any(-1), seen)
    # Sample 0 (word 7 of region 0) and sample 5 (word 2 of region 3, which carries 7 as well).
    assert seen[0, 5] == (negatives != "unlabelled")
    assert seen[0, 3] and seen[0, 1] == seen[0, 2] == (negatives == "all")


def test_contrast_by_hand_and_what_is_refused():
    eye = jnp.eye(2)
    word = jnp.arange(2)
    values = prototype_contrastive_loss(4 * eye, 9 * eye, word, word)
    np.testing.assert_allclose(values, np.log1p(np.exp(-1 / 0.07)), rtol=1e-4)
    for same in ((word * 0, word), (word, word * 0)):
        np.testing.assert_array_equal(prototype_contrastive_loss(eye, eye, *same), 0)
    # A word without a prototype yet: nothing but the number of candidates.
    values = prototype_contrastive_loss(eye, 0 * eye, word, word)
    np.testing.assert_allclose(values, np.log(2), rtol=1e-6)
    with pytest.raises(ValueError, match="choose others, unlabelled or all"):
        prototype_contrastive_loss(eye, eye, word, word, negatives="both")


def test_prototypes_are_constants_unless_they_are_learnt():
    _, _, mu, prototypes = _float32(_samples())
    ids = jnp.asarray(WORD), jnp.asarray(REGION)

    def loss(prototypes, stop):
        return prototype_contrastive_loss(mu, prototypes, *ids, stop_prototypes=stop).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_array_equal(gradient(prototypes, True), 0)
    assert (gradient(prototypes, False) != 0).any(-1).all()


def test_masked_equals_sliced_even_with_nan_padding():
    regions, samples = _float32(_regions()), _float32(_samples())
    masks = jnp.asarray(WHERE), jnp.asarray(REGIONS)
    (total, parts), gradients = RUN(regions, samples, *masks)
    padded = [jnp.where(REGIONS[..., None], x, jnp.nan) for x in regions]
    filled = [jnp.where(WHERE[:, None], x, jnp.nan) for x in samples]
    (with_nan, _), of_nan = RUN(padded, filled, *masks)
    assert with_nan == total
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(of_nan), strict=True):
        np.testing.assert_array_equal(a, b)
    kl, error, first, _, contrast = (np.asarray(x) for x in parts)
    for values, mask in ((kl, REGIONS), (error, REGIONS), (first, WHERE), (contrast, WHERE)):
        np.testing.assert_array_equal(values[~mask], 0)
    for group, mask in zip(of_nan, (REGIONS, WHERE), strict=True):
        for gradient in group:
            np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)
    kept = [x[WHERE] for x in samples]
    alone, second = cross_modal_loss(*kept[:3])
    np.testing.assert_allclose(first[WHERE], alone, rtol=1e-5)
    np.testing.assert_allclose(parts[3], second, rtol=1e-5)
    ids = jnp.asarray(WORD[WHERE]), jnp.asarray(REGION[WHERE])
    sliced = prototype_contrastive_loss(*kept[2:], *ids)
    np.testing.assert_allclose(contrast[WHERE], sliced, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("counted", [True, False])
def test_zero_vectors_and_empty_batches_stay_finite(counted):
    regions, samples = ([x * 0 for x in _float32(g)] for g in (_regions(), _samples()))
    masks = jnp.full(S, counted), jnp.full(REGIONS.shape, counted)
    (total, parts), gradients = RUN(regions, samples, *masks)
    for leaf in jax.tree.leaves((total, gradients)):
        assert np.isfinite(leaf).all()
    if not counted:
        assert total == 0
        for leaf in jax.tree.leaves(gradients):
            np.testing.assert_array_equal(leaf, 0)
        return
    # The cosine of nothing is 0, and sigma = 0 counts as 1e-12.
    np.testing.assert_allclose(parts[0], Z * (12 * np.log(10) - 0.5), rtol=1e-5)
    np.testing.assert_array_equal(parts[2], 1)
    assert parts[1].sum() == parts[3] == 0
    everywhere = np.ones(S, bool)
    others = [oracle.negatives_of(k, WORD, REGION, everywhere, "others") for k in range(S)]
    candidates = [1 + len(found) for found in others]
    np.testing.assert_allclose(parts[4], np.log(candidates), rtol=1e-5)


def test_appendix_f_the_second_term_needs_the_predicted_words():
    model = knowledge.build({"features": 6, "word_width": N, "width": 8})
    rng = np.random.default_rng(3)
    features, noise, words = (
        rng.normal(size=size).astype(np.float32) for size in ((3, 4, 6), (3, 4, 8), (9, N))
    )
    mask = np.ones((3, 4), bool)
    params = random_module(model, features, mask, noise)["params"]
    sample_region = jnp.array([[0, 1, 3], [2, -1, 2], [0, 1, 2]])
    where = sample_region.reshape(-1) >= 0

    @jax.jit
    @jax.grad
    def gradient(params, weights):
        codes = model.apply({"params": params}, features, mask, noise)
        mu, mapped = (at_samples(x, sample_region) for x in (codes.mu, codes.words))
        first, second = cross_modal_loss(mapped, jnp.asarray(words), mu, where=where)
        _, without = cross_modal_loss(jnp.asarray(words), jnp.asarray(words), mu, where=where)
        return weights @ jnp.stack([first.sum(), second, without])

    of_first, of_second, of_without = (gradient(params, row) for row in jnp.eye(3))
    for found in (of_first, of_second, of_without):
        assert _largest(found["encoder"]) > 1e-3  # h
        assert _largest(found["reconstructor"]) == 0
    # Every layer of f, by both terms of Eq. 9; with w in place of w' none (Eq. 71 and 74).
    for name in params["mapper"]:
        assert _largest(of_first["mapper"][name]) > 1e-3, name
        assert _largest(of_second["mapper"][name]) > 1e-3, name
    assert _largest(of_without["mapper"]) == 0


def _largest(tree):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


def test_samples_find_their_regions():
    values = np.random.default_rng(4).normal(size=(3, 4, 2)).astype(np.float32)
    sample_region = np.array([[3, 0, 3], [-1, 1, -1], [2, 2, 0]])
    found = at_samples(jnp.asarray(values), jnp.asarray(sample_region))
    numbers = region_numbers(jnp.asarray(sample_region), 4)
    for s, (row, slot) in enumerate(np.ndindex(3, 3)):
        region = sample_region[row, slot]
        np.testing.assert_array_equal(found[s], values[row, region] if region >= 0 else [0, 0])
        assert numbers[s] == (4 * row + region if region >= 0 else -1)


def test_same_on_any_number_of_devices(shard):
    rng = np.random.default_rng(5)
    mapped, words, mu, prototypes = _float32(rng.normal(size=(16, w)) for w in (N, N, Z, Z))
    ids = jnp.asarray(rng.integers(0, 4, 16)), jnp.asarray(rng.integers(0, 9, 16))
    where = jnp.arange(16) < 13

    @jax.jit
    def run(mapped, mu, word, region, where, words, prototypes):
        def loss(mapped, mu):
            first, second = cross_modal_loss(mapped, words, mu, where=where)
            contrasts = [
                prototype_contrastive_loss(
                    mu, prototypes, word, region, negatives=negatives, where=where
                )
                for negatives in NEGATIVES
            ]
            return first.mean() + second + sum(x.mean() for x in contrasts)

        return jax.value_and_grad(loss, argnums=(0, 1))(mapped, mu)

    arguments = mapped, mu, *ids, where, words, prototypes
    one, many = run(*arguments), run(*shard(*arguments))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)

"""The loss of fine-tuning against loops in float64, finite differences and cases by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from tests.oracles import domain_matching as oracle
from trm_jax.losses.domain_matching import cycle_consistency_loss

N_WORDS, N_REGIONS, Z = 5, 7, 3
WORDS = np.array([1, 0, 1, 1, 0], bool)
REGIONS = np.array([0, 1, 1, 1, 0, 1, 1], bool)


def _sides():
    """(W, u, mu), float64; u and mu of any length, W far from the identity."""
    rng = np.random.default_rng(0)
    words, regions = 4 * rng.normal(size=(N_WORDS, Z)), 0.3 * rng.normal(size=(N_REGIONS, Z))
    return np.eye(Z) + rng.normal(size=(Z, Z)), words, regions


def _both(transform, words, regions, words_where=None, regions_where=None):
    where = {"words_where": words_where, "regions_where": regions_where}
    return cycle_consistency_loss(transform, words, regions, **where)


RUN = jax.jit(_both)
ALL = np.ones(N_WORDS, bool), np.ones(N_REGIONS, bool)


def _float32():
    return [x.astype(np.float32) for x in _sides()]


def test_it_equals_the_oracle_and_finite_differences():
    transform, words, regions = _sides()
    expected = np.zeros(N_WORDS), np.zeros(N_REGIONS)
    kept = oracle.cycle_consistency(transform, words[WORDS], regions[REGIONS])
    expected[0][WORDS], expected[1][REGIONS] = kept
    assert min(map(np.min, kept)) > 0.001
    with jax.enable_x64(True):
        where = jnp.asarray(WORDS), jnp.asarray(REGIONS)
        sides = [jnp.asarray(x) for x in (transform, words, regions)]
        for actual, value in zip(RUN(*sides, *where), expected, strict=True):
            np.testing.assert_allclose(actual, value, rtol=1e-9)
        for actual, value in zip(
            RUN(*sides), oracle.cycle_consistency(transform, words, regions), strict=True
        ):
            np.testing.assert_allclose(actual, value, rtol=1e-9)

        def total(*sides):
            return sum(side.sum() for side in _both(*sides, *where))

        check_grads(jax.jit(total), sides, order=1, modes=("rev",))


def test_what_does_not_count_reaches_nothing():
    transform, words, regions = _float32()

    @jax.jit
    def run(transform, words, regions, words_where, regions_where):
        def total(*sides):
            terms = _both(*sides, words_where, regions_where)
            return sum(side.sum() for side in terms), terms

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(transform, words, regions)

    clean = run(transform, words, regions, WORDS, REGIONS)
    (_, (of_words, of_regions)), gradients = clean
    assert not of_words[~WORDS].any() and not of_regions[~REGIONS].any()
    assert not gradients[1][~WORDS].any() and not gradients[2][~REGIONS].any()
    assert all(gradient.any() for gradient in gradients)
    for junk in (np.nan, np.inf, 1e30):
        words[~WORDS] = regions[~REGIONS] = junk
        spoilt = run(transform, words, regions, WORDS, REGIONS)
        jax.tree.map(np.testing.assert_array_equal, spoilt, clean)
    # Without words or without regions there is nothing to be made of, and nothing breaks.
    ((total, _), gradients) = run(transform, words, regions, ~ALL[0], ~ALL[1])
    assert total == 0 and not any(np.asarray(gradient).any() for gradient in gradients)
    for pair in ((~ALL[0], REGIONS), (WORDS, ~ALL[1])):
        values = run(transform, words * 0, regions, *pair)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values))


def test_two_words_and_two_regions_by_hand():
    # W = c I and the same two axes on both sides: S is c^2 on the diagonal and 0 off it, so each
    # reconstruction has c / (1 + exp(-c^2)) of its own axis and c / (1 + exp(c^2)) of the other.
    square = 3.0
    share = 1 / (1 + np.exp(-square))
    value = np.log1p(np.exp(-square * (2 * share - 1)))
    _, words, regions = _float32()
    words[:2], regions[:2] = [[2, 0, 0], [0, 9, 0]], [[0.5, 0, 0], [0, 1, 0]]
    first_two = np.arange(N_WORDS) < 2, np.arange(N_REGIONS) < 2
    for terms in RUN(np.eye(Z, dtype=np.float32) * square**0.5, words, regions, *first_two):
        np.testing.assert_allclose(terms[:2], [value, value], rtol=1e-6)
    # With W = 0 every answer is as likely, of five words and of seven regions.
    of_words, of_regions = RUN(np.zeros((Z, Z), np.float32), words, regions, *ALL)
    np.testing.assert_allclose(of_words, np.log(5), rtol=1e-6)
    np.testing.assert_allclose(of_regions, np.log(7), rtol=1e-6)


def test_neither_lengths_of_the_sides_nor_turns_by_w_matter():
    transform, words, regions = _float32()
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(Z, Z)))
    other = words * np.arange(1, 6, dtype=np.float32)[:, None], regions * 7
    turned = RUN((transform @ turn).astype(np.float32), *other, *ALL)
    for actual, value in zip(turned, RUN(transform, words, regions, *ALL), strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-4)
    # Logits beyond the range of exp.
    for terms in RUN(transform * 100, words, regions, *ALL):
        assert np.isfinite(terms).all()


def test_same_on_any_number_of_devices(shard):
    rng = np.random.default_rng(2)
    words, regions = (jnp.asarray(rng.normal(size=(n, 4)), jnp.float32) for n in (8, 16))
    where = jnp.arange(8) < 6, jnp.arange(16) < 13

    @jax.jit
    def run(words, regions, *where):
        def total(matrix):
            return sum(side.sum() for side in _both(matrix, words, regions, *where))

        return jax.value_and_grad(total)(2 * jnp.eye(4))

    one, many = run(words, regions, *where), run(*shard(words, regions, *where))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)

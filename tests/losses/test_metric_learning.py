"""Triplet, Multi-Similarity and polynomial loss against loops over anchors and candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from trm_jax.losses.metric_learning import (
    log1p_sum_exp,
    multi_similarity_loss,
    polynomial_loss,
    triplet_loss,
)

IDS = np.array([0, 1, 1, 2, 3, 0, 4, 5])  # images 0 and 1 come with two captions each
SAME = IDS[:, None] == IDS[None]
WHERE = np.array([True, True, True, False, True, True, False, True])


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    scores = rng.normal(0.2, 0.25, (8, 8)) + 0.3 * SAME
    scores[3, 3] = 0.98  # a pair that is told apart
    return np.clip(scores, -1, 1)


def all_losses(scores, same_image, where=None):
    """Values [n] of every loss under test, in one program."""
    return {
        "mean": triplet_loss(scores, hardest=0.0, same_image=same_image, where=where),
        "blend": triplet_loss(scores, hardest=0.3, same_image=same_image, where=where),
        "hardest": triplet_loss(scores, same_image=same_image, where=where),
        "multi_similarity": multi_similarity_loss(scores, same_image, where=where),
        "polynomial": polynomial_loss(scores, same_image=same_image, where=where),
    }


def total(scores, same_image, where=None):
    """(The sum of all values, the values themselves)."""
    values = all_losses(scores, same_image, where)
    return sum(v.sum() for v in values.values()), values


# One program for most tests: a batch of other size is filled up to 8.
EVALUATE = jax.jit(jax.value_and_grad(total, has_aux=True))


def evaluate(scores, same, where=None):
    """(Values [n] by name, gradient [n, n]) of n <= 8 pairs in float32, with junk for padding."""
    n = len(scores)
    room = [(0, 8 - n)] * 2
    where = np.pad(np.ones(n, bool) if where is None else where, room[:1])
    (_, values), gradient = EVALUATE(
        jnp.asarray(np.pad(scores, room, constant_values=np.nan), jnp.float32),
        jnp.asarray(np.pad(same, room, constant_values=True)),
        jnp.asarray(where),
    )
    gradient = np.asarray(gradient)
    np.testing.assert_array_equal(gradient[~(where[:, None] & where)], 0.0)
    for name, v in values.items():
        np.testing.assert_array_equal(np.asarray(v)[~where], 0.0, err_msg=name)
    return {name: np.asarray(v)[:n] for name, v in values.items()}, gradient[:n, :n]


def both_directions(anchor, scores, same):
    """Sum of `anchor(i, row, same_row)` over a pair's row and its column."""
    return np.array(
        [
            anchor(i, scores[i], same[i]) + anchor(i, scores[:, i], same[:, i])
            for i in range(len(same))
        ]
    )


def triplet_oracle(scores, same, hardest, margin=0.2):
    def anchor(i, row, same_row):
        violations = [
            max(0.0, margin + s - row[i]) for s, own in zip(row, same_row, strict=True) if not own
        ]
        if not violations:
            return 0.0
        return (1 - hardest) * np.mean(violations) + hardest * max(violations)

    return both_directions(anchor, scores, same)


def multi_similarity_oracle(scores, same, alpha=2.0, beta=40.0, base=0.5, margin=0.1):
    def anchor(_, row, same_row):
        positives, negatives = row[same_row], row[~same_row]
        if not negatives.size:
            return 0.0
        kept_negatives = [s for s in negatives if s + margin > positives.min()]
        kept_positives = [s for s in positives if s - margin < negatives.max()]
        if not kept_negatives or not kept_positives:
            return 0.0
        pull = np.log(1 + sum(np.exp(-alpha * (s - base)) for s in kept_positives)) / alpha
        push = np.log(1 + sum(np.exp(beta * (s - base)) for s in kept_negatives)) / beta
        return pull + push

    return both_directions(anchor, scores, same)


def polynomial_oracle(scores, same, margin=0.2):
    def anchor(i, row, same_row):
        negatives = row[~same_row]
        if not negatives.size or negatives.max() + margin <= row[i]:
            return 0.0
        own, worst = row[i], negatives.max()
        return max(0.0, 0.2 * own**2 - 0.7 * own + 0.5) + max(
            0.0, 0.9 * worst**2 - 0.4 * worst + 0.03
        )

    return both_directions(anchor, scores, same)


def test_values_and_gradients_equal_the_loops(scores):
    expected = {
        "mean": triplet_oracle(scores, SAME, 0.0),
        "blend": triplet_oracle(scores, SAME, 0.3),
        "hardest": triplet_oracle(scores, SAME, 1.0),
        "multi_similarity": multi_similarity_oracle(scores, SAME),
        "polynomial": polynomial_oracle(scores, SAME),
    }
    # The scene has anchors on both sides of every condition.
    assert all((values > 0).any() for values in expected.values())
    assert (multi_similarity_oracle(scores, SAME, margin=9.0) != expected["multi_similarity"]).any()
    assert (polynomial_oracle(scores, SAME, margin=9.0) != expected["polynomial"]).any()
    with jax.enable_x64(True):
        run = jax.jit(all_losses)
        same = jnp.asarray(SAME)
        actual = run(jnp.asarray(scores), same)
        for name, values in expected.items():
            np.testing.assert_allclose(actual[name], values, rtol=1e-9, atol=1e-12, err_msg=name)
        # Weights of their own let no two losses' errors cancel.
        weights = dict(zip(expected, np.random.default_rng(1).normal(size=(5, 8)), strict=True))

        def weighted(s):
            return sum((run(s, same)[name] * weights[name]).sum() for name in weights)

        check_grads(weighted, (jnp.asarray(scores),), order=1, modes=("rev",), eps=1e-6)


def test_settings_reach_the_formulas(scores):
    @jax.jit
    def run(s, same):
        return (
            triplet_loss(s, margin=0.4, same_image=same),
            multi_similarity_loss(s, same, alpha=3.0, beta=9.0, base=0.3, mining_margin=0.3),
            polynomial_loss(s, positive=(-1.0, 3.0), negative=(0.25,), margin=9.0),
        )

    expected = (
        triplet_oracle(scores, SAME, 1.0, 0.4),
        multi_similarity_oracle(scores, SAME, 3.0, 9.0, 0.3, 0.3),
        2 * (3.25 - np.diag(scores)),  # a line for the own score, a constant for the negative
    )
    for actual, values in zip(
        run(jnp.asarray(scores, jnp.float32), jnp.asarray(SAME)), expected, strict=True
    ):
        np.testing.assert_allclose(actual, values, rtol=1e-5)


def test_without_ids_only_the_diagonal_is_masked_and_vse_follows(scores):
    own = np.eye(8, dtype=bool)
    run = jax.jit(
        lambda s: (triplet_loss(s, hardest=0.0), triplet_loss(s, hardest=1.0), polynomial_loss(s))
    )
    mean, hardest, polynomial = run(jnp.asarray(scores, jnp.float32))
    violations = np.where(own, 0.0, np.maximum(0.2 + scores - np.diag(scores)[:, None], 0.0))
    turned = np.where(own, 0.0, np.maximum(0.2 + scores - np.diag(scores)[None], 0.0))
    # VSE++'s two losses: sum of hinges, and sum of the largest of each row and column.
    np.testing.assert_allclose(7 * mean.sum(), violations.sum() + turned.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        hardest.sum(), violations.max(1).sum() + turned.max(0).sum(), rtol=1e-5
    )
    assert (mean <= hardest).all()
    np.testing.assert_allclose(polynomial, polynomial_oracle(scores, own), rtol=1e-5)


def test_warm_up_is_traced_and_takes_bools(scores):
    array = jnp.asarray(scores, jnp.float32)
    run = jax.jit(lambda w: triplet_loss(array, hardest=w))
    mean, hardest = run(jnp.asarray(0.0)), run(jnp.asarray(1.0))
    np.testing.assert_allclose(run(jnp.asarray(0.25)), 0.75 * mean + 0.25 * hardest, rtol=1e-6)
    np.testing.assert_allclose(run(jnp.asarray(False)), mean, rtol=1e-6)
    np.testing.assert_allclose(run(True), hardest, rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda s: triplet_loss(s, hardest=False))(array), mean, rtol=1e-6
    )


def test_hand_worked():
    # Rows: 0.8 against 0.3, 0.5 against 0.7; columns: 0.8 against 0.7, 0.5 against 0.3.
    own = jnp.eye(2, dtype=bool)
    triplet, multi_similarity, polynomial = jax.jit(
        lambda s: (
            triplet_loss(s),
            multi_similarity_loss(s, own, mining_margin=0.05),
            polynomial_loss(s, margin=0.19),
        )
    )(jnp.array([[0.8, 0.3], [0.7, 0.5]]))
    np.testing.assert_allclose(triplet, [0.0 + 0.1, 0.4 + 0.0], atol=1e-6)
    # Multi-Similarity keeps row 1 only: elsewhere the positive leads by more than 0.05.
    pull = np.log1p(np.exp(-2 * (0.5 - 0.5))) / 2
    push = np.log1p(np.exp(40 * (0.7 - 0.5))) / 40
    np.testing.assert_allclose(multi_similarity, [0.0, pull + push], atol=1e-6)
    # Poly: 0.9 x^2 - 0.4 x + 0.03 is 0.191 at 0.7; 0.2 x^2 - 0.7 x + 0.5 is 0.068 at 0.8 and 0.2
    # at 0.5. Row 1 and column 0 are within 0.19.
    np.testing.assert_allclose(polynomial, [0.068 + 0.191, 0.2 + 0.191], atol=1e-6)


def test_mining_is_strict_at_its_borders():
    # Row 0 has a positive and a negative right on a border beside others within, row 2 its hardest
    # negative; scores and margin are exact in binary.
    scores = np.array(
        [
            [0.5, 0.75, 0.25, 0.5],
            [0.75, 1.0, 0.5, 0.75],
            [0.25, 0.5, 0.75, 0.5],
            [0.5, 0.25, 0.5, 1],
        ]
    )
    ids = np.array([0, 0, 1, 2])
    same = ids[:, None] == ids[None]
    run = jax.jit(
        lambda s, same: (
            multi_similarity_loss(s, same, mining_margin=0.25),
            polynomial_loss(s, margin=0.25, same_image=same),
        )
    )
    multi_similarity, polynomial = run(jnp.asarray(scores, jnp.float32), jnp.asarray(same))
    expected = multi_similarity_oracle(scores, same, margin=0.25)
    np.testing.assert_allclose(multi_similarity, expected, rtol=1e-5)
    np.testing.assert_allclose(polynomial, polynomial_oracle(scores, same, 0.25), rtol=1e-5)


def test_collapse_costs_twice_the_margin_per_pair():
    # All pairs score alike: the plateau at which hardest negatives get stuck, and where the
    # gradient still pulls the own score up and pushes the tied negatives down evenly.
    run = jax.jit(jax.value_and_grad(lambda s, w: triplet_loss(s, hardest=w).sum()))
    for hardest in (0.0, 1.0):
        value, gradient = run(jnp.full((4, 4), 0.3), hardest)
        np.testing.assert_allclose(value, 2 * 4 * 0.2, rtol=1e-6)
        np.testing.assert_allclose(gradient, 2 / 3 - np.eye(4) * (2 + 2 / 3), atol=1e-6)


def test_masked_equals_sliced_even_with_nan_padding(scores):
    padded, same = scores.copy(), SAME.copy()
    padded[3], padded[:, 3], padded[6], padded[:, 6] = np.nan, np.inf, 99.0, np.nan
    same[6] = same[:, 6] = True  # ids of padding are of no account
    values, full = evaluate(padded, same, WHERE)
    kept = np.ix_(WHERE, WHERE)
    part, sliced = jax.jit(jax.grad(total, has_aux=True))(
        jnp.asarray(scores[kept], jnp.float32), jnp.asarray(SAME[kept])
    )
    for name in values:
        np.testing.assert_allclose(values[name][WHERE], sliced[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(full[kept], part, rtol=1e-5, atol=1e-6)


def test_no_negatives_cost_nothing_and_have_zero_gradients(scores):
    own = np.ones((1, 1), bool)
    for values, gradient in (
        evaluate(scores, SAME, np.zeros(8, bool)),
        evaluate(scores, np.ones((8, 8), bool)),  # one image
        evaluate(scores[:1, :1], own),  # one pair, and padding
        jax.jit(jax.grad(total, has_aux=True))(jnp.asarray([[0.1]]), jnp.asarray(own))[::-1],
    ):
        for name in values:
            np.testing.assert_array_equal(values[name], 0.0, err_msg=name)
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("size", [1.0, 1.5, 50.0])
def test_extreme_scores_stay_finite_and_exact(size):
    # The first pair is as wrong as can be, the second as right, the third at the top throughout.
    scores = size * np.array([[-1.0, 1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, 1.0, 1.0]])
    own = np.eye(3, dtype=bool)
    values, gradient = evaluate(scores, own)
    assert np.isfinite(gradient).all()
    wide = np.asarray(scores, np.longdouble)  # exp(1980) is within its range
    expected = {
        "mean": triplet_oracle(wide, own, 0.0),
        "hardest": triplet_oracle(wide, own, 1.0),
        "multi_similarity": multi_similarity_oracle(wide, own),
        "polynomial": polynomial_oracle(wide, own),
    }
    for name, loop in expected.items():
        np.testing.assert_allclose(
            values[name], np.asarray(loop, float), rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_a_nan_that_counts_is_not_hidden(scores):
    # Comparisons with NaN are false: mining must not turn a broken model into a loss of 0.
    for place in ((2, 2), (2, 4)):
        broken = scores.copy()
        broken[place] = np.nan
        values, _ = evaluate(broken, SAME)
        for name in values:
            np.testing.assert_array_equal(
                np.isnan(values[name]), np.isin(np.arange(8), place), err_msg=name
            )


def test_half_precision_is_computed_in_float32(scores):
    half = jnp.asarray(scores, jnp.bfloat16)
    expected, _ = evaluate(np.asarray(half.astype(jnp.float32)), SAME)
    for name, values in jax.jit(all_losses)(half, jnp.asarray(SAME)).items():
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=1e-6)


def test_same_on_any_number_of_devices(scores, shard):
    arrays = shard(jnp.asarray(scores, jnp.float32), jnp.asarray(SAME), jnp.ones(8, bool))
    (_, many), of_many = EVALUATE(*arrays)
    one, of_one = evaluate(scores, SAME)
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(of_many, of_one, rtol=1e-5, atol=1e-6)


def test_log1p_sum_exp_of_nothing_little_and_much():
    x = jnp.array([[-30.0, 2.0], [-30.0, -30.0], [500.0, 500.0]])
    members = jnp.array([[False, False], [True, True], [True, True]])
    run = jax.jit(lambda x: log1p_sum_exp(x, members, axis=1))
    np.testing.assert_allclose(run(x), [0.0, 2 * np.exp(-30.0), 500 + np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda x: run(x).sum()))(x),
        [[0.0, 0.0], [np.exp(-30.0)] * 2, [0.5, 0.5]],
        rtol=1e-6,
    )

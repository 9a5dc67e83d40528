"""NAPReg's term and Proxy-Anchor against loops over anchors and proxies, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from trm_jax.losses.noun_proxies import noun_proxy_loss, proxy_anchor_loss

WHERE = np.array([True, True, False, True, True, True, False, True])


def cosines(context, proxies):
    lengths = np.linalg.norm(context, axis=1)[:, None] * np.linalg.norm(proxies, axis=1)
    return context @ proxies.T / lengths


def noun_proxy_oracle(scene, alpha=2.0, beta=40.0, margin=0.5, excluded=None):
    """Eq. 2, anchor by anchor."""
    context, proxies, positives = scene
    similar, values = cosines(context, proxies), []
    for i, own in enumerate(positives):
        if not own.any():
            values.append(0.0)
            continue
        pull, push = 0.0, 0.0
        for p in range(len(proxies)):
            if own[p]:
                pull += np.exp(-alpha * (similar[i, p] - margin))
            elif excluded is None or not excluded[i, p]:
                push += np.exp(beta * (similar[i, p] - margin))
        values.append(np.log(1 + pull) / alpha + np.log(1 + push) / beta)
    return np.array(values)


def proxy_anchor_oracle(scene, scale, margin, negatives_over):
    """Eq. 1, proxy by proxy."""
    context, proxies, positives = scene
    similar = cosines(context, proxies)
    named = [i for i in range(len(context)) if positives[i].any()]
    pulls, pushes, pushes_of_present = [], [], []
    for p in range(len(proxies)):
        drawn = [np.exp(-scale * (similar[i, p] - margin)) for i in named if positives[i, p]]
        pushed = [np.exp(scale * (similar[i, p] + margin)) for i in named if not positives[i, p]]
        pushes.append(np.log(1 + sum(pushed)))
        if drawn:
            pulls.append(np.log(1 + sum(drawn)))
            pushes_of_present.append(pushes[-1])
    return np.mean(pulls) + np.mean(pushes if negatives_over == "all" else pushes_of_present)


def losses(context, proxies, positives, where=None):
    """The sum of both, and (values of NAPReg's, Proxy-Anchor with two choices of negatives)."""
    values = noun_proxy_loss(context, proxies, positives, where=where)
    anchors = [
        proxy_anchor_loss(context, proxies, positives, where=where, negatives_over=over)
        for over in ("all", "present")
    ]
    return values.sum() + anchors[0] + anchors[1], (values, *anchors)


RUN = jax.jit(jax.value_and_grad(losses, argnums=(0, 1), has_aux=True))


@pytest.fixture
def scene():
    """Contexts and proxies of any length; anchor 3 names nothing, nobody names proxy 4."""
    rng = np.random.default_rng(3)
    positives = rng.random((8, 6)) < 0.3
    positives[:, 4] = positives[3] = False
    positives[0, :2] = True
    positives[1, 5] = True
    return rng.normal(size=(8, 4)) * 3, rng.normal(size=(6, 4)), positives


def test_noun_proxy_loss_value_and_gradient(scene):
    expected = noun_proxy_oracle(scene)
    assert expected[3] == 0 and (expected > 0).sum() > 4
    with jax.enable_x64(True):
        context, proxies, positives = map(jnp.asarray, scene)
        run = jax.jit(lambda c, p: noun_proxy_loss(c, p, positives))
        np.testing.assert_allclose(run(context, proxies), expected, rtol=1e-9)
        weights = np.random.default_rng(1).normal(size=8)
        check_grads(
            lambda c, p: (run(c, p) * weights).sum(), (context, proxies), order=1, modes=("rev",)
        )
        other = jax.jit(
            lambda c, p: noun_proxy_loss(c, p, positives, alpha=3.0, beta=7.0, margin=0.2)
        )
        np.testing.assert_allclose(
            other(context, proxies), noun_proxy_oracle(scene, 3.0, 7.0, 0.2), rtol=1e-9
        )


def test_hand_worked_values():
    # Cosines of the anchor with its own two proxies: 1 and 0; with the other: -1.
    context = jnp.array([[2.0, 0.0]])
    proxies = jnp.array([[5.0, 0.0], [0.0, 0.1], [-3.0, 0.0]])
    positives = jnp.array([[True, True, False]])
    pull = np.log(1 + np.exp(-1.0) + np.exp(1.0)) / 2
    push = np.log1p(np.exp(-60.0)) / 40
    _, (values, over_all, over_present) = jax.jit(losses)(context, proxies, positives)
    np.testing.assert_allclose(values, [pull + push], rtol=1e-6)
    # Proxy-Anchor: two proxies draw, over the two present; the third pushes, over all three.
    drawn = (np.log1p(np.exp(-32 * 0.9)) + np.log1p(np.exp(3.2))) / 2
    np.testing.assert_allclose(over_all, drawn + np.log1p(np.exp(-32 * 0.9)) / 3, rtol=1e-6)
    np.testing.assert_allclose(over_present, drawn, rtol=1e-6)


def test_anchors_of_single_nouns_leave_their_captions_other_nouns_alone():
    # One caption with nouns 0, 1, 2: three anchors, each drawn to its own proxy.
    rng = np.random.default_rng(6)
    context, proxies = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    positives = np.eye(3, 5, dtype=bool)
    nouns = np.broadcast_to(np.arange(5) < 3, (3, 5))
    with jax.enable_x64(True):
        arrays = jnp.asarray(context), jnp.asarray(proxies), jnp.asarray(positives)

        @jax.jit
        def run(excluded):
            return noun_proxy_loss(*arrays, excluded=excluded)

        # The own noun may stand in the mask or not.
        for excluded in (nouns, nouns & ~positives):
            np.testing.assert_allclose(
                run(jnp.asarray(excluded)),
                noun_proxy_oracle((context, proxies, positives), excluded=nouns),
                rtol=1e-9,
            )


@pytest.mark.parametrize("negatives_over", ["all", "present"])
def test_proxy_anchor_value_and_gradient(scene, negatives_over):
    with jax.enable_x64(True):
        context, proxies, positives = map(jnp.asarray, scene)
        for scale, margin in ((32.0, 0.1), (2.0, 0.5)):
            run = jax.jit(
                lambda c, p, scale=scale, margin=margin: proxy_anchor_loss(
                    c, p, positives, scale=scale, margin=margin, negatives_over=negatives_over
                )
            )
            np.testing.assert_allclose(
                run(context, proxies),
                proxy_anchor_oracle(scene, scale, margin, negatives_over),
                rtol=1e-9,
            )
        check_grads(run, (context, proxies), order=1, modes=("rev",))
        absent = jax.grad(run, argnums=1)(context, proxies)[4]
    assert absent.any() == (negatives_over == "all")


def test_unknown_negatives_are_refused(scene):
    with pytest.raises(ValueError, match="choose all or present"):
        proxy_anchor_loss(*map(jnp.asarray, scene), negatives_over="both")


def test_masked_equals_sliced_even_with_nan_padding(scene):
    context, proxies, positives = (jnp.asarray(x) for x in scene)
    context, proxies = context.astype(jnp.float32), proxies.astype(jnp.float32)
    # Anchors 2 and 6 do not count; 3 counts but names nothing: a mean over no nouns may be NaN.
    padded = context.at[jnp.array([2, 3, 6])].set(jnp.nan)
    (_, (values, *anchors)), (full, full_proxies) = RUN(
        padded, proxies, positives, jnp.asarray(WHERE)
    )
    (_, (sliced, *expected)), (part, part_proxies) = RUN(context[WHERE], proxies, positives[WHERE])
    np.testing.assert_allclose(values[WHERE], sliced, rtol=1e-5)
    np.testing.assert_array_equal(values[~WHERE], 0.0)
    np.testing.assert_allclose(anchors, expected, rtol=1e-5)
    np.testing.assert_allclose(full[WHERE], part, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(full_proxies, part_proxies, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(full[~WHERE], 0.0)
    np.testing.assert_array_equal(full[3], 0.0)


def test_nothing_to_draw_costs_nothing(scene):
    context, proxies, positives = (jnp.asarray(x) for x in scene)
    vectors = context.astype(jnp.float32), proxies.astype(jnp.float32)
    for named, where in ((positives, False), (positives & False, True)):
        (total, (values, *_)), gradients = RUN(*vectors, named, jnp.full(8, where))
        assert total == 0.0
        np.testing.assert_array_equal(values, 0.0)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0.0)


def test_zero_and_parallel_vectors_and_large_scales_stay_finite():
    # Cosines of exactly 1 and -1, an all-zero context and an all-zero proxy.
    context = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    proxies = jnp.array([[1e-3, 0.0], [-1e3, 0.0], [0.0, 0.0]])
    positives = jnp.array([[False, True, False], [False, True, True], [True, False, True]])

    def total(c, p):
        values = noun_proxy_loss(c, p, positives, alpha=500.0, beta=5000.0)
        return values.sum() + proxy_anchor_loss(c, p, positives, scale=5000.0), values

    run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    gradients, values = run(context, proxies)
    assert all(np.isfinite(g).all() for g in gradients)
    # -alpha (S - 0.5) and beta (S - 0.5) decide alone: 1.5 + 0.5, 0.5 + 0, and 0.5 + 0.
    np.testing.assert_allclose(values, [2.0, 0.5, 0.5 + np.log(2) / 500], rtol=1e-5)


def test_float32_keeps_the_small_push_of_many_proxies():
    # Anchors at their own proxy (no pull) among 2,444 random ones: the sum of exponentials is 1e-4,
    # and log(1 + 1e-4) in float32 would have an error of 1e-3.
    rng = np.random.default_rng(8)
    proxies = rng.normal(size=(2444, 256))
    context = proxies[:4] + 0.1 * rng.normal(size=(4, 256))
    positives = np.arange(2444)[None] == np.arange(4)[:, None]
    values = jax.jit(lambda *a: noun_proxy_loss(*a, alpha=1000.0))(
        jnp.asarray(context, jnp.float32), jnp.asarray(proxies, jnp.float32), jnp.asarray(positives)
    )
    expected = noun_proxy_oracle((context, proxies, positives), alpha=1000.0)
    assert (expected < 1e-5).all()
    np.testing.assert_allclose(values, expected, rtol=3e-5)


def test_same_on_any_number_of_devices(scene, shard):
    context, proxies, positives = (jnp.asarray(x) for x in scene)
    context, proxies = context.astype(jnp.float32), proxies.astype(jnp.float32)
    one = RUN(context, proxies, positives, jnp.asarray(WHERE))
    context, positives, where = shard(context, positives, jnp.asarray(WHERE))
    many = RUN(context, proxies, positives, where)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)

"""Schedules at their endpoints, optimizers against arithmetic in numpy, decay by pattern."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trm_jax.train import optimizers
from trm_jax.types import UserError


def _schedule(name, **options):
    return optimizers.make_schedule(name, learning_rate=5e-4, total_steps=1000, **options)


def test_one_cycle_starts_at_a_25th_peaks_at_30_percent_and_ends_at_a_10000th_of_the_start():
    schedule = _schedule("one_cycle")
    np.testing.assert_allclose(schedule(0), 5e-4 / 25, rtol=1e-5)
    np.testing.assert_allclose(schedule(300), 5e-4, rtol=1e-5)
    np.testing.assert_allclose(schedule(1000), 5e-4 / 25 / 1e4, rtol=1e-3)
    # Cosine on both sides: half way of each is the mean of its ends.
    np.testing.assert_allclose(schedule(150), (5e-4 / 25 + 5e-4) / 2, rtol=1e-5)
    np.testing.assert_allclose(schedule(650), (5e-4 + 2e-9) / 2, rtol=1e-3)
    rates = np.array([schedule(step) for step in range(0, 1001, 50)])
    assert rates.argmax() == 6 and (np.diff(rates)[:6] > 0).all() and (np.diff(rates)[6:] < 0).all()


def test_dualcoops_warm_up_is_constant_then_cosine_from_the_peak():
    schedule = _schedule("constant_warmup_cosine", warmup_steps=100, warmup_rate=1e-5)
    for step in (0, 50, 99):
        np.testing.assert_allclose(schedule(step), 1e-5, rtol=1e-6)
    for step in (100, 325, 550, 999):
        wanted = 5e-4 * 0.5 * (1 + np.cos(np.pi * (step - 100) / 900))
        np.testing.assert_allclose(schedule(step), wanted, rtol=1e-4, atol=1e-10)


def test_cosine_and_constant():
    schedule = _schedule("cosine", warmup_steps=10, warmup_rate=0.0)
    np.testing.assert_allclose(
        [schedule(0), schedule(5), schedule(10), schedule(1000)], [0, 2.5e-4, 5e-4, 0], atol=1e-10
    )
    assert _schedule("constant")(7) == 5e-4
    with pytest.raises(UserError, match="optimizer.schedule: 'linear' is unknown"):
        _schedule("linear")


def test_steps_drop_to_a_tenth_at_the_first_step_of_their_epoch():
    schedule = _schedule("step", drop_steps=(30, 60))
    rates = [float(schedule(step)) for step in (0, 29, 30, 59, 60, 999)]
    np.testing.assert_allclose(rates, [5e-4, 5e-4, 5e-5, 5e-5, 5e-6, 5e-6], rtol=1e-5)
    for steps in ((60, 30), (0, 5), (7, 7), ()):
        with pytest.raises(UserError, match="needs optimizer.drop_epochs, ascending"):
            _schedule("step", drop_steps=steps)


PARAMS = {"a": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}}
GRADS = {"a": {"kernel": jnp.array([0.3, -4.0]), "bias": jnp.array([2.0])}}


def _two_updates(name, **options):
    optimizer = optimizers.make_optimizer(
        name, optax.constant_schedule(0.1), PARAMS, weight_decay=0.01, decay=("kernel$",), **options
    )
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params["a"]


@pytest.mark.parametrize("b2", [0.999, 0.98])
def test_adamw_decays_only_what_matches(b2):
    found = _two_updates("adamw", b2=b2)
    for name, decay in (("kernel", 0.01), ("bias", 0.0)):
        p, g = (np.asarray(tree["a"][name], np.float64) for tree in (PARAMS, GRADS))
        m = v = np.zeros_like(p)
        for step in (1, 2):
            m, v = 0.9 * m + 0.1 * g, b2 * v + (1 - b2) * g * g
            unbiased = m / (1 - 0.9**step), v / (1 - b2**step)
            p = p - 0.1 * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + decay * p)
        np.testing.assert_allclose(found[name], p, rtol=1e-5)


def test_sgd_adds_the_decay_to_the_gradient_before_the_momentum():
    found = _two_updates("sgd")
    for name, decay in (("kernel", 0.01), ("bias", 0.0)):
        p, g = (np.asarray(tree["a"][name], np.float64) for tree in (PARAMS, GRADS))
        momentum = np.zeros_like(p)
        for _ in range(2):
            momentum = 0.9 * momentum + g + decay * p
            p = p - 0.1 * momentum
        np.testing.assert_allclose(found[name], p, rtol=1e-5)


def test_clipping_limits_the_global_norm():
    norm = np.sqrt(0.09 + 16 + 4)
    params = {"a": {"kernel": jnp.zeros(2), "bias": jnp.zeros(1)}}
    optimizer = optimizers.make_optimizer(
        "sgd", optax.constant_schedule(1.0), params, weight_decay=0.0, decay=(".",), clip=1.0
    )
    updates, _ = optimizer.update(GRADS, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -np.array([0.3, -4.0]) / norm, rtol=1e-5)


def test_unknown_optimizers_and_patterns_are_named():
    settings = {"weight_decay": 0.0, "decay": (".",)}
    with pytest.raises(UserError, match="optimizer.name: 'lion' is unknown"):
        optimizers.make_optimizer("lion", optax.constant_schedule(1.0), PARAMS, **settings)
    with pytest.raises(UserError, match=r"optimizer.decay: 'scale\$' matches no parameter"):
        optimizers.make_optimizer(
            "sgd", optax.constant_schedule(1.0), PARAMS, **settings | {"decay": ("scale$",)}
        )


def test_factors_scale_the_steps_of_the_parameters_they_match():
    plain, scaled = _two_updates("adamw"), _two_updates("adamw", factors=(("bias$", 10.0),))
    np.testing.assert_array_equal(scaled["kernel"], plain["kernel"])
    np.testing.assert_allclose(scaled["bias"] - 0.5, 10 * (plain["bias"] - 0.5), rtol=1e-5)
    with pytest.raises(UserError, match="optimizer.factors: 'proxies' matches no parameter"):
        _two_updates("adamw", factors=(("proxies", 10.0),))

"""One update against arithmetic in numpy: momentum, moving average, guard, micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train import toy
from trm_jax.train import paths, state, step

KEY = jax.random.key(0)


def _start(optimizer, ema=0.0, freeze=("^base/",)):
    method = toy.method()
    params, extras = jax.tree.map(jnp.asarray, method.init(KEY, pretrained=None))
    trained, frozen = paths.split(params, freeze, field="optimizer.freeze")
    sums = state.zero_sums(method, params, extras, toy.batch(0), KEY)
    return state.create(trained, {}, extras, optimizer, ema=ema > 0, sums=sums), frozen


def _run(batches, *, ema=0.0, microbatch=0, rate=0.1):
    optimizer = optax.sgd(rate, momentum=0.9)
    current, frozen = _start(optimizer, ema)
    update = jax.jit(
        step.make_train_step(toy.method(), optimizer, key=KEY, ema_decay=ema, microbatch=microbatch)
    )
    states = []
    for batch in batches:
        current = update(current.replace(frozen=None), frozen, batch)
        states.append(jax.device_get(current))
    return states


def _numpy(batches, decay=0.0, rate=0.1):
    """(w, ema, losses) of SGD with momentum 0.9 in float64."""
    w = toy.START["head"]["w"].astype(np.float64)
    momentum, ema, losses = np.zeros(3), w.copy(), []
    for batch in batches:
        error = 1.5 * (batch["x"] @ w) - batch["y"]
        losses.append((error**2).mean())
        momentum = 0.9 * momentum + (2 * 1.5 * error[:, None] * batch["x"]).mean(0)
        w = w - rate * momentum
        ema = decay * ema + (1 - decay) * w
    return w, ema, losses


def test_updates_equal_sgd_by_hand_and_metrics_add_up():
    batches = [toy.batch(seed) for seed in range(3)]
    last = _run(batches, ema=0.9)[-1]
    w, ema, losses = _numpy(batches, 0.9)
    np.testing.assert_allclose(last.params["head"]["w"], w, rtol=1e-5)
    np.testing.assert_allclose(last.ema["head"]["w"], ema, rtol=1e-5)
    assert last.step == 3 and last.extras["seen"] == 24
    np.testing.assert_allclose(last.sums["loss"].value(), np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(last.sums["error"].total, 8 * np.sum(losses), rtol=1e-5)
    assert last.sums["error"].count == 24 and last.sums["skipped"].total == 0
    assert last.sums["step"].total == 0 + 1 + 2  # the step that the loss sees is traced


def test_a_step_with_nan_keeps_everything_and_is_counted():
    good, bad = toy.batch(0), toy.batch(1)
    bad["x"][0, 0] = np.nan
    first, second, third = _run([good, bad, toy.batch(2)], ema=0.9)
    for name in ("params", "opt_state", "extras", "ema"):
        same = jax.tree.map(np.array_equal, getattr(first, name), getattr(second, name))
        assert all(jax.tree.leaves(same)), name
    assert second.step == 2 and second.sums["skipped"] == (1.0, 2.0)
    assert second.sums["loss"] == first.sums["loss"]
    # The run goes on as if the bad batch had not been.
    w, ema, _ = _numpy([good, toy.batch(2)], 0.9)
    np.testing.assert_allclose(third.params["head"]["w"], w, rtol=1e-5)
    np.testing.assert_allclose(third.ema["head"]["w"], ema, rtol=1e-5)


def test_an_infinite_gradient_of_a_finite_loss_is_skipped():
    huge = toy.batch(0)
    huge["x"][:] = 0.0
    huge["x"][0, :2] = 2e38, 1e38  # w . x = 0.5 * 2e38 - 1e38 = 0 in any order of rounding
    huge["y"][0] = 1e18  # the error; its square is 1e36, its product with x beyond float32
    kept, moved = _run([huge, toy.batch(1)])
    np.testing.assert_array_equal(kept.params["head"]["w"], toy.START["head"]["w"])
    assert kept.sums["skipped"].total == 1 and moved.sums["skipped"].total == 1


@pytest.mark.parametrize("microbatch", [2, 4])
def test_microbatches_give_the_whole_batchs_update(microbatch):
    batches = [toy.batch(seed) for seed in range(2)]
    whole, parts = _run(batches)[-1], _run(batches, microbatch=microbatch)[-1]
    np.testing.assert_allclose(parts.params["head"]["w"], whole.params["head"]["w"], rtol=1e-6)
    np.testing.assert_allclose(parts.sums["error"], whole.sums["error"], rtol=1e-6)
    np.testing.assert_allclose(parts.sums["loss"], whole.sums["loss"], rtol=1e-6)
    assert parts.extras["seen"] == whole.extras["seen"] == 16


def test_microbatches_stay_exact_with_bad_samples():
    batch = toy.batch(0)
    batch["valid"][[0, 1, 2]] = False
    whole, parts = _run([batch])[-1], _run([batch], microbatch=4)[-1]
    np.testing.assert_allclose(parts.params["head"]["w"], whole.params["head"]["w"], rtol=1e-6)
    np.testing.assert_allclose(parts.sums["loss"], whole.sums["loss"], rtol=1e-6)


def test_frozen_params_keep_out_of_the_update():
    optimizer = optax.sgd(0.1)
    current, frozen = _start(optimizer, freeze=("w$",))
    assert list(frozen) == ["head"] and list(current.params) == ["base"]
    update = jax.jit(step.make_train_step(toy.method(), optimizer, key=KEY))
    after = update(current.replace(frozen=None), frozen, toy.batch(0))
    batch, w = toy.batch(0), toy.START["head"]["w"]
    slope = (2 * (1.5 * batch["x"] @ w - batch["y"]) * (batch["x"] @ w)).mean()
    np.testing.assert_allclose(after.params["base"]["scale"], 1.5 - 0.1 * slope, rtol=1e-5)

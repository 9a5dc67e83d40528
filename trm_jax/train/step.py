"""One update, for every method: gradient, optimizer, moving average, guard against NaN."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from trm_jax.train import paths
from trm_jax.train.accumulate import value_and_grad
from trm_jax.train.state import TrainState
from trm_jax.types import Batch, Key, Mean, Method, PyTree


def make_train_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    key: Key,
    ema_decay: float = 0.0,
    microbatch: int = 0,
    clip: float = 0.0,
) -> Callable[[TrainState, PyTree, Batch], TrainState]:
    """Builds (state without frozen, frozen, batch) -> state, to be jitted with donation of state.

    Args:
      method: its loss is all that is known of it.
      optimizer: applied to the trained params.
      key: the run's key; a step folds its number in, so a resumed run draws the same noise.
      ema_decay: decay of the moving average of the weights; 0 is off.
      microbatch: examples per gradient, 0 for the whole batch (methods that decompose only).
      clip: the optimizer's limit of the gradient norm; reports the share of clipped steps.

    A step whose loss or gradient is not finite keeps params, opt_state, extras and ema, counts
    in the metric `skipped`, and adds nothing to the other metrics.
    """

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> TrainState:
        def loss(params, part, extras, part_key):
            whole = paths.merge(params, frozen)
            out = method.loss(whole, extras, part, key=part_key, step=state.step, train=True)
            return out.loss, out

        step_key = jax.random.fold_in(key, state.step)
        out, grads = value_and_grad(loss, state.params, batch, state.extras, step_key, microbatch)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = {}
        if ema_decay:
            ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, state.ema, params)
        finite = jnp.isfinite(out.loss) & jnp.isfinite(grad_norm)

        def guard(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        metrics = {**out.metrics, "loss": Mean.of(out.loss), "grad_norm": Mean.of(grad_norm)}
        metrics |= {"clipped": Mean.of(grad_norm > clip)} if clip else {}
        added = jax.tree.map(jnp.add, {k: state.sums[k] for k in metrics}, metrics)
        sums = guard(added, {k: state.sums[k] for k in metrics})
        skipped = Mean.of(jnp.where(finite, 0.0, 1.0))
        sums["skipped"] = jax.tree.map(jnp.add, state.sums["skipped"], skipped)
        return TrainState(
            step=state.step + 1,
            params=guard(params, state.params),
            frozen=None,
            opt_state=guard(opt_state, state.opt_state),
            extras=guard(out.extras, state.extras),
            ema=guard(ema, state.ema),
            sums=sums,
        )

    return train_step

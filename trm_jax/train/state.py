"""The train state: every array that lives across steps, in one explicit pytree."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from trm_jax.types import Batch, Key, Mean, Method, PyTree


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint restores (`frozen` apart, which is stored once per run).

    step: [] int32, updates done. params: trained weights. frozen: weights that are neither
    differentiated nor donated. opt_state: optax. extras: prototype banks, thresholds, batch
    statistics. ema: moving average of params, or {} when it is off. sums: metrics since the
    last log step, so that a resumed run logs the same numbers.
    """

    step: PyTree
    params: PyTree
    frozen: PyTree
    opt_state: PyTree
    extras: PyTree
    ema: PyTree
    sums: PyTree


def create(
    params: PyTree,
    frozen: PyTree,
    extras: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    ema: bool,
    sums: PyTree,
) -> TrainState:
    """The state before step 0; `ema` starts as a copy of `params`.

    What the steps will donate is copied, so that the caller keeps its arrays.
    """
    params, extras = jax.tree.map(jnp.array, (params, extras))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        opt_state=optimizer.init(params),
        extras=extras,
        ema=jax.tree.map(jnp.array, params) if ema else {},
        sums=sums,
    )


def zero_sums(
    method: Method, params: PyTree, extras: PyTree, batch: Batch, key: Key, *, clip: float = 0.0
) -> PyTree:
    """Empty sums for every metric the method reports, and the step's own."""
    out = jax.eval_shape(
        lambda *a: method.loss(*a, key=key, step=jnp.int32(0), train=True), params, extras, batch
    )
    names = (*out.metrics, "loss", "grad_norm", "skipped", *(["clipped"] if clip else []))
    # Every sum is a buffer of its own, since the step donates them.
    return {name: Mean(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)) for name in names}

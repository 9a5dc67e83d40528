"""Optimizers and schedules from a config's `optimizer` section; all of them are optax."""

from collections.abc import Sequence

import optax

from trm_jax.train import paths
from trm_jax.types import PyTree, UserError


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_rate: float = 0.0,
    end_rate: float = 0.0,
    drop_steps: Sequence[int] = (),
) -> optax.Schedule:
    """Learning rate by step.

    Args:
      name: "one_cycle" (30 % warm-up from 1/25 of the peak, cosine to 1e-4 of the start),
        "cosine" (optional linear warm-up, cosine to `end_rate`), "constant_warmup_cosine"
        (warm-up at the constant `warmup_rate`, then cosine from the peak: DualCoOp, TaI-DPT),
        "step" (a tenth of it from each of `drop_steps` on: SCAN, SGRAF, NAAF) or "constant".
      learning_rate: the peak.
      total_steps: steps of the run.
      warmup_steps, warmup_rate, end_rate, drop_steps: see `name`.

    Raises:
      UserError: an unknown name.
    """
    if name == "one_cycle":
        return optax.cosine_onecycle_schedule(
            total_steps, learning_rate, pct_start=0.3, div_factor=25.0, final_div_factor=1e4
        )
    rest = max(1, total_steps - warmup_steps)
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(
            warmup_rate, learning_rate, warmup_steps, warmup_steps + rest, end_rate
        )
    if name == "constant_warmup_cosine":
        decay = optax.cosine_decay_schedule(learning_rate, rest)
        return optax.join_schedules([optax.constant_schedule(warmup_rate), decay], [warmup_steps])
    if name == "step":
        ascending = list(drop_steps) == sorted({*drop_steps}) and all(s > 0 for s in drop_steps)
        if not drop_steps or not ascending:
            raise UserError(
                "optimizer.schedule='step' needs optimizer.drop_epochs, ascending and positive"
            )
        return optax.piecewise_constant_schedule(learning_rate, dict.fromkeys(drop_steps, 0.1))
    if name == "constant":
        return optax.constant_schedule(learning_rate)
    raise UserError(
        f"optimizer.schedule: {name!r} is unknown; use one_cycle, cosine, "
        "constant_warmup_cosine, step or constant"
    )


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    params: PyTree,
    *,
    weight_decay: float,
    decay: Sequence[str],
    clip: float = 0.0,
    b2: float = 0.999,
    factors: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay ("adamw") or SGD with momentum 0.9 ("sgd").

    Args:
      name: "adamw" or "sgd".
      schedule: learning rate by step.
      params: trained params, for the decay mask.
      weight_decay: coefficient; with "sgd" it is added to the gradient, as torch does.
      decay: regexes of the params that are decayed.
      clip: global gradient norm limit, 0 for none.
      b2: Adam's second-moment decay.
      factors: (regex of params, factor on their learning rate); weight decay goes with it.

    Raises:
      UserError: an unknown name, or a regex in `decay` or `factors` that matches nothing.
    """
    decayed = paths.mask(params, decay, field="optimizer.decay")
    scaled = [
        optax.masked(optax.scale(factor), paths.mask(params, [pattern], field="optimizer.factors"))
        for pattern, factor in factors
    ]
    limit = optax.clip_by_global_norm(clip) if clip else optax.identity()
    if name == "adamw":
        update = optax.adamw(schedule, b2=b2, weight_decay=weight_decay, mask=decayed)
        return optax.chain(limit, update, *scaled)
    if name == "sgd":
        decay_term = optax.add_decayed_weights(weight_decay, mask=decayed)
        return optax.chain(limit, decay_term, optax.sgd(schedule, momentum=0.9), *scaled)
    raise UserError(f"optimizer.name: {name!r} is unknown; use adamw or sgd")

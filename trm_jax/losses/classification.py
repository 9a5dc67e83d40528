"""The losses of a multi-label head, by name: TRM-ML's own and the other rows of its Tables 1-2."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from trm_jax.losses import partial_labels as partial
from trm_jax.losses.asymmetric import asymmetric_loss
from trm_jax.types import Array

NAMES = (
    "asl",
    "partial_bce",
    "assume_negative",
    "weighted_assume_negative",
    "epr",
    "hill",
    "splc",
    "large_loss",
    "large_loss_correction",
)
SETTINGS = (
    "gamma_pos",
    "gamma_neg",
    "shift",
    "focus_gradient",
    "rejection_rate",
    "expected_positives",
)


def classification_loss(
    name: str,
    logits: Float[Array, "n C"],
    labels: Int[Array, "n C"],
    *,
    epoch: Float[Array, ""] | float = 0.0,
    gamma_pos: float = 1.0,
    gamma_neg: float = 2.0,
    shift: float = 0.05,
    focus_gradient: bool = False,
    rejection_rate: float = 0.002,
    expected_positives: float = 0.0,
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, "n C"]:
    """Values per entry, to be summed (or averaged) over classes and averaged over examples.

    Source: TRM-ML, Eq. 5 and 14 ("asl") and the losses of the other rows of its Tables 1 and 2,
    each cited at its function.

    Args:
      name: one of `NAMES`; see losses/asymmetric.py and losses/partial_labels.py.
      logits: [n, C], s_pos - s_neg: p = sigmoid(logit).
      labels: [n, C] in {-1, 0, +1}; 0 is unknown. "asl", "partial_bce" and "epr" ignore unknown
        entries, the others have a rule of their own for them.
      epoch: [], since the start, may be traced; "splc" corrects labels from 1 on.
      gamma_pos, gamma_neg, shift, focus_gradient: of "asl".
      rejection_rate: share of the unknown entries that "large_loss" gives up more with each epoch.
      expected_positives: classes in an example on average, for "epr".
      where: [n], examples that count.

    Returns:
      [n, C], in float32 or wider; the penalty of "epr" is spread evenly over the entries.

    Raises:
      ValueError: `name` is unknown.
    """
    if name == "asl":
        return asymmetric_loss(
            jax.nn.log_sigmoid(logits),
            jax.nn.log_sigmoid(-logits),
            labels,
            gamma_pos=gamma_pos,
            gamma_neg=gamma_neg,
            shift=shift,
            focus_gradient=focus_gradient,
        )
    if name == "partial_bce":
        return partial.partial_bce(logits, labels)
    if name == "assume_negative":
        return partial.assume_negative_bce(logits, labels)
    if name == "weighted_assume_negative":
        return partial.weighted_assume_negative(logits, labels)
    if name == "epr":
        values, penalty = partial.epr(
            logits, labels, expected_positives=expected_positives, where=where
        )
        return values + penalty[None, None]
    if name == "hill":
        return partial.hill(logits, labels)
    if name == "splc":
        return partial.splc(logits, labels, active=epoch >= 1)
    if name in ("large_loss", "large_loss_correction"):
        mode = "rejection" if name == "large_loss" else "correction_temporary"
        rate = jnp.minimum(rejection_rate * jnp.floor(epoch), 1.0)
        return partial.large_loss(logits, labels, rate=rate, mode=mode, where=where)
    raise ValueError(f"loss {name!r} is none of {', '.join(NAMES)}")

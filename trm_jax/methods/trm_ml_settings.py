"""What TRM-ML lets its user choose: weights and kinds of its losses, its memory."""

from typing import NamedTuple

from trm_jax.losses import classification
from trm_jax.models import region_attention
from trm_jax.types import UserError


class Loss(NamedTuple):
    """Weights and choices of the objective L = L_cls + beta KD + gamma MMCL (Eq. 15)."""

    classification: str = "asl"  # of losses/classification.py: other rows of Tables 1 and 2
    region_weight: float = 1.0  # alpha: L_cls = L_cls^q + alpha L_cls^r (Eq. 5)
    distillation_weight: float = 0.05  # beta; 0 drops KD
    contrastive_weight: float = 0.01  # gamma; 0 drops MMCL
    gamma_pos: float = 1.0
    gamma_neg: float = 2.0
    shift: float = 0.05
    focus_gradient: bool = False
    rejection_rate: float = 0.002  # of "large_loss", more with each epoch
    expected_positives: float = 0.0  # of "epr": classes in an image on average
    reduction: str = "sum"  # over the classes of an image, "sum" or "mean"; over images: mean
    # Unknown entries without a pseudo-label in ASL: "ignore", "negative", or "auto": negative where
    # the label protocol knows no negatives, since otherwise all-positive is the optimum.
    unknown: str = "auto"
    distillation: str = "bernoulli"  # or "softmax", Eq. 6 to the letter
    stop_teacher: bool = True
    temperature: float = 0.2  # of MMCL
    negatives: str = "both"  # of MMCL: "other_classes", "known_negatives", "both"


class Memory(NamedTuple):
    """The multimodal category prototypes (MMCP); pseudo_labels "none" drops them."""

    pseudo_labels: str = "both"  # "none", "visual", "text", "both" (Table 6)
    slots: int = 64  # L, prototypes per class
    pixels: int = 4  # k, pixels pushed per known positive
    decay: float = 0.99  # eta of the thresholds (Eq. 11)
    stage_one_epochs: float = 5.0  # pseudo-labels are off before


def check(
    loss: Loss, memory: Memory, query_init: str, attention_init: str, baseline_pool: str
) -> None:
    """Raises UserError for a choice that does not exist or lacks what it needs."""
    choices = [
        ("loss.classification", loss.classification, classification.NAMES),
        ("loss.reduction", loss.reduction, ("sum", "mean")),
        ("loss.unknown", loss.unknown, ("auto", "ignore", "negative")),
        ("loss.distillation", loss.distillation, ("bernoulli", "softmax")),
        ("loss.negatives", loss.negatives, ("other_classes", "known_negatives", "both")),
        ("memory.pseudo_labels", memory.pseudo_labels, ("none", "visual", "text", "both")),
        ("model.options.query_init", query_init, ("text", "normal")),
        ("model.options.attention_init", attention_init, tuple(region_attention.INITIALIZERS)),
        ("model.options.baseline_pool", baseline_pool, ("mean", "global")),
    ]
    for field, value, allowed in choices:
        if value not in allowed:
            raise UserError(f"{field}={value!r} is none of {', '.join(allowed)}")
    if loss.classification == "epr" and loss.expected_positives <= 0:
        raise UserError("loss.classification='epr' needs loss.expected_positives, a number above 0")

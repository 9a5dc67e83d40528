"""The methods by name. Each file builds one Method (trm_jax.types) and imports no other method."""

from trm_jax.methods import contrastive, dualcoop, mask, napreg, simcon, trm_ml

MAKERS = {
    "trm_ml": trm_ml.make,
    "dualcoop": dualcoop.make,
    "contrastive": contrastive.make,
    "simcon": simcon.make,
    "napreg": napreg.make,
    "mask": mask.make,
}

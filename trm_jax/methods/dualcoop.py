"""DualCoOp: dual prompts matched with every position of a frozen CLIP's dense features.

Sun et al., "DualCoOp: fast adaptation to multi-label recognition with limited annotations",
NeurIPS 2022. It is TRM-ML's main peer; the positive prompt says where to look.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trm_jax.losses.asymmetric import asymmetric_loss
from trm_jax.losses.cosine import normalize
from trm_jax.methods import frozen_clip
from trm_jax.types import Array, Batch, BatchSpec, DataInfo, Mean, Method, PyTree, StepOutput


class Loss(NamedTuple):
    """Asymmetric loss, summed over the classes of an image, averaged over images."""

    weight: float = 0.03
    gamma_pos: float = 1.0
    gamma_neg: float = 2.0
    shift: float = 0.05
    reduction: str = "sum_batch"  # or "mean_batch": over the images of a batch


def make(
    *,
    info: DataInfo,
    tokenizer,
    clip: Mapping[str, Any],
    inputs: BatchSpec,
    grid: tuple[int, int],
    dtype=jnp.float32,
    position_scale: float = 20.0,
    output_scale: float = 5.0,
    prompts: frozen_clip.Prompts = frozen_clip.Prompts(),
    loss: Loss = Loss(),
) -> Method:
    """The method, from plain arguments.

    Args:
      info, tokenizer, clip, inputs, grid, dtype, prompts: as in trm_ml.make.
      position_scale: factor of the cosine at each position, in the softmax over positions too.
      output_scale: factor of the aggregated logits.
      loss: see `Loss`.
    """
    shared = frozen_clip.make(info, tokenizer, clip, inputs, grid, prompts, dtype)

    def scores(params: PyTree, batch: Batch) -> tuple[Array, Array]:
        """(logit s_pos - s_neg [n, C], weights of the positions [n, C, hw])."""
        if "text_positive" in batch:
            text = jnp.stack([batch["text_negative"], batch["text_positive"]])
        else:
            text = jnp.stack(shared.text_features(params))
        dense = normalize(shared.image_features(params, batch)[0])
        logits = position_scale * jnp.einsum("npd,scd->sncp", dense, normalize(text))
        weights = jax.nn.softmax(logits[1], axis=-1)  # the positive half looks for both
        negative, positive = output_scale * (logits * weights[None]).sum(-1)
        return positive - negative, weights

    def init(key, *, pretrained):
        return shared.init(key, pretrained=pretrained), {}

    def loss_fn(params, extras, batch, *, key, step, train) -> StepOutput:
        del key, step, train
        valid = batch["valid"]
        labels = jnp.where(valid[:, None], batch["labels"], 0)
        logit, _ = scores(params, batch)
        values = asymmetric_loss(
            jax.nn.log_sigmoid(logit),
            jax.nn.log_sigmoid(-logit),
            labels,
            gamma_pos=loss.gamma_pos,
            gamma_neg=loss.gamma_neg,
            shift=loss.shift,
        ).sum(-1)
        per_image = Mean.of(values, valid)
        total = per_image.total if loss.reduction == "sum_batch" else per_image.value()
        return StepOutput(loss.weight * total, extras, {"loss_classification": per_image})

    def predict(params, extras, batch):
        del extras
        return {"scores": jax.nn.sigmoid(scores(params, batch)[0])}

    def regions(params, extras, batch):
        del extras
        logit, weights = scores(params, batch)
        maps = weights / weights.max(-1, keepdims=True)
        maps = maps.reshape(*maps.shape[:2], *grid)
        return {"scores": jax.nn.sigmoid(logit), "maps": maps}

    return Method(
        specs=frozen_clip.batch_specs(inputs, len(info.class_names)),
        init=init,
        loss=loss_fn,
        predict={
            "prepare": lambda params, extras, batch: shared.prepared(params),
            "scores": predict,
            "regions": regions,
            "dense": lambda params, extras, batch: shared.cacheable(params, batch),
        },
        decomposes=loss.reduction == "mean_batch",
    )

"""Two towers trained on image-text pairs by InfoNCE (CLIP), or with locked image features (LiT)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trm_jax.losses.contrastive import dense_info_nce, info_nce
from trm_jax.losses.cosine import normalize
from trm_jax.models.clip import towers
from trm_jax.types import (
    ArraySpec,
    Batch,
    BatchSpec,
    Mean,
    Method,
    PyTree,
    StepOutput,
)


def make(
    *,
    clip: Mapping[str, Any],
    inputs: BatchSpec,
    text_length: int,
    dtype=jnp.float32,
    max_scale: float = 100.0,
    dense_weight: float = 0.0,
) -> Method:
    """The method, from plain arguments.

    Args:
      clip: configuration of the towers (models/clip/towers.py).
      inputs: the image entry of a batch.
      text_length: T, tokens of a caption.
      dtype: compute dtype; parameters and losses are float32.
      max_scale: upper limit of the learned logit scale 1/tau.
      dense_weight: of a second InfoNCE, between the texts and the dense features, which small
        towers need if their dense features shall mean something.
    """
    model: Any = towers.build(clip, dtype=dtype)
    images = next(iter(inputs))

    def variables(params: PyTree, extras: PyTree) -> PyTree:
        return {**params["clip"], **extras}

    def init(key, *, pretrained):
        weights = dict(pretrained or towers.init(clip, key))
        return {"clip": {"params": weights.pop("params")}}, weights

    def scale(params: PyTree):
        learned = params["clip"]["params"]["logit_scale"]
        return jnp.exp(jnp.minimum(learned, jnp.log(max_scale)))

    def loss(params, extras, batch, *, key, step, train) -> StepOutput:
        del step
        valid, mutable = batch["valid"], list(extras) if train else []
        keys = jax.random.split(key, valid.shape[0]) if train else None

        def both(m):
            pair = m.encode_image(batch[images], train, keys, valid)
            return pair, m.encode_text(batch["tokens"], train, valid)

        ((image, dense), text), new = model.apply(
            variables(params, extras), mutable=mutable, method=both
        )
        image, text = normalize(image), normalize(text)
        values = info_nce(image, text, logit_scale=scale(params), where=valid)
        matched = (image * text).sum(-1)
        metrics = {
            "loss_contrastive": Mean.of(values, valid),
            "matched_cosine": Mean.of(matched, valid),
            "logit_scale": Mean.of(scale(params)),
        }
        total = Mean.of(values, valid).value()
        if dense_weight:
            aligned = dense_info_nce(normalize(dense), text, logit_scale=scale(params), where=valid)
            metrics["loss_dense"] = Mean.of(aligned, valid)
            total = total + dense_weight * metrics["loss_dense"].value()
        return StepOutput(total, {**extras, **new}, metrics)

    def embed_image(params, extras, batch: Batch):
        pooled, dense = model.apply(variables(params, extras), batch[images], method="encode_image")
        return {
            "embedding": normalize(pooled),
            "dense": dense.astype(jnp.float32),
            "global_embedding": pooled,
        }

    def embed_text(params, extras, batch: Batch):
        text = model.apply(variables(params, extras), batch["tokens"], method="encode_text")
        return {"embedding": normalize(text)}

    tokens: BatchSpec = {"tokens": ArraySpec((None, text_length), jnp.int32)}
    rows: BatchSpec = {
        "index": ArraySpec((None,), jnp.int32),
        "valid": ArraySpec((None,), jnp.bool_),
    }
    return Method(
        specs={
            "train": {**inputs, **tokens, **rows},
            "eval": {**inputs, **rows},
            "embed_image": inputs,
            "embed_text": tokens,
        },
        init=init,
        loss=loss,
        predict={"embed_image": embed_image, "embed_text": embed_text},
    )

"""MASK: a knowledge of words and the regions that carry them, learnt without any image-text pair.

Source: "Multimodal aligned semantic knowledge for unpaired image-text matching" (MASK). Regions
with words on them are encoded (models/knowledge.py) such that what a word's regions have in common,
its prototype, lies among other prototypes as the word does among words. Matching reads the encoder
and the prototypes alone (evaluate/knowledge_matching.py).
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from trm_jax.losses.knowledge import (
    at_samples,
    cross_modal_loss,
    prototype_contrastive_loss,
    reconstruction_loss,
    region_numbers,
    total_loss,
)
from trm_jax.memory import knowledge as memory_of_words
from trm_jax.models import knowledge
from trm_jax.models.placement import replicated
from trm_jax.types import ArraySpec, Batch, BatchSpec, Mean, Method, PyTree, StepOutput, UserError


class Loss(NamedTuple):
    """The config's `loss` section: L = L_ir + cross_modal_weight L_cm + contrastive_weight L_cl.

    kl_weight: of the divergence in L_ir beside the reconstruction, 1 in the paper. The error grows
        with the features' squared norm, the divergence does not: with features of a small norm it
        takes all information out of mu.
    cross_modal_weight: lambda_1 (Eq. 14), 0 for none.
    contrastive_weight: lambda_2, 0 for none.
    temperature: T of Eq. 6.
    negatives: "others", "unlabelled" or "all", see losses.knowledge.prototype_contrastive_loss.
    prototypes: the anchors of L_cl are "running" means without gradient, or "learnable".
    """

    kl_weight: float = 1.0
    cross_modal_weight: float = 3.0
    contrastive_weight: float = 3.0
    temperature: float = 0.07
    negatives: str = "others"
    prototypes: str = "running"


class Memory(NamedTuple):
    """The config's `memory` section. decay: of the running prototypes, in [0, 1)."""

    decay: float = 0.99


class _Parts(NamedTuple):
    """What the functions below are bound to."""

    model: knowledge.KnowledgeModel
    words: np.ndarray  # [K, N], zero for a word without a vector
    alone: bool  # a region attends to itself only
    loss: Loss
    memory: Memory


_SAMPLE_KEYS = ("features", "region_mask", "sample_region", "sample_word", "valid")
_CHOICES = {
    "negatives": ("others", "unlabelled", "all"),
    "prototypes": ("running", "learnable"),
}


def make(
    *,
    model: Mapping[str, Any],
    words: Float[np.ndarray, "K N"],
    regions: Sequence[int],
    samples: int,
    attention_set: str = "image",
    loss: Loss = Loss(),
    memory: Memory = Memory(),
    dtype=jnp.float32,
) -> Method:
    """The method, from plain arguments.

    Args:
      model: configuration of the networks (models/knowledge.py).
      words: the word vectors; samples of a word whose vector is zero do not count.
      regions: R of rows in training, and, if another, of images in evaluation.
      samples: Q of a row in training.
      attention_set: what a region attends to: the regions of its row ("image"), or nothing else
        ("region"), in matching as in training.
      loss: weights and choices of the losses.
      memory: of the running prototypes.
      dtype: compute dtype; parameters, losses and prototypes are float32.

    Raises:
      UserError: a choice of `loss` or `memory` that cannot be, or word vectors of another width
        than the model's.
    """
    _check(loss, memory)
    built = knowledge.build(model, dtype=dtype)
    width = built.config["word_width"]
    if words.shape[1] != width:
        raise UserError(f"word vectors have width {words.shape[1]}, model.knowledge says {width}")
    alone = attention_set == "region"
    parts = _Parts(built, np.asarray(words, np.float32), alone, loss, memory)
    most = tuple(dict.fromkeys(regions))
    rows = {"index": ArraySpec((None,), jnp.int32), "valid": ArraySpec((None,), jnp.bool_)}
    places = ArraySpec((None, samples), jnp.int32)

    def images(*sizes: int) -> BatchSpec:
        shape = (None, sizes, built.config["features"])
        return {
            "features": ArraySpec(shape, jnp.float32),
            "region_mask": ArraySpec((None, sizes), jnp.bool_),
        }

    return Method(
        specs={
            "train": {**images(most[0]), "sample_region": places, "sample_word": places, **rows},
            "eval": {**images(*most), **rows},
            "embed_image": images(*most),
            "samples": {**images(most[0]), "sample_region": places, "sample_word": places, **rows},
        },
        init=functools.partial(_init, parts),
        loss=functools.partial(_loss, parts),
        predict={
            "embed_image": functools.partial(_embed_image, parts),
            "samples": functools.partial(_all_samples, parts),
        },
        refresh=functools.partial(_refresh, parts, jax.jit(functools.partial(_add, parts))),
    )


def _init(parts: _Parts, key, *, pretrained):
    del pretrained  # there are no published weights
    model_key, anchor_key = jax.random.split(key)
    count, width = len(parts.words), parts.model.config["width"]
    params: dict[str, PyTree] = {"knowledge": knowledge.init(parts.model, model_key)}
    if parts.loss.prototypes == "learnable":
        params["prototypes"] = jax.random.normal(anchor_key, (count, width))
    extras = {
        "prototypes": memory_of_words.create(count, width),
        "word_vectors": jnp.asarray(parts.words),
    }
    return params, extras


def _loss(parts: _Parts, params, extras, batch: Batch, *, key, step, train) -> StepOutput:
    del step
    loss = parts.loss
    regions = batch["region_mask"] & batch["valid"][:, None]
    noise = jax.random.normal(key, (*regions.shape, parts.model.config["width"]))
    codes = parts.model.apply(params["knowledge"], batch["features"], regions, noise)
    assert isinstance(codes, knowledge.RegionCodes)
    # Every sample meets all others, and prototypes are gathered by word: on several devices each
    # has all samples.
    places = replicated(batch["sample_region"])
    word, where = _samples(parts, batch)
    mu = replicated(at_samples(codes.mu, places))
    mapped = replicated(at_samples(codes.words, places))
    anchors = params.get("prototypes", extras["prototypes"].vectors)
    kl, error = reconstruction_loss(
        codes.mu, codes.sigma, codes.reconstruction, batch["features"], where=regions
    )
    vectors = extras["word_vectors"][jnp.maximum(word, 0)]
    aligned, consistent = cross_modal_loss(mapped, vectors, mu, where=where)
    contrast = prototype_contrastive_loss(
        mu,
        anchors[jnp.maximum(word, 0)],
        word,
        region_numbers(places, regions.shape[1]),
        temperature=loss.temperature,
        negatives=loss.negatives,
        stop_prototypes=loss.prototypes == "running",
        where=where,
    )
    total = total_loss(
        loss.kl_weight * kl,
        error,
        aligned,
        consistent,
        contrast,
        regions=regions,
        samples=where,
        cross_modal_weight=loss.cross_modal_weight,
        contrastive_weight=loss.contrastive_weight,
    )
    if train:
        new = memory_of_words.update(
            extras["prototypes"], mu, word, decay=parts.memory.decay, where=where
        )
        extras = {**extras, "prototypes": new}
    metrics = {
        "loss_kl": Mean.of(kl, regions),
        "loss_reconstruction": Mean.of(error, regions),
        "loss_words": Mean.of(aligned, where),
        "loss_structure": Mean.of(consistent),
        "loss_prototypes": Mean.of(contrast, where),
        "regions": Mean.of(regions.sum()),
        "samples": Mean.of(where.sum()),
    }
    return StepOutput(total, extras, metrics)


def _samples(parts: _Parts, batch: Batch):
    """(word [S], which samples count [S]): those that have a word with a vector."""
    word = replicated(batch["sample_word"]).reshape(-1)
    has_vector = jnp.asarray(np.any(parts.words != 0, axis=1))
    valid = jnp.repeat(replicated(batch["valid"]), batch["sample_word"].shape[1])
    return word, valid & (word >= 0) & has_vector[jnp.maximum(word, 0)]


def _encode(parts: _Parts, params, batch: Batch) -> Any:
    features, mask = batch["features"], batch["region_mask"]
    if parts.alone:
        features, mask = features.reshape(-1, 1, features.shape[-1]), mask.reshape(-1, 1)
    mu: Any = parts.model.apply(params["knowledge"], features, mask, method="encode")
    return mu.reshape(*batch["region_mask"].shape, -1)


def _embed_image(parts: _Parts, params, extras, batch: Batch):
    del extras
    return {"regions": _encode(parts, params, batch), "mask": batch["region_mask"]}


def _all_samples(parts: _Parts, params, extras, batch: Batch):
    """What prototypes are the means of: mu and features [S, ..], the words, which samples count."""
    del extras
    places = replicated(batch["sample_region"])
    mu = replicated(at_samples(_encode(parts, params, batch), places))
    features = replicated(at_samples(batch["features"], places))
    word, where = _samples(parts, batch)
    return {"mu": mu, "features": features, "word": word, "where": where}


def _add(parts: _Parts, params: PyTree, sums: memory_of_words.Sums, batch: Batch):
    """The sums with a batch's regions."""
    found = _all_samples(parts, params, {}, batch)
    return memory_of_words.accumulate(sums, found["mu"], found["word"], where=found["where"])


def _refresh(
    parts: _Parts, add: Callable, params: PyTree, extras: PyTree, batches: Iterable[Batch]
) -> PyTree:
    """The exact prototypes: the mean of mu over all regions of each word (Eq. 2).

    add: `_add`, compiled once for all epochs.
    """
    sums = memory_of_words.create_sums(len(parts.words), parts.model.config["width"])
    for batch in batches:
        sums = add(params, sums, {name: batch[name] for name in _SAMPLE_KEYS})
    return {**extras, "prototypes": memory_of_words.finish(sums, extras["prototypes"])}


def _check(loss: Loss, memory: Memory) -> None:
    for field, choices in _CHOICES.items():
        value = getattr(loss, field)
        if value not in choices:
            raise UserError(f"loss.{field}={value!r} is none of {', '.join(choices)}")
    for field in ("kl_weight", "cross_modal_weight", "contrastive_weight"):
        if not getattr(loss, field) >= 0:
            raise UserError(f"loss.{field}={getattr(loss, field)} must be 0 or more")
    if not loss.temperature > 0:
        raise UserError(f"loss.temperature={loss.temperature} must be positive")
    if not 0 <= memory.decay < 1:
        raise UserError(f"memory.decay={memory.decay} must be in [0, 1)")

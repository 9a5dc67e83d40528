"""TRM-ML: text-region matching for multi-label recognition with missing labels.

Prompts and a one-layer decoder are tuned on a frozen CLIP. The decoder cuts out of every image a
region per class (CARL, Eq. 2-4); a region is matched with the text of its class (Eq. 1); a queue
of visual prototypes and a snapshot of the text features guess the labels nobody gave (MMCP,
Eq. 7-12). Every row of the paper's Tables 3, 4 and 6 is one field of `make`, `Loss` or `Memory`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trm_jax.losses import classification
from trm_jax.losses.contrastive import prototype_contrastive
from trm_jax.losses.cosine import normalize
from trm_jax.losses.distillation import bernoulli_kl, softmax_kl
from trm_jax.memory import prototype_bank, pseudo_labels
from trm_jax.methods import frozen_clip, trm_ml_settings
from trm_jax.methods.trm_ml_settings import Loss, Memory
from trm_jax.models.region_attention import (
    Mlp,
    RegionAttention,
    region_features,
    region_projection,
    text_projection,
    top_pixels,
    with_queries,
)
from trm_jax.types import (
    Array,
    Batch,
    BatchSpec,
    DataInfo,
    Key,
    Mean,
    Method,
    PyTree,
    StepOutput,
)


class _Matching(NamedTuple):
    """What the forward pass of a batch gives; logits are s_pos - s_neg."""

    dense: Array  # [n, hw, d]
    energies: Array | None  # [n, C, hw]
    regions: Array  # F_r [n, C, d]
    region_scores: tuple[Array, Array]  # (negative, positive) [n, C]
    query_scores: tuple[Array, Array] | None
    text: tuple[Array, Array]  # (negative, positive) [C, d]


class _Parts(NamedTuple):
    """The modules and settings that the functions below share."""

    clip: frozen_clip.FrozenClip
    attention: Any  # RegionAttention, or None for the baseline
    text_mlp: Mlp
    region_mlp: Mlp
    loss: Loss
    memory: Memory
    query_init: str
    baseline_pool: str
    initial_scale: float
    stage_two_step: int
    steps_per_epoch: int
    single_positive: bool
    num_classes: int
    width: int


def make(
    *,
    info: DataInfo,
    tokenizer,
    clip: Mapping[str, Any],
    inputs: BatchSpec,
    grid: tuple[int, int],
    dtype=jnp.float32,
    region_attention: bool = True,
    query_self_attention: bool = False,
    query_init: str = "text",
    attention_init: str = "xavier",
    baseline_pool: str = "mean",
    initial_scale: float = 20.0,
    prompts: frozen_clip.Prompts = frozen_clip.Prompts(),
    loss: Loss = Loss(),
    memory: Memory = Memory(),
) -> Method:
    """The method, from plain arguments.

    Args:
      info: class names, steps per epoch and the label protocol's kind.
      tokenizer: of the text tower.
      clip: configuration of the frozen towers (models/clip/towers.py).
      inputs: the image entry of a batch.
      grid: (h, w) of its dense features.
      dtype: compute dtype; parameters and losses are float32.
      region_attention: CARL. Without it (the baseline) regions are the image's pooled features,
        and KD, MMCL and MMCP, which need regions, are off whatever their settings.
      query_self_attention: classes attend to each other before they attend to the image.
      query_init: "text" (features of "a photo of a ...") or "normal" (0.02).
      attention_init: kernels of the attention: "xavier", or "identity" for few labels
        (models/region_attention.py).
      baseline_pool: "mean" of the dense features, or "global", the tower's own pooling.
      initial_scale: 1/tau at the start; clamped to 100.
      prompts, loss, memory: see there.

    Raises:
      UserError: a choice that does not exist or does not go together with another.
    """
    trm_ml_settings.check(loss, memory, query_init, attention_init, baseline_pool)
    if not region_attention:
        loss = loss._replace(distillation_weight=0.0, contrastive_weight=0.0)
        memory = memory._replace(pseudo_labels="none")
    width, classes = clip["embed_dim"], len(info.class_names)
    attention = RegionAttention(
        num_classes=classes,
        dim=width,
        self_attention=query_self_attention,
        kernel_init=attention_init,
        dtype=dtype,
    )
    parts = _Parts(
        clip=frozen_clip.make(info, tokenizer, clip, inputs, grid, prompts, dtype),
        attention=attention if region_attention else None,
        text_mlp=text_projection(width),
        region_mlp=region_projection(width),
        loss=loss,
        memory=memory,
        query_init=query_init,
        baseline_pool=baseline_pool,
        initial_scale=initial_scale,
        stage_two_step=round(memory.stage_one_epochs * info.steps_per_epoch),
        steps_per_epoch=info.steps_per_epoch,
        single_positive=info.single_positive,
        num_classes=classes,
        width=width,
    )
    return Method(
        specs=frozen_clip.batch_specs(inputs, classes),
        init=lambda key, *, pretrained: _init(parts, key, pretrained),
        loss=lambda params, extras, batch, *, key, step, train: _loss(
            parts, params, extras, batch, step
        ),
        predict=_predictions(parts),
    )


def _uses_bank(parts: _Parts) -> bool:
    return parts.loss.contrastive_weight > 0 or parts.memory.pseudo_labels in ("visual", "both")


def _init(parts: _Parts, key: Key, pretrained: PyTree | None) -> tuple[PyTree, PyTree]:
    keys = jax.random.split(key, 4)
    params = parts.clip.init(keys[0], pretrained=pretrained)
    params["log_inverse_temperature"] = jnp.log(jnp.float32(parts.initial_scale))
    vector = jnp.zeros((1, parts.width))
    if parts.attention is not None:
        region = parts.attention.init(keys[1], vector[None])["params"]
        if parts.query_init == "text":
            region = with_queries(region, parts.clip.photo_features(params))
        params["region_attention"] = region
    if parts.loss.contrastive_weight:
        params["projections"] = {
            "text": parts.text_mlp.init(keys[2], vector)["params"],
            "regions": parts.region_mlp.init(keys[3], vector)["params"],
        }
    extras: dict[str, Any] = {}
    if _uses_bank(parts):
        extras["bank"] = prototype_bank.create(parts.num_classes, parts.memory.slots, parts.width)
    if parts.memory.pseudo_labels in ("visual", "both"):
        extras["visual_thresholds"] = pseudo_labels.create(parts.num_classes)
    if parts.memory.pseudo_labels in ("text", "both"):
        extras["text_thresholds"] = pseudo_labels.create(parts.num_classes)
        extras["text_prototypes"] = jnp.zeros((parts.num_classes, parts.width), jnp.float32)
    return params, extras


def _scale(params: PyTree) -> Array:
    return jnp.exp(jnp.minimum(params["log_inverse_temperature"], jnp.log(100.0)))


def _match(features: Array, text: tuple[Array, Array], scale: Array) -> tuple[Array, Array]:
    """(s_neg, s_pos) [n, C]: cos(F_c, g_c) / tau with both prompts of each class (Eq. 1)."""
    unit = normalize(features)
    negative, positive = (jnp.einsum("ncd,cd->nc", unit, normalize(g)) * scale for g in text)
    return negative, positive


def _forward(parts: _Parts, params: PyTree, batch: Batch, text) -> _Matching:
    dense, pooled = parts.clip.image_features(params, batch)
    scale = _scale(params)
    if parts.attention is None:
        image = pooled if parts.baseline_pool == "global" else dense.astype(jnp.float32).mean(1)
        regions = jnp.broadcast_to(
            image.astype(jnp.float32)[:, None], (len(image), parts.num_classes, parts.width)
        )
        return _Matching(dense, None, regions, _match(regions, text, scale), None, text)
    variables = {"params": params["region_attention"]}
    energies, queried = parts.attention.apply(variables, dense)  # Eq. 2-3
    regions = region_features(energies, dense)  # Eq. 4
    return _Matching(
        dense, energies, regions, _match(regions, text, scale), _match(queried, text, scale), text
    )


def _remember(parts: _Parts, extras: PyTree, match: _Matching, labels, valid, step):
    """(pseudo-labels int8 [n, C], new extras): score, move thresholds, assign, push; in this
    order, so that no positive is compared with its own pixels."""
    memory, extras = parts.memory, dict(extras)
    stage_two = step >= parts.stage_two_step
    regions = jax.lax.stop_gradient(match.regions)
    settings = {"decay": memory.decay, "single_positive": parts.single_positive, "where": valid}
    votes = {"visual": jnp.zeros_like(labels), "text": jnp.zeros_like(labels)}
    if "visual_thresholds" in extras:
        similarity, available = prototype_bank.similarity(extras["bank"], regions)  # Eq. 7
        thresholds = pseudo_labels.update(
            extras["visual_thresholds"], similarity, labels, available=available, **settings
        )
        votes["visual"] = pseudo_labels.assign(similarity, thresholds, available)
        extras["visual_thresholds"] = thresholds
    if "text_thresholds" in extras:
        snapshot = jax.lax.stop_gradient(normalize(match.text[1]))
        prototypes = jnp.where(step == parts.stage_two_step, snapshot, extras["text_prototypes"])
        similarity = jnp.einsum("ncd,cd->nc", normalize(regions), prototypes)  # Eq. 8
        available = jnp.broadcast_to(stage_two, (parts.num_classes,))
        thresholds = pseudo_labels.update(
            extras["text_thresholds"], similarity, labels, available=available, **settings
        )
        votes["text"] = pseudo_labels.assign(similarity, thresholds, available)
        extras["text_thresholds"], extras["text_prototypes"] = thresholds, prototypes
    if "bank" in extras:
        assert match.energies is not None  # make drops the bank with the regions
        pixels = jax.lax.stop_gradient(top_pixels(match.energies, match.dense, memory.pixels))
        known = (labels == 1) & valid[:, None]
        extras["bank"] = prototype_bank.push(extras["bank"], pixels, known)
    if memory.pseudo_labels == "none":
        return jnp.zeros_like(labels), extras
    joined = pseudo_labels.combine(votes["visual"], votes["text"], modality=memory.pseudo_labels)
    unknown = (labels == 0) & valid[:, None]
    return jnp.where(stage_two & unknown, joined, 0).astype(jnp.int8), extras


def _classification(parts: _Parts, scores: tuple[Array, Array], targets, valid, step) -> Array:
    """L_cls per image [n] (Eq. 5); p = softmax over the pair = sigmoid(s_pos - s_neg)."""
    settings = parts.loss
    values = classification.classification_loss(
        settings.classification,
        scores[1] - scores[0],
        targets,
        epoch=step / parts.steps_per_epoch,
        where=valid,
        **{field: getattr(settings, field) for field in classification.SETTINGS},
    )
    return values.sum(-1) if settings.reduction == "sum" else values.mean(-1)


def _distillation(parts: _Parts, match: _Matching) -> Array:
    """KD per image [n]: the region level teaches the query level (Eq. 6)."""
    assert match.query_scores is not None
    stop = parts.loss.stop_teacher
    if parts.loss.distillation == "softmax":
        return softmax_kl(match.region_scores[1], match.query_scores[1], stop_teacher=stop)
    teacher = match.region_scores[1] - match.region_scores[0]
    student = match.query_scores[1] - match.query_scores[0]
    return bernoulli_kl(teacher, student, stop_teacher=stop).sum(-1)


def _contrast(parts: _Parts, params: PyTree, bank, match: _Matching, labels, valid) -> Array:
    """MMCL [] (Eq. 13): mean over the classes that have a positive, 0 without any."""
    mlps = params["projections"]

    def project(mlp: Mlp, weights: PyTree, vectors: Array) -> Array:
        return normalize(jnp.asarray(mlp.apply({"params": weights}, normalize(vectors))))

    values, present = prototype_contrastive(
        project(parts.text_mlp, mlps["text"], match.text[1]),
        project(parts.region_mlp, mlps["regions"], match.regions),
        labels,
        project(parts.region_mlp, mlps["regions"], bank.slots),
        prototype_bank.filled(bank),
        temperature=parts.loss.temperature,
        negatives=parts.loss.negatives,
        where=valid,
    )
    return Mean.of(values, present).value()


def _loss(parts: _Parts, params, extras, batch, step) -> StepOutput:
    settings, valid = parts.loss, batch["valid"]
    labels = jnp.where(valid[:, None], batch["labels"], 0).astype(jnp.int8)
    match = _forward(parts, params, batch, parts.clip.text_features(params))
    pseudo, new_extras = _remember(parts, extras, match, labels, valid, step)
    targets = jnp.where(labels != 0, labels, pseudo)
    automatic = settings.unknown == "auto" and parts.single_positive
    if settings.classification == "asl" and (settings.unknown == "negative" or automatic):
        targets = jnp.where((targets == 0) & valid[:, None], -1, targets)

    def classify(scores: tuple[Array, Array]) -> Array:
        return _classification(parts, scores, targets, valid, step)

    terms = {"loss_region": (settings.region_weight, classify(match.region_scores))}
    if match.query_scores is not None:
        terms["loss_query"] = (1.0, classify(match.query_scores))
    if settings.distillation_weight:
        terms["loss_distillation"] = (settings.distillation_weight, _distillation(parts, match))
    metrics = {name: Mean.of(values, valid) for name, (_, values) in terms.items()}
    total = sum(weight * metrics[name].value() for name, (weight, _) in terms.items())
    if settings.contrastive_weight:
        contrast = _contrast(parts, params, extras["bank"], match, labels, valid)
        metrics["loss_contrastive"] = Mean.of(contrast)
        total += settings.contrastive_weight * contrast
    metrics["logit_scale"] = Mean.of(_scale(params))
    if parts.memory.pseudo_labels != "none":
        # The hidden truth enters metrics only; these never reach the loss.
        unknown = (labels == 0) & valid[:, None] & (step >= parts.stage_two_step)
        metrics |= pseudo_labels.quality(pseudo, batch["truth"], unknown)
    return StepOutput(jnp.asarray(total), new_extras, metrics)


def _predictions(parts: _Parts) -> dict[str, Any]:
    predictions = {
        "prepare": lambda params, extras, batch: parts.clip.prepared(params),
        "scores": lambda params, extras, batch: {"scores": _predict(parts, params, batch)[0]},
        "dense": lambda params, extras, batch: parts.clip.cacheable(params, batch),
    }
    if parts.attention is not None:
        predictions["regions"] = lambda params, extras, batch: _regions(parts, params, batch)
    return predictions


def _predict(parts: _Parts, params: PyTree, batch: Batch) -> tuple[Array, _Matching]:
    """p_r [n, C]: inference is text-region matching alone."""
    if "text_positive" in batch:
        text = batch["text_negative"], batch["text_positive"]
    else:
        text = parts.clip.text_features(params)
    match = _forward(parts, params, batch, text)
    return jax.nn.sigmoid(match.region_scores[1] - match.region_scores[0]), match


def _regions(parts: _Parts, params: PyTree, batch: Batch) -> dict[str, Array]:
    """Scores [n, C] and maps [n, C, h, w] in [0, 1]: soft regions r = sigmoid(e)."""
    scores, match = _predict(parts, params, batch)
    assert match.energies is not None  # only offered with regions
    maps = jax.nn.sigmoid(match.energies)
    return {"scores": scores, "maps": maps.reshape(*maps.shape[:2], *parts.clip.grid)}

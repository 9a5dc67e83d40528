"""SimCon and MV-SimCon: two towers trained on captions that may not match their images.

Source: "Self-guided semantic alignment for text supervised segmentation". InfoNCE, the baseline,
is the same method with another `loss.name`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trm_jax.losses.cosine import normalize
from trm_jax.losses.simcon import (
    multi_label_loss,
    negative_cosine_similarity,
    simcon_loss,
)
from trm_jax.models.clip import towers
from trm_jax.models.predictor import SimSiamPredictor
from trm_jax.types import ArraySpec, Batch, BatchSpec, DataInfo, Mean, Method, StepOutput, UserError

_NAMES = ("infonce", "simcon", "mv_simcon")


class Loss(NamedTuple):
    """The config's `loss` section.

    name: "infonce", "simcon" or "mv_simcon", which takes two views of every image.
    thresholds, changes: lambda, and the shares of training after which it takes its next value;
        an infinite one is InfoNCE so far.
    joint_positives: two views share their positives (Eq. 8).
    ncs_weight: of the negative cosine similarity between the views (Eq. 9), 0 for none.
    self_similarity: "include" or "exclude", see losses/simcon.py.
    multi_label_weight: of GroupViT's multi-label loss, on `multi_label_nouns` nouns of a caption.
    direction_weight: factor of every anchor's term; 0 is 0.5 for "infonce" and 1 otherwise.
    implementation, columns, block: of the loss, see losses/simcon.py.
    dtype: in which similarities are computed, "float32" or "bfloat16".
    """

    name: str = "mv_simcon"
    thresholds: tuple[float, ...] = (0.95, 0.90, 0.85)
    changes: tuple[float, ...] = (2 / 30, 15 / 30)
    joint_positives: bool = True
    ncs_weight: float = 1.0
    self_similarity: str = "exclude"
    multi_label_weight: float = 0.0
    multi_label_nouns: int = 3
    direction_weight: float = 0.0
    implementation: str = "auto"
    columns: str = "gather"
    block: int = 0
    dtype: str = "float32"


class _Parts(NamedTuple):
    """What the functions below are bound to."""

    towers: Any
    clip: Mapping[str, Any]
    predictor: SimSiamPredictor | None
    loss: Loss
    image: str  # the batch key
    views: int
    microbatch: int
    max_scale: float
    total_steps: int


def make(
    *,
    clip: Mapping[str, Any],
    inputs: BatchSpec,
    info: DataInfo,
    text_length: int,
    loss: Loss = Loss(),
    dtype=jnp.float32,
    microbatch: int = 0,
    max_scale: float = 100.0,
    remat_image: bool = False,
    scan_image: bool = False,
    remat_text: bool = False,
) -> Method:
    """The method, from plain arguments.

    Args:
      clip: configuration of the towers (models/clip/towers.py).
      inputs: the image entry of a batch.
      info: its total_steps place the changes of the threshold.
      text_length: T, tokens of a caption.
      loss: which loss, with its choices.
      dtype: compute dtype of the towers; parameters and losses are float32.
      microbatch: examples that go through the towers at a time, 0 for all. The loss, the
        projectors and the predictor see the whole batch all the same, and the gradient is that
        of the whole batch (GradCache); the towers run a second time for it. Best a multiple of
        the devices: else parts of the batch travel among them.
      max_scale: upper limit of the learned logit scale 1/tau.
      remat_image, scan_image, remat_text: see towers.build.

    Raises:
      UserError: a choice of `loss` or `microbatch` that cannot be.
    """
    _check(loss, clip, microbatch)
    views = 2 if loss.name == "mv_simcon" else 1
    predicts = views == 2 and loss.ncs_weight > 0
    parts = _Parts(
        towers=towers.build(
            clip, dtype=dtype, remat_text=remat_text, remat_image=remat_image, scan_image=scan_image
        ),
        clip=clip,
        predictor=SimSiamPredictor(max(1, clip["embed_dim"] // 4)) if predicts else None,
        loss=loss,
        image=next(iter(inputs)),
        views=views,
        microbatch=microbatch,
        max_scale=max_scale,
        total_steps=info.total_steps,
    )
    specs = _specs(inputs, text_length, parts)
    predict = {"embed_image": _embed_image, "embed_text": _embed_text, "segments": _segments}
    return Method(
        specs=specs,
        init=functools.partial(_init, parts),
        loss=functools.partial(_loss, parts),
        predict={name: functools.partial(f, parts) for name, f in predict.items() if name in specs},
    )


def _init(parts: _Parts, key, *, pretrained):
    tower_key, head_key = jax.random.split(key)
    weights = dict(pretrained or towers.init(parts.clip, tower_key))
    params = {"clip": {"params": weights.pop("params")}}
    if parts.predictor is not None:
        head = parts.predictor.init(head_key, jnp.zeros((1, parts.clip["embed_dim"])))
        params["predictor"] = {"params": head["params"]}
        weights["predictor_stats"] = head["batch_stats"]
    return params, weights


def _loss(parts: _Parts, params, extras, batch, *, key, step, train) -> StepOutput:
    loss, valid = parts.loss, batch["valid"]
    images, text, extras = _embeddings(parts, params, extras, batch, key, train)
    threshold = None if loss.name == "infonce" else _threshold(loss, step, parts.total_steps)
    compute, scale = jnp.dtype(loss.dtype), _scale(parts, params)
    values, pairs = simcon_loss(
        tuple(image.astype(compute) for image in images),
        text.astype(compute),
        logit_scale=scale,
        threshold=threshold,
        joint_positives=loss.joint_positives,
        self_similarity=loss.self_similarity,
        where=valid,
        implementation=loss.implementation,
        columns=loss.columns,
        block=loss.block,
    )
    weight = loss.direction_weight or (0.5 if loss.name == "infonce" else 1.0)
    metrics = {
        "loss_contrastive": Mean.of(weight * values, valid),
        "matched_cosine": Mean.of((images[0] * text).sum(-1), valid),
        "logit_scale": Mean.of(scale),
    }
    total = metrics["loss_contrastive"].value()
    if threshold is not None:
        metrics |= {name: Mean.of(x, valid) for name, x in pairs._asdict().items()}
        # No cosine is above 1, and an infinite number is no JSON.
        metrics["threshold"] = Mean.of(jnp.minimum(threshold, 1.0))
    if parts.predictor is not None:
        between, extras = _between_views(parts, params, extras, images, valid, train)
        metrics["loss_ncs"] = Mean.of(between, valid)
        total = total + loss.ncs_weight * metrics["loss_ncs"].value()
    if loss.multi_label_weight:
        # No running statistics from these: evaluation sees captions and prompts of its own.
        nouns = _nouns(parts, params, extras, batch, train)
        labels = multi_label_loss(images[0], nouns, logit_scale=scale, where=valid)
        metrics["loss_multi_label"] = Mean.of(labels, valid)
        total = total + loss.multi_label_weight * metrics["loss_multi_label"].value()
    return StepOutput(total, extras, metrics)


def _embeddings(parts: _Parts, params, extras, batch, key, train):
    """(images of each view [n, d], texts [n, d], extras), unit norm."""
    valid, images = batch["valid"], []
    where = {"train": True, "where": valid} if train else {}
    for view in range(parts.views):
        # Folded from the row of the global batch, so that parts and devices do not matter.
        keys = _row_keys(jax.random.fold_in(key, view), valid.shape[0])
        pixels = batch[parts.image if view == 0 else f"{parts.image}_{view + 1}"]
        features, extras = _image_features(parts, params, extras, pixels, keys, train)
        image, extras = _apply(parts, params, extras, "project_image", features, **where)
        images.append(normalize(image))
    features = _text_features(parts, params, extras, batch["tokens"], train)
    text, extras = _apply(parts, params, extras, "project_text", features, **where)
    return tuple(images), normalize(text), extras


def _image_features(parts: _Parts, params, extras, images, keys, train):
    """([n, w] before the projector, extras), the whole batch or some examples at a time."""
    if not train:
        return _apply(parts, params, extras, "image_features", images)

    def some(part):
        pixels, keys = part
        return _apply(parts, params, extras, "image_features", pixels, keys=keys, train=True)

    if _whole(parts, images):
        return some((images, keys))
    return _in_parts(lambda part: some(part)[0], (images, keys), parts.microbatch), extras


def _text_features(parts: _Parts, params, extras, tokens, train):
    def some(part):
        return _apply(parts, params, extras, "text_features", part)[0]

    if not train or _whole(parts, tokens):
        return some(tokens)
    return _in_parts(some, tokens, parts.microbatch)


def _nouns(parts: _Parts, params, extras, batch, train):
    """Unit embeddings [n, m, d] of the prompts of each caption's nouns."""
    tokens = batch["noun_tokens"]
    flat = tokens.reshape(-1, tokens.shape[-1])
    features = _text_features(parts, params, extras, flat, train)
    counts = jnp.repeat(batch["valid"], tokens.shape[1])
    where = {"train": True, "where": counts} if train else {}
    text, _ = _apply(parts, params, extras, "project_text", features, **where)
    return normalize(text).reshape(*tokens.shape[:2], -1)


def _between_views(parts: _Parts, params, extras, images, valid, train):
    """(L_NCS [n], extras)."""
    head, stats, predicted = params["predictor"], extras["predictor_stats"], []
    assert parts.predictor is not None
    for image in images:
        out, new = parts.predictor.apply(
            {**head, "batch_stats": stats}, image, train, valid, mutable=["batch_stats"]
        )
        stats = new["batch_stats"] if train else stats
        predicted.append(normalize(out))
    values = negative_cosine_similarity((predicted[0], predicted[1]), images, where=valid)
    return values, {**extras, "predictor_stats": stats}


def _embed_image(parts: _Parts, params, extras, batch: Batch):
    (pooled, dense), _ = _apply(parts, params, extras, "encode_image", batch[parts.image])
    return {
        "embedding": normalize(pooled),
        "dense": dense.astype(jnp.float32),
        "global_embedding": pooled,
    }


def _embed_text(parts: _Parts, params, extras, batch: Batch):
    text, _ = _apply(parts, params, extras, "encode_text", batch["tokens"])
    return {"embedding": normalize(text), "projection": text}


def _segments(parts: _Parts, params, extras, batch: Batch):
    (groups, assignment, pooled), _ = _apply(parts, params, extras, "segment", batch["image"])
    return {
        "groups": normalize(groups),
        "assignment": assignment,
        "embedding": normalize(pooled),
        "logit_scale": _scale(parts, params),
    }


def _apply(parts: _Parts, params, extras, name: str, *arguments, train: bool = False, **options):
    """(outputs of a method of the towers, extras with new batch statistics)."""
    variables = dict(params["clip"])
    if "batch_stats" in extras:
        variables["batch_stats"] = extras["batch_stats"]
    if not train:
        return parts.towers.apply(variables, *arguments, method=name, **options), extras
    out, new = parts.towers.apply(
        variables, *arguments, method=name, mutable=["batch_stats"], train=True, **options
    )
    return out, {**extras, **new}


def _scale(parts: _Parts, params):
    learned = params["clip"]["params"]["logit_scale"]
    return jnp.exp(jnp.minimum(learned, jnp.log(parts.max_scale)))


def _whole(parts: _Parts, rows) -> bool:
    return not parts.microbatch or parts.microbatch >= rows.shape[0]


def _check(loss: Loss, clip: Mapping[str, Any], microbatch: int) -> None:
    if loss.name not in _NAMES:
        raise UserError(f"loss.name={loss.name!r} is none of {', '.join(_NAMES)}")
    if len(loss.thresholds) != len(loss.changes) + 1:
        raise UserError(
            f"loss.thresholds has {len(loss.thresholds)} values and loss.changes "
            f"{len(loss.changes)}; there is one change between two thresholds"
        )
    if loss.multi_label_weight and loss.multi_label_nouns < 1:
        raise UserError(f"loss.multi_label_nouns={loss.multi_label_nouns} must be 1 or more")
    if list(loss.changes) != sorted(loss.changes) or not all(0 < c < 1 for c in loss.changes):
        raise UserError(f"loss.changes={loss.changes} must be ascending shares in (0, 1)")
    for field, choices in (
        ("self_similarity", ("include", "exclude")),
        ("implementation", ("auto", "dense", "streaming")),
        ("columns", ("gather", "ring")),
        ("dtype", ("float32", "bfloat16")),
    ):
        if getattr(loss, field) not in choices:
            value = getattr(loss, field)
            raise UserError(f"loss.{field}={value!r} is none of {', '.join(choices)}")
    if microbatch < 0:
        raise UserError(f"train.microbatch={microbatch} must be 0 or more")
    if loss.name == "mv_simcon" and clip["image"]["kind"] == "features":
        raise UserError(
            "loss.name='mv_simcon' draws two views of every image; this data has precomputed "
            "features: use 'simcon' or 'infonce'"
        )
    if microbatch and clip["image"]["kind"] == "resnet":
        raise UserError(
            "train.microbatch: a ResNet's batch statistics would differ from those of the whole "
            "batch; use a vit or groupvit tower, or train.microbatch=0"
        )


def _threshold(loss: Loss, step, total_steps: int):
    """lambda at `step`; it changes at shares of the whole training."""
    passed = sum((step >= round(share * total_steps)) for share in loss.changes)
    return jnp.asarray(loss.thresholds, jnp.float32)[passed]


def _row_keys(key, size: int):
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(size))


def _in_parts(function, tree, size: int):
    """function over `size` rows at a time; only the rows are kept for the backward pass.

    A part takes every (n/size)-th row, so that each device finds its share of it at home.
    """
    rows = jax.tree.leaves(tree)[0].shape[0]
    if rows % size:
        raise UserError(f"train.microbatch={size} does not divide the {rows} rows of a batch")

    def split(x):
        return x.reshape(size, rows // size, *x.shape[1:]).swapaxes(0, 1)

    out = jax.lax.map(jax.checkpoint(function, prevent_cse=False), jax.tree.map(split, tree))
    return out.swapaxes(0, 1).reshape(rows, *out.shape[2:])


def _specs(inputs: BatchSpec, text_length: int, parts: _Parts) -> dict[str, BatchSpec]:
    tokens: BatchSpec = {"tokens": ArraySpec((None, text_length), jnp.int32)}
    train: dict[str, ArraySpec] = {
        **tokens,
        "index": ArraySpec((None,), jnp.int32),
        "valid": ArraySpec((None,), jnp.bool_),
    }
    if parts.views == 2:
        train[f"{parts.image}_2"] = inputs[parts.image]
    if parts.loss.multi_label_weight:
        shape = (None, parts.loss.multi_label_nouns, text_length)
        train["noun_tokens"] = ArraySpec(shape, jnp.int32)
    specs: dict[str, BatchSpec] = {
        "train": {**inputs, **train},
        "eval": {**inputs, "index": train["index"], "valid": train["valid"]},
        "embed_image": inputs,
        "embed_text": tokens,
    }
    if parts.image == "image":
        # A window may have another size than the training images.
        specs["segments"] = {"image": ArraySpec((None, None, None, 3), jnp.uint8)}
    return specs

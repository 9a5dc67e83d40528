"""Models that score images against captions, behind one interface for methods that match pairs.

Either a matching model, whose scores come from regions and words (models/matching), or the two
towers of a CLIP, whose scores are cosines of their embeddings.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trm_jax.losses.cosine import normalize
from trm_jax.models.clip import towers
from trm_jax.models.matching import model as matching
from trm_jax.models.matching import naaf, sgraf
from trm_jax.models.placement import replicated, sharded_rows
from trm_jax.types import ArraySpec, Batch, BatchSpec, PyTree, UserError

# Images that meet a block of captions at a time on a CPU: it is fastest where what there is of all
# their pairs stays in its cache (benchmarks/scoring.py). Accelerators take all of a batch.
_CPU_IMAGES = 32


class PairModel(NamedTuple):
    """A record of pure functions.

    width: d of the space of `contexts`.
    attends: whether words attend to regions, so that every word has a context of its own.
    init: (key, pretrained) -> (params, extras).
    scores: (params, extras, batch, key, train) -> (scores [n, n] float32, sides, extras); image i
        against caption j. `sides` is what `contexts` reads.
    contexts: (params, sides) -> [n, T, d], what each word of a caption sees of its own image; of
        two towers [n, 2, d], the embeddings of image and caption.
    predict: name -> (params, extras, batch) -> dict, see types.Method.
    specs: lengths T of texts -> specs of `predict` beyond embed_image and embed_text.
    """

    width: int
    attends: bool
    init: Callable
    scores: Callable
    contexts: Callable
    predict: Mapping[str, Callable]
    specs: Callable[[tuple[int, ...]], dict[str, BatchSpec]]


def build(config: Mapping[str, Any], inputs: BatchSpec, *, dtype, block: int) -> PairModel:
    """The pair model of a validated configuration, of `models.matching` or of CLIP's towers.

    Args:
      config: see models/matching/config.py and models/clip/config.py.
      inputs: the image entry of a batch.
      dtype: compute dtype of the encoders.
      block: captions that meet the images of a batch at a time, 0 for all; regions only.

    Raises:
      UserError: block is below 0, or is set for two towers.
    """
    if block < 0:
        raise UserError(f"model.options.block={block} must be 0 or more")
    if "scorer" in config:
        parts = _Regions(matching.build(config, dtype=dtype), config, block)
        predict = {
            "embed_image": _embed_image,
            "embed_text": _embed_text,
            "pair_scores": _pair_scores,
            "attention": _attention,
        }
        return PairModel(
            config["embed_dim"],
            True,
            functools.partial(_init_regions, parts),
            functools.partial(_region_scores, parts),
            lambda params, sides: _attend(parts, params, sides)[1],
            {name: functools.partial(f, parts) for name, f in predict.items()},
            functools.partial(_region_specs, config),
        )
    if block:
        raise UserError("model.options.block is for models that score regions; set it to 0")
    model = towers.build(config, dtype=dtype)
    image = next(iter(inputs))
    embed = {"embed_image": _embed_photo, "embed_text": _embed_caption}
    return PairModel(
        config["embed_dim"],
        False,
        functools.partial(_init_towers, config),
        functools.partial(_tower_scores, model, image),
        lambda params, sides: jnp.stack(sides, axis=1),
        {name: functools.partial(f, model, image) for name, f in embed.items()},
        lambda lengths: {},
    )


def in_blocks(
    config: Mapping[str, Any],
    score: Callable[..., Any],
    images: tuple[jax.Array, ...],
    captions: tuple[jax.Array, ...],
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """All scores of a matching model, see `models.matching.model.in_blocks`.

    Args:
      config: of the model.
      score: (*images, *captions) -> (scores, statistics); regions and words come prepared.
      images: regions [n, r, d] and more arrays [n, ...].
      captions: words [m, T, d], mask [m, T] and more arrays [m, ...].
      block: captions at a time, 0 for all.
    """

    # SAF's statistics are those of all images.
    whole = jax.default_backend() != "cpu" or config["kind"] == "sgraf"
    image_block = 0 if whole else _CPU_IMAGES * jax.device_count()
    return matching.in_blocks(score, images, captions, block=block, image_block=image_block)


class _Regions(NamedTuple):
    model: matching.MatchingModel
    config: Mapping[str, Any]
    block: int


def _init_regions(parts: _Regions, key, pretrained):
    del pretrained  # words and BERTs are put in later, see train/matching.py
    variables = matching.init(parts.model, key)
    extras = {name: tree for name, tree in variables.items() if name != "params"}
    if parts.config["kind"] == "naaf":
        extras["naaf"] = naaf.initial_state()
    return {"matching": {"params": variables["params"]}}, extras


def _variables(params, extras):
    statistics = {"batch_stats": extras["batch_stats"]} if "batch_stats" in extras else {}
    return {**params["matching"], **statistics}


def _region_scores(parts: _Regions, params, extras, batch: Batch, key, train: bool):
    text_key, image_key, caption_key = jax.random.split(key, 3)
    model, valid = parts.model, batch["valid"]
    apply: Any = functools.partial(model.apply, _variables(params, extras))
    # The images are cut over the devices, and every device meets all captions.
    regions = sharded_rows(apply(batch["features"], method="encode_image"))
    words, mask = apply(batch["tokens"], train, method="encode_text", rngs={"dropout": text_key})
    words, mask = replicated(words), replicated(mask & valid[:, None])
    images, new = apply(
        regions,
        train,
        valid,
        method="prepare_images",
        mutable=["batch_stats"] if train else [],
        rngs={"dropout": image_key},
    )
    captions = apply(words, mask, train, method="prepare_captions", rngs={"dropout": caption_key})
    extras = {**extras, **new}
    thresholds, extras = _thresholds(parts, extras, regions, words, mask, valid, train)

    def score(regions, images, valid, *captions):
        return apply(regions, images, *captions, train, valid, method="score")

    sides = (regions, images, valid), (words, mask, captions, thresholds)
    scores, statistics = in_blocks(parts.config, score, *sides, parts.block)
    if statistics.shape[1]:
        own = sgraf.with_statistics(extras["batch_stats"]["scorer"], statistics, mask.any(1))
        extras = {**extras, "batch_stats": {**extras["batch_stats"], "scorer": own}}
    if train and parts.config["kind"] == "naaf" and _update(parts) == "batch":
        state = naaf.update_batch(extras["naaf"], scores, regions, words, mask, where=valid)
        extras = {**extras, "naaf": state}
    return scores, (regions, words, mask), extras


def _thresholds(parts: _Regions, extras, regions, words, mask, valid, train: bool):
    """(NAAF's threshold of each caption [n], extras); zeros for the other scorers."""
    if parts.config["kind"] != "naaf":
        return jnp.zeros(valid.shape[0]), extras
    state = extras["naaf"]
    if not train:
        return jnp.broadcast_to(state.safe_threshold, valid.shape), extras
    if _update(parts) == "batch":
        return jnp.broadcast_to(state.threshold, valid.shape), extras
    scale = parts.config["scorer"]["attention_scale"]
    thresholds, state = naaf.update_sequential(
        state, regions, words, mask, where=valid, attention_scale=scale
    )
    return thresholds, {**extras, "naaf": state}


def _update(parts: _Regions) -> str:
    return parts.config["scorer"]["threshold_update"]


def _attend(parts: _Regions, params, sides):
    return parts.model.apply(params["matching"], *sides, method="attend")


def _embed_image(parts: _Regions, params, extras, batch: Batch):
    variables = _variables(params, extras)
    regions = parts.model.apply(variables, batch["features"], method="encode_image")
    whole = parts.model.apply(variables, regions, method="prepare_images")
    return {"regions": regions, "image_global": whole}


def _embed_text(parts: _Regions, params, extras, batch: Batch):
    variables = _variables(params, extras)
    words, mask = parts.model.apply(variables, batch["tokens"], method="encode_text")
    whole = parts.model.apply(variables, words, mask, method="prepare_captions")
    return {"words": words, "mask": mask, "caption_global": whole}


def _pair_scores(parts: _Regions, params, extras, batch: Batch):
    threshold = extras["naaf"].safe_threshold if "naaf" in extras else jnp.zeros(())
    thresholds = jnp.broadcast_to(threshold, batch["words"].shape[:1])
    variables = _variables(params, extras)

    def score(*both) -> Any:
        return parts.model.apply(variables, *both, method="score")

    images = batch["regions"], batch["image_global"]
    captions = batch["words"], batch["mask"], batch["caption_global"], thresholds
    return {"scores": in_blocks(parts.config, score, images, captions, parts.block)[0]}


def _attention(parts: _Regions, params, extras, batch: Batch):
    regions = _embed_image(parts, params, extras, batch)["regions"]
    text = _embed_text(parts, params, extras, batch)
    weights, _ = _attend(parts, params, (regions, text["words"], text["mask"]))
    return {"weights": weights}


def _region_specs(config: Mapping[str, Any], lengths: tuple[int, ...]) -> dict[str, BatchSpec]:
    image, width = config["image"], config["embed_dim"]
    whole = ArraySpec((None, width if config["kind"] == "sgraf" else 0), jnp.float32)
    tokens = ArraySpec((None, lengths), jnp.int32)
    features = ArraySpec((None, image["regions"], image["width"]), jnp.float32)
    return {
        "pair_scores": {
            "regions": ArraySpec((None, image["regions"], width), jnp.float32),
            "image_global": whole,
            "words": ArraySpec((None, lengths, width), jnp.float32),
            "mask": ArraySpec((None, lengths), jnp.bool_),
            "caption_global": whole,
        },
        "attention": {"features": features, "tokens": tokens},
    }


def _init_towers(config: Mapping[str, Any], key, pretrained):
    weights = dict(pretrained or towers.init(config, key))
    return {"clip": {"params": weights.pop("params")}}, weights


def _tower_scores(model, image: str, params, extras, batch: Batch, key, train: bool):
    valid = batch["valid"]
    keys = jax.random.split(key, valid.shape[0]) if train else None

    def both(m):
        pooled, _ = m.encode_image(batch[image], train, keys, valid)
        return pooled, m.encode_text(batch["tokens"], train, valid)

    variables, mutable = {**params["clip"], **extras}, list(extras) if train else []
    (pooled, text), new = model.apply(variables, mutable=mutable, method=both)
    sides = normalize(pooled), normalize(text)
    scores = jnp.einsum("nd,md->nm", *sides, precision="highest")
    return scores, sides, {**extras, **new}


def _embed_photo(model, image: str, params: PyTree, extras, batch: Batch):
    variables = {**params["clip"], **extras}
    pooled, dense = model.apply(variables, batch[image], method="encode_image")
    return {
        "embedding": normalize(pooled),
        "dense": dense.astype(jnp.float32),
        "global_embedding": pooled,
    }


def _embed_caption(model, image: str, params: PyTree, extras, batch: Batch):
    del image
    text = model.apply({**params["clip"], **extras}, batch["tokens"], method="encode_text")
    return {"embedding": normalize(text), "projection": text}

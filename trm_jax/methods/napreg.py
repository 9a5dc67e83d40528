"""NAPReg: image-text matching with the nouns of the captions as learnt proxies.

Source: "NAPReg: Nouns as proxies regularization for semantically aware cross-modal embeddings"
(WACV 2023) and its supplement. The model scores pairs (models/matching: SCAN, SGRAF, NAAF) or is a
pair of towers; a pair loss looks at the matrix of all scores of a batch, and beside it every pair
is drawn to the proxies of its nouns.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trm_jax.losses.contrastive import pair_info_nce
from trm_jax.losses.cosine import normalize
from trm_jax.losses.metric_learning import multi_similarity_loss, polynomial_loss, triplet_loss
from trm_jax.losses.noun_proxies import noun_proxy_loss, proxy_anchor_loss
from trm_jax.methods import pair_models
from trm_jax.types import (
    ArraySpec,
    BatchSpec,
    DataInfo,
    Mean,
    Method,
    StepOutput,
    UserError,
)


class Loss(NamedTuple):
    """The config's `loss` section.

    pair: "triplet", "multi_similarity", "polynomial" or "infonce", on the scores of all pairs.
    margin: of "triplet" and "polynomial".
    warmup_epochs: "triplet" takes the mean of violations, not the hardest, for so long.
    same_image: another caption of the image is a "negative" of it (the reference programs), or
        "ignore"; "multi_similarity" takes it for a positive.
    temperature: of "infonce".
    nouns: "nap" (Eq. 2), "proxy_anchor" (Eq. 1) or "none".
    noun_weight: of the noun term.
    context: a pair has one anchor, the mean over its nouns ("mean_nouns"), or one per noun.
    positives: the nouns of the "caption", or of all captions of the "image".
    alpha, beta, base, mining_margin: of "multi_similarity" and "nap", whose margin is `base`.
    proxy_scale, proxy_margin: of "proxy_anchor".
    reduction: "mean" over the pairs of a batch, or "sum".
    """

    pair: str = "multi_similarity"
    margin: float = 0.2
    warmup_epochs: float = 0.0
    same_image: str = "negative"
    temperature: float = 0.05
    nouns: str = "nap"
    noun_weight: float = 1.0
    context: str = "mean_nouns"
    positives: str = "caption"
    alpha: float = 2.0
    beta: float = 40.0
    base: float = 0.5
    mining_margin: float = 0.1
    proxy_scale: float = 32.0
    proxy_margin: float = 0.1
    reduction: str = "mean"


_CHOICES = {
    "pair": ("triplet", "multi_similarity", "polynomial", "infonce"),
    "same_image": ("negative", "ignore"),
    "nouns": ("nap", "proxy_anchor", "none"),
    "context": ("mean_nouns", "per_noun"),
    "positives": ("caption", "image"),
    "reduction": ("mean", "sum"),
}


class _Parts(NamedTuple):
    """What the functions below are bound to."""

    model: pair_models.PairModel
    loss: Loss
    proxies: int
    warmup_steps: int


def make(
    *,
    model: Mapping[str, Any],
    inputs: BatchSpec,
    info: DataInfo,
    buckets: Sequence[int],
    loss: Loss = Loss(),
    dtype=jnp.float32,
    block: int = 0,
) -> Method:
    """The method, from plain arguments.

    Args:
      model: configuration of a matching model (models/matching/config.py) or of CLIP's towers.
      inputs: the image entry of a batch.
      info: its num_proxies is the number of kept nouns, its steps_per_epoch places the warm-up.
      buckets: the lengths T that a batch's texts may have.
      loss: which losses, with their choices.
      dtype: compute dtype; parameters, scores and losses are float32.
      block: captions that meet the images of a batch at a time, 0 for all: it bounds the memory
        and changes no score. The scores are computed a second time in the backward pass.

    Raises:
      UserError: a choice of `loss` that cannot be.
    """
    _check(loss, info)
    if loss.pair == "multi_similarity" and model.get("scorer", {}).get("pooling") == "lse":
        raise UserError(
            "loss.pair='multi_similarity' compares scores with cosines, and those of LogSumExp "
            "pooling exceed 1; set model.matching.scorer.pooling='mean' or another loss.pair"
        )
    built = pair_models.build(model, inputs, dtype=dtype, block=block)
    if loss.context == "per_noun" and not built.attends:
        raise UserError("loss.context='per_noun' is for models that attend from words to regions")
    proxies = info.num_proxies if loss.nouns != "none" else 0
    warmup = round(loss.warmup_epochs * info.steps_per_epoch)
    parts = _Parts(built, loss, proxies, warmup)
    lengths = tuple(buckets)
    tokens = ArraySpec((None, lengths), jnp.int32)
    rows = {"index": ArraySpec((None,), jnp.int32), "valid": ArraySpec((None,), jnp.bool_)}
    nouns = {"noun_ids": tokens, "nouns": ArraySpec((None, None), jnp.int32)} if proxies else {}
    return Method(
        specs={
            "train": {**inputs, "tokens": tokens, **nouns, **rows},
            "eval": {**inputs, **rows},
            "embed_image": inputs,
            "embed_text": {"tokens": tokens},
            **built.specs(lengths),
        },
        init=functools.partial(_init, parts),
        loss=functools.partial(_loss, parts),
        predict=dict(built.predict),
    )


def _init(parts: _Parts, key, *, pretrained):
    model_key, proxy_key = jax.random.split(key)
    params, extras = parts.model.init(model_key, pretrained)
    if parts.proxies:
        proxies = jax.random.normal(proxy_key, (parts.proxies, parts.model.width))
        params = {**params, "proxies": proxies}
    return params, extras


def _loss(parts: _Parts, params, extras, batch, *, key, step, train) -> StepOutput:
    loss, valid = parts.loss, batch["valid"]
    scores, sides, extras = parts.model.scores(params, extras, batch, key, train)
    same = batch["index"][:, None] == batch["index"][None, :]
    values, metrics = _pair_values(parts, scores, same, valid, step)
    metrics |= {"loss_pair": Mean.of(values, valid), **_score_metrics(scores, same, valid)}
    total = _reduced(loss, values, valid)
    if parts.proxies:
        contexts = parts.model.contexts(params, sides)
        nouns, named = _noun_values(parts, params["proxies"], contexts, batch)
        metrics["named"] = Mean.of(named, valid)
        if nouns.ndim:
            metrics["loss_nouns"] = Mean.of(nouns, valid)
            nouns = _reduced(loss, nouns, valid)
        else:
            metrics["loss_nouns"] = Mean.of(nouns)
        total = total + loss.noun_weight * nouns
    return StepOutput(total, extras, metrics)


def _pair_values(parts: _Parts, scores, same, valid, step):
    """(the pair loss of each pair [n], metrics)."""
    loss = parts.loss
    ignored = same if loss.same_image == "ignore" else None
    if loss.pair == "multi_similarity":
        values = multi_similarity_loss(
            scores,
            same,
            alpha=loss.alpha,
            beta=loss.beta,
            base=loss.base,
            mining_margin=loss.mining_margin,
            where=valid,
        )
    elif loss.pair == "polynomial":
        values = polynomial_loss(scores, margin=loss.margin, same_image=ignored, where=valid)
    elif loss.pair == "infonce":
        values = pair_info_nce(scores / loss.temperature, ignored=ignored, where=valid)
    else:
        hardest = (step >= parts.warmup_steps).astype(jnp.float32)
        values = triplet_loss(
            scores, margin=loss.margin, hardest=hardest, same_image=ignored, where=valid
        )
    return values, {"active": Mean.of(values > 0, valid)}


def _score_metrics(scores, same, valid) -> dict[str, Mean]:
    """Means over the pairs: the score of the pair, and of its hardest caption of another image."""
    others = valid[None, :] & ~same
    hardest = jnp.where(others, scores, -jnp.inf).max(1)
    return {
        "score_matched": Mean.of(jnp.diagonal(scores), valid),
        "score_hardest": Mean.of(jnp.where(others.any(1), hardest, 0.0), valid & others.any(1)),
    }


def _noun_values(parts: _Parts, proxies, contexts, batch):
    """(the noun term of each pair [n], or one number for Proxy-Anchor; which pairs have a noun).

    contexts: [n, T, d], those of the words that begin a noun are read, or one of each modality,
    [n, 2, d], where all are.
    """
    loss, valid = parts.loss, batch["valid"]
    positives = _multi_hot(batch["nouns"], parts.proxies)
    marked = batch["noun_ids"] >= 0
    if not parts.model.attends:
        marked = jnp.broadcast_to(positives.any(1)[:, None], contexts.shape[:2])
    named = valid & marked.any(1) & positives.any(1)
    draw = functools.partial(noun_proxy_loss, alpha=loss.alpha, beta=loss.beta, margin=loss.base)
    count = jnp.maximum(marked.sum(1), 1)
    if parts.model.attends and loss.context == "mean_nouns":
        mean = (jnp.where(marked[..., None], normalize(contexts), 0.0)).sum(1) / count[:, None]
        if loss.nouns == "proxy_anchor":
            return _proxy_anchor(loss, mean, proxies, positives, named), named
        return draw(mean, proxies, positives, where=named), named
    anchors = contexts.reshape(-1, contexts.shape[-1])
    whose = jnp.repeat(positives, contexts.shape[1], axis=0)
    where = (marked & named[:, None]).reshape(-1)
    if not parts.model.attends:  # each modality is an anchor with all nouns of the pair
        if loss.nouns == "proxy_anchor":
            return _proxy_anchor(loss, anchors, proxies, whose, where), named
        values = draw(anchors, proxies, whose, where=where)
        return values.reshape(marked.shape).sum(1), named
    own = batch["noun_ids"].reshape(-1, 1) == jnp.arange(parts.proxies)[None]
    if loss.nouns == "proxy_anchor":
        return _proxy_anchor(loss, anchors, proxies, own, where, whose), named
    values = draw(anchors, proxies, own, excluded=whose, where=where)
    return values.reshape(marked.shape).sum(1) / count, named


def _proxy_anchor(loss: Loss, contexts, proxies, positives, where, excluded=None):
    return proxy_anchor_loss(
        contexts,
        proxies,
        positives,
        scale=loss.proxy_scale,
        margin=loss.proxy_margin,
        excluded=excluded,
        where=where,
    )


def _multi_hot(nouns, size: int):
    """Bool [n, size] of indices [n, P]; -1 is none."""
    hits = jnp.zeros((nouns.shape[0], size + 1), bool)
    rows = jnp.arange(nouns.shape[0])[:, None]
    return hits.at[rows, jnp.where(nouns < 0, size, nouns)].set(True)[:, :size]


def _reduced(loss: Loss, values, valid):
    mean = Mean.of(values, valid)
    return mean.total if loss.reduction == "sum" else mean.value()


def _check(loss: Loss, info: DataInfo) -> None:
    for field, choices in _CHOICES.items():
        value = getattr(loss, field)
        if value not in choices:
            raise UserError(f"loss.{field}={value!r} is none of {', '.join(choices)}")
    if loss.nouns != "none" and info.num_proxies < 1:
        raise UserError(
            "loss.nouns: no noun of the training captions is frequent enough to have a proxy; "
            "lower nouns.min_count or set loss.nouns='none'"
        )
    for field in ("temperature", "alpha", "beta", "proxy_scale"):
        if not getattr(loss, field) > 0:
            raise UserError(f"loss.{field}={getattr(loss, field)} must be positive")
    if loss.warmup_epochs and loss.pair != "triplet":
        raise UserError("loss.warmup_epochs is for loss.pair='triplet'; set it to 0")

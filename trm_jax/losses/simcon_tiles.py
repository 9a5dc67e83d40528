"""The arithmetic of SimCon on one tile of pairs, used by losses/simcon_streaming.py.

Every image (of each view) and every text is an anchor. Its candidates are all vectors of both
modalities: the cross part of its logits is taken with the other modality, the intra part with its
own. K = 2V kinds of anchors are stacked on a leading axis: the images of V views, then the texts
as seen against each view.

A tile holds the pairs of a block of rows with a block of columns. Along its rows it serves the
anchors of the row block, along its columns those of the column block; no tile is ever transposed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trm_jax.types import Array

# Stands for log 0: finite, so that nothing becomes inf - inf.
LOG_ZERO = -1e30


class Settings(NamedTuple):
    """What is known when the loss is traced.

    intra: whether there are intra-modal terms (SimCon) or none (InfoNCE).
    joint: an image pair is positive if it is so in either view (Eq. 8).
    exclude: leave an anchor's similarity with itself out of its candidates.
    """

    intra: bool
    joint: bool
    exclude: bool


class Block(NamedTuple):
    """Some of the batch's pairs: images of each view [n, d], texts [n, d], which count, who."""

    images: tuple[Array, ...]
    text: Array
    valid: Array  # [n] bool
    ids: Array  # [n] int32, positions in the global batch


class Stats(NamedTuple):
    """Running sums of every anchor over the candidates seen so far, each [K, n].

    peak, total: sum of exp(logit) as total * exp(peak). positive: sum over the positives of
    log(E^cross + E^intra). count: number of positives.
    """

    peak: Array
    total: Array
    positive: Array
    count: Array


class Pulls(NamedTuple):
    """What the gradient needs of every anchor, each [K, n].

    lse: log of the summed candidates. push: cotangent of the anchor. pull: push / |P|.
    """

    lse: Array
    push: Array
    pull: Array


class Gradient(NamedTuple):
    """Gradients of a block's images of each view and texts, each [n, d]."""

    images: tuple[Array, ...]
    text: Array


class _Term(NamedTuple):
    """The logits [a, b] of one kind of anchors with both modalities, and who is positive."""

    cross: Array
    intra: Array | None
    positive: Array


def no_stats(kinds: int, size: int, dtype) -> Stats:
    """Stats before any candidate was seen."""
    zeros = jnp.zeros((kinds, size), dtype)
    return Stats(jnp.full((kinds, size), LOG_ZERO, dtype), zeros, zeros, zeros)


def log_sum(stats: Stats) -> Array:
    """log of the summed exponentials [K, n]; 0 for an anchor without a candidate."""
    seen = stats.total > 0
    return jnp.where(seen, stats.peak + jnp.log(jnp.where(seen, stats.total, 1.0)), 0.0)


def visit(
    a: Block,
    b: Block,
    *,
    scale: Array,
    threshold: Array,
    settings: Settings,
    stats: tuple[Stats, ...],
) -> tuple[Stats, ...]:
    """The stats of the anchors of `a` after they have seen `b`; if given, also those of `b`.

    stats: of a, or of a and of b.
    """
    sides = _terms(a, b, scale, threshold, settings)
    return tuple(_gathered(sides[axis], before, axis=1 - axis) for axis, before in enumerate(stats))


def gradient(
    a: Block,
    b: Block,
    *,
    scale: Array,
    threshold: Array,
    settings: Settings,
    pulls: tuple[Pulls, Pulls],
    both: bool,
) -> tuple[Gradient, ...]:
    """What the tile adds to the gradient of `a`, and if `both`, of `b`; divided by the scale.

    The logits of a pair enter the losses of anchors of both blocks, so that the gradient of `a`
    is complete once it has met all columns: no gradient of the columns need be kept.
    """
    rows, cols = _terms(a, b, scale, threshold, settings)
    of_rows = [_slopes(term, pulls[0], kind, axis=1) for kind, term in enumerate(rows)]
    of_cols = [_slopes(term, pulls[1], kind, axis=0) for kind, term in enumerate(cols)]
    views = len(a.images)
    dtype = a.text.dtype
    # [a, b], of S^IT (image a, text b), of S^TI (text a, image b), of S^II and of S^TT.
    cross = [(of_rows[v][0] + of_cols[views + v][0]).astype(dtype) for v in range(views)]
    swapped = [(of_rows[views + v][0] + of_cols[v][0]).astype(dtype) for v in range(views)]
    images = texts = None
    if settings.intra:
        images = [(of_rows[v][1] + of_cols[v][1]).astype(dtype) for v in range(views)]
        texts = sum(of_rows[views + v][1] + of_cols[views + v][1] for v in range(views))
        texts = jnp.asarray(texts).astype(dtype)
    first = _combine(cross, swapped, images, texts, b, transposed=False)
    if not both:
        return (first,)
    return first, _combine(swapped, cross, images, texts, a, transposed=True)


def _combine(cross, swapped, images, texts, other: Block, *, transposed: bool) -> Gradient:
    def times(tile, vectors):
        contracted = ((0,), (0,)) if transposed else ((1,), (0,))
        return _dot(tile, vectors, contracted)

    of_images = [times(tile, other.text) for tile in cross]
    of_text = sum(times(t, z) for t, z in zip(swapped, other.images, strict=True))
    if images is not None:
        inner = [times(t, z) for t, z in zip(images, other.images, strict=True)]
        of_images = [x + y for x, y in zip(of_images, inner, strict=True)]
        of_text = of_text + times(texts, other.text)
    return Gradient(tuple(of_images), jnp.asarray(of_text))


def _terms(
    a: Block, b: Block, scale: Array, threshold: Array, settings: Settings
) -> tuple[list[_Term], list[_Term]]:
    """The K terms of the anchors of `a` (along rows) and of those of `b` (along columns)."""
    counts = a.valid[:, None] & b.valid[None]
    own = counts & (a.ids[:, None] == b.ids[None])
    views = range(len(a.images))
    cross = [_logits(a.images[v], b.text, scale, counts) for v in views]
    swapped = [_logits(a.text, b.images[v], scale, counts) for v in views]
    if not settings.intra:
        first = [_Term(x, None, own) for x in [*cross, *swapped]]
        return first, [_Term(x, None, own) for x in [*swapped, *cross]]
    images = [_dot(a.images[v], b.images[v], ((1,), (1,))) for v in views]
    texts = _dot(a.text, b.text, ((1,), (1,)))
    near = [own | (counts & (s >= threshold)) for s in images]  # Eq. 5
    if settings.joint:
        joined = near[0]
        for other in near[1:]:
            joined = joined | other  # Eq. 8
        near = [joined for _ in views]
    near_text = own | (counts & (texts >= threshold))
    candidates = counts & jnp.isfinite(threshold)
    candidates = candidates & ~own if settings.exclude else candidates
    intra = [jnp.where(candidates, scale * s, LOG_ZERO) for s in images]
    intra_text = jnp.where(candidates, scale * texts, LOG_ZERO)

    def terms(of_images, of_texts):
        return [
            *(_Term(of_images[v], intra[v], near[v]) for v in views),
            *(_Term(of_texts[v], intra_text, near_text) for v in views),
        ]

    return terms(cross, swapped), terms(swapped, cross)


def _gathered(terms: list[_Term], before: Stats, *, axis: int) -> Stats:
    """Stats with one more tile, summed along `axis`."""
    after = [
        _gather(term, Stats._make(x[kind] for x in before), axis) for kind, term in enumerate(terms)
    ]
    return Stats._make(jnp.stack(column) for column in zip(*after, strict=True))


def _gather(term: _Term, before: Stats, axis: int) -> Stats:
    parts = [term.cross] if term.intra is None else [term.cross, term.intra]
    peak = before.peak
    for part in parts:
        peak = jnp.maximum(peak, part.max(axis))
    # An anchor that has met only candidates that do not count has its peak at LOG_ZERO; lifted, so
    # that their exponentials are 0 and not 1.
    shift = jnp.expand_dims(jnp.maximum(peak, 0.5 * LOG_ZERO), axis)
    total = before.total * jnp.exp(before.peak - peak)
    for part in parts:
        total = total + jnp.exp(part - shift).sum(axis)
    both = term.cross if term.intra is None else jnp.logaddexp(term.cross, term.intra)
    positive = before.positive + jnp.where(term.positive, both, 0.0).sum(axis)
    count = before.count + term.positive.sum(axis).astype(before.count.dtype)
    return Stats(peak, total, positive, count)


def _slopes(term: _Term, pulls: Pulls, kind: int, *, axis: int) -> tuple[Array, Any]:
    """d loss / d logits of the anchors along `axis`: (cross [a, b], intra [a, b] or None)."""
    lse, push, pull = (jnp.expand_dims(x[kind], axis) for x in pulls)
    target = jnp.where(term.positive, pull, 0.0)
    if term.intra is None:
        return push * jnp.exp(term.cross - lse) - target, None
    share = jax.nn.sigmoid(term.cross - term.intra)
    cross = push * jnp.exp(term.cross - lse) - target * share
    return cross, push * jnp.exp(term.intra - lse) - target * (1.0 - share)


def _logits(x: Array, y: Array, scale: Array, counts: Array) -> Array:
    return jnp.where(counts, scale * _dot(x, y, ((1,), (1,))), LOG_ZERO)


def _dot(x: Array, y: Array, contracted) -> Array:
    """A matrix product that accumulates in float32 or wider and never rounds float32 operands."""
    return jax.lax.dot_general(
        x,
        y,
        (contracted, ((), ())),
        precision="highest",
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )

"""Contrastive losses: symmetric InfoNCE of pairs, and text-anchored prototype contrast (MMCL)."""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Bool, Float, Int

from trm_jax.types import Array

# Stands for log 0: finite, so that empty sets have finite values and zero gradients.
_LOG_ZERO = -1e30


def info_nce(
    images: Float[Array, "n d"],
    texts: Float[Array, "n d"],
    *,
    logit_scale: Float[Array, ""] | float,
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """Symmetric InfoNCE of aligned pairs: the mean of image-to-text and text-to-image.

    Source: Radford et al., "Learning transferable visual models from natural language
    supervision" (ICML 2021), Fig. 3.

    Args:
      images: [n, d], unit norm.
      texts: [n, d], unit norm; texts[i] belongs to images[i].
      logit_scale: [], multiplies the cosines (1 / temperature).
      where: [n], pairs that count; the others are neither anchors nor candidates.

    Returns:
      [n], in float32 or wider; zero for the pairs that do not count.
    """
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    images, texts = images.astype(dtype), texts.astype(dtype)
    if where is None:
        where = jnp.ones(images.shape[0], bool)
    # Zeroed, since 0 * NaN of a padded row would reach the gradients of the valid rows.
    images = jnp.where(where[:, None], images, 0.0)
    texts = jnp.where(where[:, None], texts, 0.0)
    # Accelerators round float32 operands by default, too coarse for a scale of 100.
    scores = jnp.einsum("nd,md->nm", images, texts, precision="highest")
    return pair_info_nce(logit_scale * scores, where=where)


def dense_info_nce(
    dense: Float[Array, "n hw d"],
    texts: Float[Array, "n d"],
    *,
    logit_scale: Float[Array, ""] | float,
    sharpness: float = 10.0,
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """InfoNCE in which a text looks for its own positions: aligns dense features with texts.

    The score of a pair is the mean of the cosines of all positions with the text, weighted by
    their softmax. Source: Mukhoti et al., "Open vocabulary semantic segmentation with patch
    aligned contrastive learning" (CVPR 2023), section 3.2.

    Args:
      dense: [n, hw, d], unit norm per position.
      texts: [n, d], unit norm; texts[i] belongs to dense[i].
      logit_scale: [], multiplies the scores.
      sharpness: of the softmax over positions.
      where: [n], pairs that count.

    Returns:
      [n], in float32 or wider; zero for the pairs that do not count.
    """
    dtype = jnp.promote_types(dense.dtype, jnp.float32)
    if where is None:
        where = jnp.ones(dense.shape[0], bool)
    dense = jnp.where(where[:, None, None], dense.astype(dtype), 0.0)
    texts = jnp.where(where[:, None], texts.astype(dtype), 0.0)
    cosines = jnp.einsum("npd,md->nmp", dense, texts, precision="highest")
    scores = (jax.nn.softmax(sharpness * cosines, axis=-1) * cosines).sum(-1)
    return pair_info_nce(logit_scale * scores, where=where)


def pair_info_nce(
    logits: Float[Array, "n n"],
    *,
    ignored: Bool[Array, "n n"] | None = None,
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """Symmetric InfoNCE of given logits, whatever scored the pairs.

    Args:
      logits: [n, n], image i against text j; the pairs stand on the diagonal.
      ignored: [n, n], pairs off the diagonal that are no negatives.
      where: [n], pairs that count; the others are neither anchors nor candidates.

    Returns:
      [n]; zero for the pairs that do not count.
    """
    if where is None:
        where = jnp.ones(logits.shape[0], bool)
    candidates = where[:, None] & where[None, :]
    if ignored is not None:
        candidates = candidates & (~ignored | jnp.eye(logits.shape[0], dtype=bool))
    logits = jnp.where(candidates, logits, _LOG_ZERO)
    values = 0.5 * (logsumexp(logits, axis=1) + logsumexp(logits, axis=0)) - jnp.diagonal(logits)
    return jnp.where(where, values, 0.0)


def prototype_contrastive(
    anchors: Float[Array, "C d"],
    regions: Float[Array, "n C d"],
    labels: Int[Array, "n C"],
    bank: Float[Array, "C L d"],
    filled: Bool[Array, "C L"],
    *,
    temperature: float = 0.2,
    negatives: str = "both",
    where: Bool[Array, " n"] | None = None,
) -> tuple[Float[Array, " C"], Bool[Array, " C"]]:
    """Multimodal contrastive loss (MMCL) with the text representation of each class as anchor.

    Per positive q+ of class c: -log exp(a.q+/T) / (exp(a.q+/T) + sum_N exp(a.q-/T)), averaged
    over the positives. Positives P: regions (i, c) with label +1 and filled slots of queue c.
    Negatives N: the positives of all other classes, and regions (i, c) with label -1.

    Source: TRM-ML, Eq. 13.

    Args:
      anchors: [C, d], projected, unit norm.
      regions: [n, C, d], projected region-level representations, unit norm.
      labels: [n, C] in {-1, 0, +1}, known labels only.
      bank: [C, L, d], projected queue slots, unit norm.
      filled: [C, L], slots that hold a prototype.
      temperature: T > 0.
      negatives: "other_classes", "known_negatives" (regions of class c labelled -1) or "both".
      where: [n], examples that count.

    Returns:
      values: [C], >= 0; zero for a class without a positive or whose N is empty.
      has_positive: [C], the classes to average over.

    Raises:
      ValueError: `negatives` is none of the three.
    """
    if negatives not in ("other_classes", "known_negatives", "both"):
        raise ValueError(f"negatives={negatives!r}; choose other_classes, known_negatives or both")
    dtype = jnp.promote_types(regions.dtype, jnp.float32)
    anchors, regions, bank = (x.astype(dtype) for x in (anchors, regions, bank))
    if where is not None:
        labels = jnp.where(where[:, None], labels, 0)
        regions = jnp.where(where[:, None, None], regions, 0.0)

    scale = 1.0 / temperature
    own = scale * jnp.einsum("cd,ncd->nc", anchors, regions, precision="highest")
    own_bank = scale * jnp.einsum("cd,cld->cl", anchors, bank, precision="highest")

    num_classes = anchors.shape[0]
    # mass[c, j]: log of the summed exp(a_c.q/T) of the negatives that class j gives to anchor c.
    mass = jnp.full((num_classes, num_classes), _LOG_ZERO, dtype)
    if negatives != "known_negatives":
        mass = _class_mass(anchors, regions, labels == 1, bank, filled, scale)
    own_negatives = jnp.full(num_classes, _LOG_ZERO, dtype)
    if negatives != "other_classes":
        own_negatives = logsumexp(jnp.where(labels == -1, own, _LOG_ZERO), axis=0)
    # A class's own candidates are its positives; its place on the diagonal goes to its negatives.
    mass = jnp.where(jnp.eye(num_classes, dtype=bool), own_negatives[:, None], mass)
    log_negatives = logsumexp(mass, axis=1)

    # -log(e^s / (e^s + N)) = softplus(log N - s).
    in_batch = jnp.where(labels == 1, jax.nn.softplus(log_negatives[None] - own), 0.0)
    in_bank = jnp.where(filled, jax.nn.softplus(log_negatives[:, None] - own_bank), 0.0)
    count = jnp.sum(labels == 1, axis=0) + jnp.sum(filled, axis=1)
    values = (in_batch.sum(axis=0) + in_bank.sum(axis=1)) / jnp.maximum(count, 1)
    return values, count > 0


def _class_mass(anchors, regions, is_positive, bank, filled, scale):
    """[C, C]: log sum exp of anchor c against the candidates (batch and queue) of class j."""
    batch = scale * jnp.einsum("cd,njd->cnj", anchors, regions, precision="highest")
    batch_mass = logsumexp(jnp.where(is_positive[None], batch, _LOG_ZERO), axis=1)
    queue = scale * jnp.einsum("cd,jld->cjl", anchors, bank, precision="highest")
    queue_mass = logsumexp(jnp.where(filled[None], queue, _LOG_ZERO), axis=2)
    return jnp.logaddexp(batch_mass, queue_mass)

"""The loss that fits a knowledge to unpaired images and texts of one domain.

Source: "Multimodal aligned semantic knowledge for unpaired image-text matching" (MASK), appendix H,
Eq. 88-93. Letters: J words, I regions, Z the width of prototypes and regions.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from trm_jax.losses.cosine import normalize
from trm_jax.losses.metric_learning import log1p_sum_exp
from trm_jax.types import Array

_LOG_ZERO = -1e30


def cycle_consistency_loss(
    transform: Float[Array, "Z Z"],
    words: Float[Array, "J Z"],
    regions: Float[Array, "I Z"],
    *,
    words_where: Bool[Array, " J"] | None = None,
    regions_where: Bool[Array, " I"] | None = None,
) -> tuple[Float[Array, " J"], Float[Array, " I"]]:
    """L_ss: a word made of the regions like it should be that word again, and the other way round.

    With u and mu of unit norm, and the softmaxes over the last axis:

        S = uW (mu W)^T,  u^ = softmax(S) mu W,  mu^ = softmax(S^T) uW
        -log softmax(uW u^^T)_jj  of each word,  -log softmax(mu W mu^^T)_ii  of each region

    L_ss is the sum of all of them. W meets both sides, so what it learns is the form W W^T: which
    directions of the space count how much. It holds some matrices [I, I], which for 4,608 regions
    have 85 MB each.

    Args:
      transform: [Z, Z], W.
      words: [J, Z], the prototype u of each word of the texts, of any length. A word may stand
        there once only: its second place would be a wrong answer for the first.
      regions: [I, Z], mu of the images, of any length.
      words_where: [J], words that count; the others are neither asked for nor answers nor averaged.
      regions_where: [I], regions that count.

    Returns:
      The words' terms [J] and the regions' [I], float32 or wider, >= 0; 0 for what does not count.
    """
    words, words_where = _unit(words, words_where)
    regions, regions_where = _unit(regions, regions_where)
    words, regions = (_product(side, transform) for side in (words, regions))
    similarity = _product(words, regions.T)
    from_regions = _product(_weights(similarity, regions_where), regions)
    from_words = _product(_weights(similarity.T, words_where), words)
    return (
        _cross_entropy(_product(words, from_regions.T), words_where),
        _cross_entropy(_product(regions, from_words.T), regions_where),
    )


def _unit(vectors: Array, where: Array | None) -> tuple[Array, Array]:
    """Unit vectors, zero where they do not count, and which count."""
    if where is None:
        where = jnp.ones(vectors.shape[0], bool)
    # Zeroed, since 0 * NaN of a padded entry would reach the gradients of the others.
    return normalize(jnp.where(where[:, None], vectors, 0.0)), where


def _product(a: Array, b: Array) -> Array:
    """A matrix product in full float32, which accelerators round by default."""
    return jnp.matmul(a, b, precision="highest")


def _weights(similarity: Array, where: Array) -> Array:
    """Softmax of each row over the columns that count; finite where none does."""
    return jax.nn.softmax(jnp.where(where[None], similarity, _LOG_ZERO), axis=1)


def _cross_entropy(logits: Array, where: Array) -> Array:
    """Of each row's softmax over what counts against the row's own column; 0 for other rows."""
    others = where[None] & ~jnp.eye(logits.shape[0], dtype=bool)
    values = log1p_sum_exp(logits - jnp.diagonal(logits)[:, None], others, axis=1)
    return jnp.where(where, values, 0.0)

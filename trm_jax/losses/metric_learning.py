"""Pair losses of cross-modal retrieval, on the matrix of all scores, with negatives mined in it.

All take scores [n, n] (image i against caption j, the pairs on the diagonal) of any unit, and
return one value per pair: that of its image as the anchor among all captions plus that of its
caption as the anchor among all images. Whoever calls takes the sum or the mean over the batch.
Mining is by comparison and carries no gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Bool, Float

from trm_jax.types import Array

# Stands for log 0 and for no score at all: finite, so that empty sets have zero gradients.
_LOG_ZERO = -1e30


def triplet_loss(
    scores: Float[Array, "n n"],
    *,
    margin: float = 0.2,
    hardest: Float[Array, ""] | Bool[Array, ""] | float | bool = 1.0,
    same_image: Bool[Array, "n n"] | None = None,
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """Hinge on every negative of an anchor, or on its hardest, or a blend of the two.

    With violation_j = [margin + s_j - s_own]+ over the negatives j of an anchor:

        (1 - hardest) mean_j violation_j + hardest max_j violation_j

    The hardest negatives alone may collapse all scores to one, where this loss is 2 margin per
    pair; so runs start from the mean. The mean counts every negative, violated or not: it never
    exceeds the maximum. The "sum of hinges" (VSE0) of VSE++'s program is the mean times the number
    of negatives, n - 1 where only the diagonal is masked; its "max of hinges" is our maximum. Both
    are summed over the batch there. Tied hardest negatives share the gradient.

    Source: Faghri et al., "VSE++: improving visual-semantic embeddings with hard negatives" (BMVC
    2018), its SH and MH losses.

    Args:
      scores: [n, n].
      margin: in the unit of the scores.
      hardest: [] in [0, 1], share of the maximum; may be traced.
      same_image: [n, n], pairs that show the same image, which are no negatives of each other;
        None masks the diagonal only, as VSE++ and SCAN do.
      where: [n], pairs that count; the others are neither anchors nor candidates.

    Returns:
      [n], >= 0, float32 or wider; an anchor without a negative adds 0.
    """
    scores, positives, negatives = _candidates(scores, same_image, where)
    weight = jnp.asarray(hardest, scores.dtype)

    def anchors(scores, _, negatives):
        own = jnp.diagonal(scores)
        violations = jax.nn.relu(margin + scores - own[:, None])
        total = jnp.where(negatives, violations, 0.0).sum(1)
        mean = total / jnp.maximum(negatives.sum(1), 1)
        maximum = jax.nn.relu(margin + _greatest(scores, negatives) - own)
        return (1.0 - weight) * mean + weight * maximum

    return _both_directions(anchors, scores, positives, negatives)


def multi_similarity_loss(
    scores: Float[Array, "n n"],
    same_image: Bool[Array, "n n"],
    *,
    alpha: float = 2.0,
    beta: float = 40.0,
    base: float = 0.5,
    mining_margin: float = 0.1,
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """Multi-Similarity loss between images and captions, on mined positives and negatives.

    Of an anchor's candidates it keeps the negatives with s + mining_margin > its least positive and
    the positives with s - mining_margin < its greatest negative. Both are empty where the least
    positive leads the greatest negative by the margin, and the anchor adds 0. On what is kept:

        1/alpha log(1 + sum_pos exp(-alpha (s - base)))
          + 1/beta log(1 + sum_neg exp(beta (s - base)))

    The authors' program (msight-tech/research-ms-loss) compares a batch with itself and therefore
    drops positives with s > 1 - 1e-5; between two modalities nothing is its own match, so a perfect
    pair stays. With scores above 1, as LogSumExp pooling has them, base = 0.5 means little.

    Source: Wang et al., "Multi-similarity loss with general pair weighting for deep metric
    learning" (CVPR 2019); the defaults are NAPReg's (supplement, section 5).

    Args:
      scores: [n, n].
      same_image: [n, n], symmetric: pairs that share their image are positives of each other. The
        diagonal is taken as positive in any case.
      alpha: > 0, scale of the positives.
      beta: > 0, scale of the negatives.
      base: lambda, the score that parts the two.
      mining_margin: epsilon, in the unit of the scores.
      where: [n], pairs that count; the others are neither anchors nor candidates.

    Returns:
      [n], >= 0, float32 or wider.
    """
    scores, positives, negatives = _candidates(scores, same_image, where)

    def anchors(scores, positives, negatives):
        least = -_greatest(-scores, positives)
        greatest = _greatest(scores, negatives)
        # "Not <=" instead of ">" keeps a NaN: dropped, it would pass for a loss of 0.
        hard_negatives = negatives & ~(scores + mining_margin <= least[:, None])
        hard_positives = positives & ~(scores - mining_margin >= greatest[:, None])
        pull = log1p_sum_exp(-alpha * (scores - base), hard_positives, axis=1) / alpha
        push = log1p_sum_exp(beta * (scores - base), hard_negatives, axis=1) / beta
        return pull + push

    return _both_directions(anchors, scores, positives, negatives)


def polynomial_loss(
    scores: Float[Array, "n n"],
    *,
    positive: tuple[float, ...] = (0.2, -0.7, 0.5),
    negative: tuple[float, ...] = (0.9, -0.4, 0.03),
    margin: float = 0.2,
    same_image: Bool[Array, "n n"] | None = None,
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """Universal weighting ("Polyloss"): polynomials of the own score and of the hardest negative.

    Where s_hard + margin > s_own, an anchor costs [positive(s_own)]+ + [negative(s_hard)]+, else
    0. The defaults are made for cosines: negative() is 0 from 0.096 to 0.349 and grows again below,
    positive() is 0 from 1 to 2.5 and grows again above. Tied hardest negatives share the gradient.

    Source: Wei et al., "Universal weighting metric learning for cross-modal matching" (CVPR 2020),
    and the coefficients of its public programs, which leave out anchors with an own score above
    1 - 1e-5; here they stay.

    Args:
      scores: [n, n].
      positive: coefficients for the own score, the highest power first.
      negative: coefficients for the hardest negative, the highest power first.
      margin: in the unit of the scores.
      same_image: [n, n], pairs that show the same image, which are no negatives of each other;
        None masks the diagonal only.
      where: [n], pairs that count; the others are neither anchors nor candidates.

    Returns:
      [n], >= 0, float32 or wider; an anchor without a negative adds 0.
    """
    scores, positives, negatives = _candidates(scores, same_image, where)
    of_own, of_worst = (jnp.asarray(c, scores.dtype) for c in (positive, negative))

    def anchors(scores, _, negatives):
        own = jnp.diagonal(scores)
        worst = _greatest(scores, negatives)
        cost = jax.nn.relu(jnp.polyval(of_own, own)) + jax.nn.relu(jnp.polyval(of_worst, worst))
        # "Not <=" keeps a NaN, as in the Multi-Similarity loss.
        return jnp.where(~(worst + margin <= own), cost, 0.0)

    return _both_directions(anchors, scores, positives, negatives)


def log1p_sum_exp(
    x: Float[Array, "..."], members: Bool[Array, "..."], *, axis: int
) -> Float[Array, "..."]:
    """log(1 + sum over the members of exp(x)) along `axis`, without overflow.

    Args:
      x: any shape.
      members: the shape of `x`, entries that are summed.
      axis: the axis of the sum.

    Returns:
      `x` without `axis`, >= 0; exactly 0 with a zero gradient where nothing is a member.
    """
    return jax.nn.softplus(logsumexp(jnp.where(members, x, _LOG_ZERO), axis=axis))


def _candidates(scores: Array, same_image: Array | None, where: Array | None):
    """Scores [n, n] in float32 or wider, 0 where not counted; positives and negatives [n, n]."""
    own = jnp.eye(scores.shape[0], dtype=bool)
    positives = own if same_image is None else own | same_image
    counts = jnp.ones_like(own) if where is None else where[:, None] & where[None]
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    # Zeroed, since 0 * NaN of a padded row would reach the gradients of the valid rows.
    return jnp.where(counts, scores, 0.0), positives & counts, ~positives & counts


def _greatest(scores: Array, members: Array) -> Array:
    """The greatest score [n] of each row's members, far below all scores where it has none."""
    return jnp.where(members, scores, _LOG_ZERO).max(1)


def _both_directions(
    anchors: Callable[[Array, Array, Array], Array],
    scores: Array,
    positives: Array,
    negatives: Array,
) -> Array:
    """Values [n] of the rows as anchors (images) plus those of the columns (captions)."""
    return anchors(scores, positives, negatives) + anchors(scores.T, positives.T, negatives.T)

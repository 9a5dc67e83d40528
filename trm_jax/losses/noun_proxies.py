"""Nouns as proxies: every kept noun has a learnt vector that the pairs naming it are drawn to.

Source: NAPReg ("Nouns as proxies regularization for semantically aware cross-modal embeddings",
WACV 2023), Eq. 2, and the Proxy-Anchor loss that it compares with, Eq. 1.
"""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from trm_jax.losses.cosine import normalize
from trm_jax.losses.metric_learning import log1p_sum_exp
from trm_jax.types import Array


def noun_proxy_loss(
    context: Float[Array, "a d"],
    proxies: Float[Array, "P d"],
    positives: Bool[Array, "a P"],
    *,
    alpha: float = 2.0,
    beta: float = 40.0,
    margin: float = 0.5,
    excluded: Bool[Array, "a P"] | None = None,
    where: Bool[Array, " a"] | None = None,
) -> Float[Array, " a"]:
    """NAPReg: an anchor is drawn to the proxies of its nouns and pushed from all others; Eq. 2.

        1/alpha log(1 + sum_{p in P+} exp(-alpha (S_p - margin)))
          + 1/beta log(1 + sum_{p in P-} exp(beta (S_p - margin)))

    with S_p the cosine of the anchor's noun context vector and proxy p. An anchor is a pair, whose
    nouns are all positive, or one noun of a pair: then its own proxy alone is positive, and the
    caption's other nouns are `excluded`.

    Args:
      context: [a, d], noun context vectors of any length.
      proxies: [P, d], of any length.
      positives: [a, P], P+ of each anchor.
      alpha: > 0, scale of the positives.
      beta: > 0, scale of the negatives.
      margin: lambda, the cosine that parts the two.
      excluded: [a, P], proxies that are no negatives either; where an entry is positive as well,
        it stays positive, so that the mask may hold all nouns of the caption. P- is the rest.
      where: [a], anchors that count.

    Returns:
      [a], >= 0, float32 or wider; 0 for an anchor that does not count or has no positive, whatever
      its context vector holds.
    """
    counts = positives.any(1) if where is None else positives.any(1) & where
    cosines = _cosines(context, proxies, counts)
    negatives = ~positives if excluded is None else ~(positives | excluded)
    pull = log1p_sum_exp(-alpha * (cosines - margin), positives, axis=1) / alpha
    push = log1p_sum_exp(beta * (cosines - margin), negatives, axis=1) / beta
    return jnp.where(counts, pull + push, 0.0)


def proxy_anchor_loss(
    context: Float[Array, "a d"],
    proxies: Float[Array, "P d"],
    positives: Bool[Array, "a P"],
    *,
    scale: float = 32.0,
    margin: float = 0.1,
    negatives_over: str = "all",
    excluded: Bool[Array, "a P"] | None = None,
    where: Bool[Array, " a"] | None = None,
) -> Float[Array, ""]:
    """Proxy-Anchor: a proxy draws the examples that name it and pushes the others; Eq. 1.

        1/|P+| sum_{p in P+} log(1 + sum_{x in X_p+} exp(-scale (S_xp - margin)))
          + 1/|P| sum_p log(1 + sum_{x in X_p-} exp(scale (S_xp + margin)))

    P+ are the proxies with a positive in the batch, X_p+ the examples that name p, X_p- the others.
    An example without a positive has no noun context vector: it is no negative either.

    Source: Kim et al., "Proxy anchor loss for deep metric learning" (CVPR 2020), with its
    scale and margin; NAPReg's supplement, section 5, has 2 and 0.5.

    Args:
      context: [a, d], noun context vectors of any length.
      proxies: [P, d], of any length.
      positives: [a, P], the nouns of each example.
      scale: alpha_1.
      margin: lambda_1, in cosines.
      negatives_over: the proxies of the second term: "all", or "present" (P+).
      excluded: [a, P], proxies that an example is no negative of either, see noun_proxy_loss.
      where: [a], examples that count.

    Returns:
      [], >= 0, float32 or wider; 0 if no example counts.

    Raises:
      ValueError: `negatives_over` is neither.
    """
    if negatives_over not in ("all", "present"):
        raise ValueError(f"negatives_over={negatives_over!r}; choose all or present")
    counts = positives.any(1) if where is None else positives.any(1) & where
    cosines = _cosines(context, proxies, counts)
    others = ~positives if excluded is None else ~(positives | excluded)
    drawn, pushed = positives & counts[:, None], others & counts[:, None]
    present = drawn.any(0)
    number = jnp.maximum(present.sum(), 1)
    # A proxy without a positive adds exactly 0 to the first sum.
    pull = log1p_sum_exp(-scale * (cosines - margin), drawn, axis=0).sum() / number
    push = log1p_sum_exp(scale * (cosines + margin), pushed, axis=0)
    if negatives_over == "present":
        return pull + jnp.where(present, push, 0.0).sum() / number
    return pull + push.mean()


def _cosines(context: Array, proxies: Array, counts: Array) -> Array:
    """Cosines [a, P] of contexts and proxies, 0 for anchors that do not count."""
    # Zeroed, since 0 * NaN of a padded row would reach the gradients of the proxies.
    context = jnp.where(counts[:, None], context, 0.0)
    return jnp.einsum("ad,pd->ap", normalize(context), normalize(proxies), precision="highest")

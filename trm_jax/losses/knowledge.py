"""MASK's losses: information retention, cross-modal alignment and prototype consistency.

Source: "Multimodal aligned semantic knowledge for unpaired image-text matching" (MASK), Eq. 5, 6,
9 and 14, appendix F. Letters: n rows of R regions, D the width of their features, Z of mu, N of the
word vectors. A sample is one (region, word) pair, so that a region with two words is two samples
with the same mu; S is their number.

All values are float32 or wider. Whatever a masked entry holds reaches no value and no gradient.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from trm_jax.losses.cosine import normalize
from trm_jax.losses.metric_learning import log1p_sum_exp
from trm_jax.types import Array

_LEAST_SIGMA = 1e-12


def reconstruction_loss(
    mu: Float[Array, "n R Z"],
    sigma: Float[Array, "n R Z"],
    reconstruction: Float[Array, "n R D"],
    features: Float[Array, "n R D"],
    *,
    where: Bool[Array, "n R"] | None = None,
) -> tuple[Float[Array, "n R"], Float[Array, "n R"]]:
    """L_ir: how far a region's Gaussian is from N(0, I), and its features from themselves; Eq. 5.

        KL = 1/2 sum_Z (mu^2 + sigma^2 - 1 - 2 log sigma),  error = sum_D (r' - r)^2

    Args:
      mu: [n, R, Z].
      sigma: [n, R, Z], standard deviations > 0; below 1e-12 the logarithm is that of 1e-12.
      reconstruction: [n, R, D], r'.
      features: [n, R, D], r, of any float type.
      where: [n, R], regions that count.

    Returns:
      KL and error [n, R], >= 0 (KL up to rounding); 0 for the regions that do not count.
    """
    dtype = jnp.promote_types(mu.dtype, jnp.float32)
    mu, sigma, reconstruction, features = (
        x.astype(dtype) for x in (mu, sigma, reconstruction, features)
    )
    gap = reconstruction - features
    if where is not None:
        mu, gap = _kept(mu, where), _kept(gap, where)
        sigma = jnp.where(where[..., None], sigma, 1.0)
    log_sigma = jnp.log(jnp.maximum(sigma, _LEAST_SIGMA))
    kl = 0.5 * (mu * mu + sigma * sigma - 1.0 - 2.0 * log_sigma).sum(-1)
    return kl, (gap * gap).sum(-1)


def cross_modal_loss(
    mapped: Float[Array, "S N"],
    words: Float[Array, "S N"],
    mu: Float[Array, "S Z"],
    *,
    where: Bool[Array, " S"] | None = None,
) -> tuple[Float[Array, " S"], Float[Array, ""]]:
    """L_cm: predicted word vectors point to the words, and lie among each other as mu does; Eq. 9.

        1 - cos(w_i, w'_i)  and  mean over i != j of (cos(w'_i, w'_j) - cos(mu_i, mu_j))^2

    The second term compares w' with mu, never w: with w in its place the mapping f would get no
    gradient of it (appendix F). It sends gradient to both of its sides, f and the encoder. It holds
    two [S, S] matrices.

    Args:
      mapped: [S, N], w' = f(mu), of any length.
      words: [S, N], w, of any length.
      mu: [S, Z], of any length.
      where: [S], samples that count.

    Returns:
      The first term of each sample [S], in [0, 2], 0 for samples that do not count, 1 where a
      vector is zero; the second [], >= 0, 0 with fewer than two samples.
    """
    if where is None:
        where = jnp.ones(mu.shape[0], bool)
    mapped, words, mu = (normalize(_kept(x, where)) for x in (mapped, words, mu))
    first = jnp.where(where, 1.0 - (mapped * words).sum(-1), 0.0)
    gap = _products(mapped, mapped) - _products(mu, mu)
    # Zero vectors and rounding leave something on the diagonal, which is no pair.
    gap = jnp.where(jnp.eye(gap.shape[0], dtype=bool), 0.0, gap)
    count = where.sum(dtype=gap.dtype)
    return first, (gap * gap).sum() / jnp.maximum(count * (count - 1.0), 1.0)


def prototype_contrastive_loss(
    mu: Float[Array, "S Z"],
    prototypes: Float[Array, "S Z"],
    word: Int[Array, " S"],
    region: Int[Array, " S"],
    *,
    temperature: float = 0.07,
    negatives: str = "others",
    stop_prototypes: bool = True,
    where: Bool[Array, " S"] | None = None,
) -> Float[Array, " S"]:
    """L_cl: the prototype of each sample's word as an anchor that looks for its region; Eq. 6.

        -log( exp(v_k.mu_k / T) / (exp(v_k.mu_k / T) + sum_n exp(v_k.mu_n / T)) )

    with v and mu of unit norm. What n goes over is `negatives`:

    - "others": the samples of another word and of another region.
    - "unlabelled": of these, the ones whose region carries the word of k in no sample. A red car
      is two samples; that of "car" is else a negative of "red".
    - "all": every other sample, Eq. 6 to the letter.

    Args:
      mu: [S, Z], of any length.
      prototypes: [S, Z], v of each sample's word, of any length; 0 where there is none yet.
      word: [S], id of the word.
      region: [S], number of the region in the batch, see `region_numbers`.
      temperature: T > 0.
      negatives: "others", "unlabelled" or "all".
      stop_prototypes: whether the prototypes are constants.
      where: [S], samples that count; the others are neither anchors nor candidates.

    Returns:
      [S], >= 0; 0 for samples that do not count and for those without a negative.

    Raises:
      ValueError: `negatives` is none of the three.
    """
    if negatives not in ("others", "unlabelled", "all"):
        raise ValueError(f"negatives={negatives!r}; choose others, unlabelled or all")
    if where is None:
        where = jnp.ones(mu.shape[0], bool)
    if stop_prototypes:
        prototypes = lax.stop_gradient(prototypes)
    anchors, mu = normalize(_kept(prototypes, where)), normalize(_kept(mu, where))
    logits = _products(anchors, mu) / temperature
    members = where[None] & ~jnp.eye(mu.shape[0], dtype=bool)
    if negatives != "all":
        members &= (word[:, None] != word[None]) & (region[:, None] != region[None])
    if negatives == "unlabelled":
        members &= ~_carries(word, region, where)
    values = log1p_sum_exp(logits - jnp.diagonal(logits)[:, None], members, axis=1)
    return jnp.where(where, values, 0.0)


def total_loss(
    kl: Float[Array, "n R"],
    error: Float[Array, "n R"],
    first: Float[Array, " S"],
    second: Float[Array, ""],
    contrast: Float[Array, " S"],
    *,
    regions: Bool[Array, "n R"] | None = None,
    samples: Bool[Array, " S"] | None = None,
    cross_modal_weight: float = 3.0,
    contrastive_weight: float = 3.0,
) -> Float[Array, ""]:
    """L = L_ir + lambda_1 L_cm + lambda_2 L_cl of the terms above; Eq. 14.

    Args:
      kl, error: [n, R], of `reconstruction_loss`.
      first, second: [S] and [], of `cross_modal_loss`.
      contrast: [S], of `prototype_contrastive_loss`.
      regions: [n, R], regions that count.
      samples: [S], samples that count.
      cross_modal_weight: lambda_1.
      contrastive_weight: lambda_2.

    Returns:
      []: means over the regions and samples that count; 0 of nothing.
    """
    information = _mean(kl + error, regions)
    alignment = _mean(first, samples) + second
    consistency = _mean(contrast, samples)
    return information + cross_modal_weight * alignment + contrastive_weight * consistency


def at_samples(
    values: Float[Array, "n R d"], sample_region: Int[Array, "n Q"]
) -> Float[Array, "n*Q d"]:
    """The vector of each sample's region, row by row; zero where there is no sample.

    Args:
      values: [n, R, d].
      sample_region: [n, Q], which region of the row, -1 for none.
    """
    n, slots = sample_region.shape
    exists = (sample_region >= 0)[..., None]
    picked = jnp.take_along_axis(values, jnp.maximum(sample_region, 0)[..., None], axis=1)
    return jnp.where(exists, picked, 0.0).reshape(n * slots, values.shape[-1])


def region_numbers(sample_region: Int[Array, "n Q"], regions: int) -> Int[Array, "n*Q"]:
    """The number of each sample's region in the batch, row * regions + region; -1 for none.

    Args:
      sample_region: [n, Q], which region of the row, -1 for none.
      regions: R.
    """
    row = jnp.arange(sample_region.shape[0], dtype=sample_region.dtype)[:, None]
    return jnp.where(sample_region >= 0, row * regions + sample_region, -1).reshape(-1)


def _kept(x: Array, where: Array) -> Array:
    """Zeroed, since 0 * NaN of a padded entry would reach the gradients of the others."""
    return jnp.where(where[..., None], x, 0.0)


def _products(a: Array, b: Array) -> Array:
    """Inner products [S, S]; accelerators round float32 by default, too coarse for 1 / 0.07."""
    return jnp.einsum("id,jd->ij", a, b, precision="highest")


def _carries(word: Array, region: Array, where: Array) -> Array:
    """[S, S]: whether the region of sample n carries the word of sample k, at [k, n]."""
    # Both are numbered by the first sample that has them, so that S x S holds all pairs of them.
    words, regions = (jnp.argmax(x[:, None] == x[None], axis=1) for x in (word, region))
    size = word.shape[0]
    pairs = jnp.zeros((size, size), bool)
    pairs = pairs.at[jnp.where(where, words, size), regions].set(True, mode="drop")
    return pairs[words[:, None], regions[None]]


def _mean(values: Array, where: Array | None) -> Array:
    """The mean over the entries that count, 0 of none."""
    if where is None:
        return values.sum() / max(values.size, 1)
    return jnp.where(where, values, 0.0).sum() / jnp.maximum(where.sum(dtype=values.dtype), 1.0)

"""NAAF: words that no region shows count against a pair, by a threshold that training learns.

Source: Zhang et al., "Negative-Aware Attention Framework for Image-Text Matching", CVPR 2022. Where
paper and public program differ, this is the program.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from trm_jax.models import AnyArray
from trm_jax.models.matching.attention import (
    Prepared,
    attended_cosine,
    attention,
    prepare,
    prepare_words,
    similarities,
)

ENOUGH_WORDS = 200  # the Gaussians are fitted to more words than this
_RATE = 0.7  # the share of what is new in the thresholds' moving average


class Naaf(nn.Module):
    """Scores of all pairs of images and captions; no parameters.

    With s the similarities of a word w and the regions v, and t the threshold, the score is the
    mean over the words of

        min(max_r s - t, 0)                                            what is missing
        + cos(w, sum_r a_r v_r), a = softmax over {s > t} of scale s   what is there (0 if nothing)
        + sum_r b_r s, b as SCAN's text-to-image attention             how well it is there

    In evaluation a word is missing if its neighbours say so: the first term is (max_r s - t), of
    any sign, where the mean of (max_r s - t) over the caption's words, weighted by
    softmax(mixing_scale w.w'), is below 0, and else 0.

    Attributes:
      attention_scale: of both softmaxes over regions.
      mixing_scale: of the softmax over words in evaluation.
    """

    attention_scale: float = 20.0
    mixing_scale: float = 5.0

    @nn.compact
    def __call__(
        self,
        regions: Float[AnyArray, "n r d"] | Prepared,
        words: Float[AnyArray, "m T d"] | Prepared,
        mask: Bool[AnyArray, "m T"],
        *,
        threshold: Float[AnyArray, ""] | Float[AnyArray, " m"],
        train: bool = False,
    ) -> Float[Array, "n m"]:
        """Scores in about [-2, 2]; 0 for a caption without words.

        Args:
          regions: of unit norm.
          words: of unit norm; padding is never read. Both may be prepared, once for many pairs.
          mask: true at the real words of a caption.
          threshold: of all captions or of each: `NaafState.threshold` in training,
            `NaafState.safe_threshold` in evaluation. It gets no gradient.
          train: which of the two first terms.
        """
        mask = jnp.asarray(mask)
        images, captions = prepare(regions), prepare_words(words, mask)
        threshold = jax.lax.stop_gradient(jnp.asarray(threshold)).reshape(1, 1, -1)
        similarity = similarities(images.vectors, captions.columns)  # [n, r, T, m]
        greatest = similarity.max(axis=1)
        excess = greatest - threshold
        if train:
            missing = jnp.minimum(excess, 0.0)
        else:
            mixing = self._mixing(captions.gram, mask)
            mixed = jnp.einsum("mtu,num->ntm", mixing, excess, precision="highest")
            missing = jnp.where(mixed < 0.0, excess, 0.0)
        # A cosine is the same for any factor of the weights: the greatest one is made 1.
        above = similarity - jax.lax.stop_gradient(greatest)[:, None]
        above = jnp.exp(self.attention_scale * above)
        above = jnp.where(similarity > threshold[:, None], above, 0.0)
        there = attended_cosine(above, similarity, images.gram)
        weights = attention(similarity, self.attention_scale)
        seen = jnp.sum(weights * similarity, axis=1) / jnp.sum(weights, axis=1)
        scores = jnp.sum(missing + there + seen, axis=1, where=mask.T[None])
        return scores / jnp.maximum(mask.sum(axis=1), 1)[None]

    def _mixing(self, gram: Array, mask: Array) -> Array:
        """How much word t heeds word u of its caption: [m, T, T], rows of sum 1."""
        logits = jnp.where(mask[:, None], self.mixing_scale * gram, jnp.finfo(gram.dtype).min)
        return jax.nn.softmax(logits, axis=-1)


class NaafState(NamedTuple):
    """The thresholds and what they come from; all zero at the start.

    A caption that ranks its own image first gives, for each of its words, the greatest similarity
    with a region of that image (matched) and of the image it ranks last (mismatched). The training
    threshold t is where two Gaussians of these values meet, the density of the matched being alpha
    times that of the mismatched; the safe one is mean - 3 deviations of the matched.
    """

    threshold: Float[Array, ""]  # t, in [0, 1]
    safe_threshold: Float[Array, ""]  # of evaluation, in [0, 1]
    count: Float[Array, ""]  # words collected since the last fit
    mean: Float[Array, "2"]  # of what was collected, matched and mismatched
    moment: Float[Array, "2"]  # their sums of squared deviations from the mean
    fitted_mean: Float[Array, "2"]  # of the last fit, for reports
    fitted_deviation: Float[Array, "2"]


def initial_state() -> NaafState:
    """No word seen, thresholds 0."""
    zero, two = jnp.zeros(()), jnp.zeros(2)
    return NaafState(zero, zero, zero, two, two, two, two)


def boundary(
    mean: Float[AnyArray, "2"], deviation: Float[AnyArray, "2"], alpha: float = 2.0
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Where the density of the first of two Gaussians is alpha times the second's.

    Returns:
      (t, whether there is such a point): a root of A t^2 + B t + C = 0, (-B + sqrt(B^2 - 4AC)) / 2A
      as in the program, in a form without cancellation; 0 where there is none.
    """
    mean, deviation = jnp.asarray(mean), jnp.asarray(deviation)
    first, second = deviation**2
    a = first - second
    b = 2.0 * (mean[0] * second - mean[1] * first)
    spread = jnp.log(deviation[1] / (alpha * deviation[0]))
    c = mean[1] ** 2 * first - mean[0] ** 2 * second + 2.0 * first * second * spread
    square = b * b - 4.0 * a * c
    exists = square > 0.0  # false for NaN, which a deviation of 0 makes
    root = jnp.sqrt(jnp.where(exists, square, 0.0))
    t = jnp.where(b > 0.0, -2.0 * c / (b + root), (root - b) / (2.0 * a))
    exists = exists & jnp.isfinite(t)
    return jnp.where(exists, t, 0.0), exists


def update_batch(
    state: NaafState,
    scores: Float[AnyArray, "n n"],
    regions: Float[AnyArray, "n r d"],
    words: Float[AnyArray, "n T d"],
    mask: Bool[AnyArray, "n T"],
    *,
    where: Bool[AnyArray, " n"] | None = None,
    alpha: float = 2.0,
) -> NaafState:
    """The state after a step: one update with all captions, scored with one threshold.

    All captions of the batch that rank their image first are collected. When more than 200 words
    came together, in this batch or over several, the Gaussians are fitted to them, the thresholds
    move to 0.7 new + 0.3 old, and collecting starts anew. Till then nothing moves. A new threshold
    outside of [0, 1] counts as 0; without a boundary the thresholds stay.

    Args:
      state: before the step.
      scores: [n, n] of image i and caption j in training, pair i on the diagonal.
      regions, words, mask: as of the scores, caption i beside image i.
      where: [n], pairs that count (all).
      alpha: of the boundary; see `NaafState`.
    """
    mask, scores = jnp.asarray(mask), jnp.asarray(scores)
    where = jnp.ones(mask.shape[0], bool) if where is None else jnp.asarray(where)
    right, last = jax.vmap(_rank, (1, None, 0))(scores, where, jnp.arange(mask.shape[0]))
    regions = jnp.asarray(regions)
    values = jnp.stack([_greatest(regions, words), _greatest(regions[last], words)])
    state = _collect(state, values, mask & right[:, None])
    fitted = _fit(state, alpha)._replace(
        count=jnp.zeros(()), mean=jnp.zeros(2), moment=jnp.zeros(2)
    )
    return jax.lax.stop_gradient(_choose(state.count > ENOUGH_WORDS, fitted, state))


def update_sequential(
    state: NaafState,
    regions: Float[AnyArray, "n r d"],
    words: Float[AnyArray, "n T d"],
    mask: Bool[AnyArray, "n T"],
    *,
    where: Bool[AnyArray, " n"] | None = None,
    attention_scale: float = 20.0,
    alpha: float = 2.0,
) -> tuple[Float[Array, " n"], NaafState]:
    """The public program's updates within a batch, caption by caption.

    Every batch collects anew. Caption i is scored against all images with the threshold that the
    captions before it left. If it ranks its own image first, its words join those of the batch,
    and once these are more than 200 the Gaussians are fitted to all of them and the thresholds
    move to 0.7 new + 0.3 old: many times in a batch, while `update_batch` moves once. While they
    are fewer than 200, both thresholds are set to 0 after the caption: so every batch starts from
    0 but for its first caption, and a batch with few right captions ends at 0.

    Args:
      state, regions, words, mask, where, alpha: see `update_batch`.
      attention_scale: of the scorer.

    Returns:
      (the threshold of each caption [n], to score the batch with; the state after it).
    """
    regions, words, mask = jnp.asarray(regions), jnp.asarray(words), jnp.asarray(mask)
    where = jnp.ones(mask.shape[0], bool) if where is None else jnp.asarray(where)
    scorer = Naaf(attention_scale)

    def caption(state: NaafState, item: tuple) -> tuple[NaafState, Array]:
        index, words, mask = item
        scores = scorer.apply(
            {}, regions, words[None], mask[None], threshold=state.threshold, train=True
        )
        right, last = _rank(jnp.asarray(scores)[:, 0], where, index)
        pair = regions[jnp.stack([index, last])]
        values = _greatest(pair, jnp.stack([words, words]))[:, None]
        new = _collect(state, values, (mask & right)[None])
        new = _choose(right & (new.count > ENOUGH_WORDS), _fit(new, alpha), new)
        none = new._replace(threshold=jnp.zeros(()), safe_threshold=jnp.zeros(()))
        new = _choose(new.count < ENOUGH_WORDS, none, new)
        return _choose(where[index], new, state), state.threshold

    state = state._replace(count=jnp.zeros(()), mean=jnp.zeros(2), moment=jnp.zeros(2))
    items = (jnp.arange(mask.shape[0]), words, mask)
    state, thresholds = jax.lax.scan(caption, jax.lax.stop_gradient(state), items)
    return jax.lax.stop_gradient((thresholds, state))


def _rank(scores: Array, where: Array, index: Array) -> tuple[Array, Array]:
    """Whether a caption [n] ranks its own image first, and which image it ranks last."""
    first = jnp.max(scores, where=where, initial=-jnp.inf)
    return where[index] & (scores[index] >= first), jnp.where(where, scores, jnp.inf).argmin()


def _greatest(regions: Array, words: AnyArray) -> Array:
    """The greatest similarity of each word with a region of its image: [n, T]."""
    return jnp.einsum("nrd,ntd->nrt", regions, words, precision="highest").max(axis=1)


def _collect(state: NaafState, values: Array, where: Array) -> NaafState:
    """Joins values [2, n, T] where [n, T] to the counts, means and moments (Chan et al. 1979)."""
    added = where.sum().astype(values.dtype)
    count = jnp.maximum(state.count + added, 1.0)
    mean = jnp.sum(values, axis=(1, 2), where=where[None]) / jnp.maximum(added, 1.0)
    square = jnp.sum((values - mean[:, None, None]) ** 2, axis=(1, 2), where=where[None])
    step = mean - state.mean
    return state._replace(
        count=state.count + added,
        mean=state.mean + step * added / count,
        moment=state.moment + square + step**2 * state.count * added / count,
    )


def _fit(state: NaafState, alpha: float) -> NaafState:
    """Thresholds moved towards those of what was collected."""
    deviation = jnp.sqrt(state.moment / jnp.maximum(state.count - 1.0, 1.0))
    point, exists = boundary(state.mean, deviation, alpha)
    new = jnp.stack([point, state.mean[0] - 3.0 * deviation[0]])
    new = jnp.where((new < 0.0) | (new > 1.0), 0.0, new)
    old = jnp.stack([state.threshold, state.safe_threshold])
    new = _RATE * jnp.where(exists, new, old) + (1.0 - _RATE) * old
    return state._replace(
        threshold=new[0],
        safe_threshold=new[1],
        fitted_mean=state.mean,
        fitted_deviation=deviation,
    )


def _choose(condition: Array, chosen: NaafState, other: NaafState) -> NaafState:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), chosen, other)

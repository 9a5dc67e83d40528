"""Prototypes of words on the devices: running means, exact means and random regions (MASK, Eq. 2).

K words, S samples of a batch, Z the width of a prototype. A sample is one (region, word) pair: a
region with two words is two samples. The raw-feature variant (MACK) passes detector features in
place of mu.

Sums are kept as two float32 numbers each, the second holding what the first has lost. The samples
of a batch are sorted by word and added along a fixed tree: no float is added by a scatter, whose
order a GPU does not fix. So the same batches give the same bits on any number of devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from trm_jax.types import Array, Key


class Prototypes(NamedTuple):
    """One vector for each word; the anchors of the contrastive loss (Eq. 6).

    vectors: [K, Z] float32, the mean of the word's regions, never normalised; zero until seen.
    counts:  [K] int32, regions of the word in the last exact pass, or in the batch in which it was
             seen first; 0 for a word that was never seen.
    """

    vectors: Array
    counts: Array


class Sums(NamedTuple):
    """What an exact pass has added up so far; the sum is high + low.

    high, low: [K, Z] float32; low is at most half a unit in the last place of high.
    counts:    [K] int32, regions.
    """

    high: Array
    low: Array
    counts: Array


class RandomRegions(NamedTuple):
    """One random region of each word, drawn while the regions pass by.

    vectors: [K, Z] float32; zero until the word is seen.
    numbers: [K] int32, the random number of that region, the highest of its word; -1 until seen.
    """

    vectors: Array
    numbers: Array


def create(num_words: int, width: int) -> Prototypes:
    """Prototypes of `num_words` that were never seen."""
    return Prototypes(
        vectors=jnp.zeros((num_words, width), jnp.float32),
        counts=jnp.zeros(num_words, jnp.int32),
    )


def create_sums(num_words: int, width: int) -> Sums:
    """The start of an exact pass."""
    return Sums(
        high=jnp.zeros((num_words, width), jnp.float32),
        low=jnp.zeros((num_words, width), jnp.float32),
        counts=jnp.zeros(num_words, jnp.int32),
    )


def create_random_regions(num_words: int, width: int) -> RandomRegions:
    """The start of a pass that draws regions."""
    return RandomRegions(
        vectors=jnp.zeros((num_words, width), jnp.float32),
        numbers=jnp.full(num_words, -1, jnp.int32),
    )


def update(
    prototypes: Prototypes,
    mu: Float[Array, "S Z"],
    word: Int[Array, " S"],
    *,
    decay: float = 0.99,
    where: Bool[Array, " S"] | None = None,
) -> Prototypes:
    """Moves the prototypes of the words of a batch towards the batch's mean of each.

    v <- decay v + (1 - decay) mean; a word that was never seen takes the mean. All other words
    keep their vector and count bit for bit.

    Args:
      prototypes: before the batch.
      mu: [S, Z], any scale; carries no gradient here.
      word: [S] in 0..K-1; a sample with any other number does not count.
      decay: in [0, 1].
      where: [S], samples that count; the others may hold anything.

    Returns:
      The prototypes after the batch.
    """
    batch = _totals(mu, word, where, prototypes.counts.shape[0])
    mean = batch.high / batch.counts[:, None]
    old = prototypes.vectors.at[batch.rows].get(mode="fill", fill_value=0.0)
    old_counts = prototypes.counts.at[batch.rows].get(mode="fill", fill_value=0)
    seen = old_counts > 0
    moved = jnp.where(seen[:, None], decay * old + (1.0 - decay) * mean, mean)
    counts = jnp.where(seen, old_counts, batch.counts)
    return Prototypes(
        vectors=_put(prototypes.vectors, batch.rows, moved),
        counts=_put(prototypes.counts, batch.rows, counts),
    )


def accumulate(
    sums: Sums,
    mu: Float[Array, "S Z"],
    word: Int[Array, " S"],
    *,
    where: Bool[Array, " S"] | None = None,
) -> Sums:
    """Adds the regions of a batch to the sums of their words.

    An addition loses less than 2^-46 of its result, so millions of them lose less than the last
    bit of a float32.

    Args:
      sums: of the batches before.
      mu: [S, Z], any scale.
      word: [S] in 0..K-1; a sample with any other number does not count.
      where: [S], samples that count; the others may hold anything.

    Returns:
      The sums with this batch.
    """
    batch = _totals(mu, word, where, sums.counts.shape[0])
    high, low = _add(
        sums.high.at[batch.rows].get(mode="fill", fill_value=0.0),
        sums.low.at[batch.rows].get(mode="fill", fill_value=0.0),
        batch.high,
        batch.low,
    )
    counts = sums.counts.at[batch.rows].get(mode="fill", fill_value=0) + batch.counts
    return Sums(
        high=_put(sums.high, batch.rows, high),
        low=_put(sums.low, batch.rows, low),
        counts=_put(sums.counts, batch.rows, counts),
    )


def finish(sums: Sums, previous: Prototypes) -> Prototypes:
    """The mean over all regions of each word (Eq. 2).

    Args:
      sums: of a whole pass.
      previous: what a word without a region keeps, its count included.

    Returns:
      The prototypes, within a unit in the last place of the exact means.
    """
    has = sums.counts > 0
    counts = jnp.maximum(sums.counts, 1)[:, None]
    mean = sums.high / counts + sums.low / counts
    return Prototypes(
        vectors=jnp.where(has[:, None], mean, previous.vectors),
        counts=jnp.where(has, sums.counts, previous.counts),
    )


def draw(
    regions: RandomRegions,
    key: Key,
    mu: Float[Array, "S Z"],
    word: Int[Array, " S"],
    *,
    where: Bool[Array, " S"] | None = None,
) -> RandomRegions:
    """Shows a batch to the draw of one random region for each word (the ablation of Table 1).

    Every region gets a random number and a word keeps the region with its highest, so that after a
    pass each of its regions was equally likely. The result follows from the keys and the batches.

    Args:
      regions: drawn from the batches before.
      key: of this batch, another one for each (folded from its number).
      mu: [S, Z], as `accumulate` gets it.
      word: [S], as `accumulate` gets it.
      where: [S], as `accumulate` gets it.

    Returns:
      The regions drawn with this batch.
    """
    size = regions.numbers.shape[0]
    word = _known(word, where, size)
    numbers = (jax.random.bits(key, word.shape, jnp.uint32) >> 1).astype(jnp.int32)
    order = jnp.lexsort((numbers, word))  # the last one of a word has its highest number
    word, numbers = word[order], numbers[order]
    rows = _rows(word, size)
    wins = numbers > regions.numbers.at[rows].get(mode="fill", fill_value=-1)
    rows = jnp.where(wins, rows, size + jnp.arange(rows.shape[0]))
    return RandomRegions(
        vectors=_put(regions.vectors, rows, mu[order].astype(jnp.float32)),
        numbers=_put(regions.numbers, rows, numbers),
    )


class _Totals(NamedTuple):
    """Sums over the samples of each word of a batch; each stands where its row is below K."""

    rows: Array  # [S] the word, or a number of its own beyond K
    high: Array  # [S, Z]
    low: Array  # [S, Z]
    counts: Array  # [S] >= 1


def _totals(mu: Array, word: Array, where: Array | None, size: int) -> _Totals:
    """A segmented scan by doubling over the samples sorted by word."""
    word = _known(word, where, size)
    order = jnp.argsort(word, stable=True)
    word = word[order]
    here = jnp.arange(word.shape[0], dtype=jnp.int32)
    is_first = jnp.concatenate([jnp.ones(1, bool), word[1:] != word[:-1]])
    place = here - lax.cummax(jnp.where(is_first, here, 0))  # within the samples of its word
    longest = jnp.max(jnp.where(word < size, place, 0)) + 1

    def add(carry):
        # Before, a sample holds the sum of the last `span` samples of its word up to itself.
        span, high, low = carry
        earlier = jnp.maximum(here - span, 0)
        joins = (place >= span)[:, None]
        high_2 = jnp.where(joins, high[earlier], 0.0)
        low_2 = jnp.where(joins, low[earlier], 0.0)
        return 2 * span, *_add(high, low, high_2, low_2)

    samples = lax.stop_gradient(mu)[order].astype(jnp.float32)
    samples = jnp.where((word < size)[:, None], samples, 0.0)
    start = jnp.ones((), jnp.int32), samples, jnp.zeros_like(samples)
    _, high, low = lax.while_loop(lambda carry: carry[0] < longest, add, start)
    return _Totals(rows=_rows(word, size), high=high, low=low, counts=place + 1)


def _known(word: Array, where: Array | None, size: int) -> Array:
    """[S] int32: the words, `size` for samples that do not count."""
    counts = (word >= 0) & (word < size)
    counts = counts if where is None else counts & where
    return jnp.where(counts, word, size).astype(jnp.int32)


def _rows(word: Array, size: int) -> Array:
    """[S] of sorted words: the word at its last sample, elsewhere numbers beyond the arrays."""
    is_last = jnp.concatenate([word[1:] != word[:-1], jnp.ones(1, bool)])
    beyond = size + jnp.arange(word.shape[0], dtype=jnp.int32)
    return jnp.where(is_last & (word < size), word, beyond)


def _put(array: Array, rows: Array, values: Array) -> Array:
    """`array` with its rows set; rows beyond it are dropped."""
    return array.at[rows].set(values, mode="drop", unique_indices=True)


def _add(high: Array, low: Array, high_2: Array, low_2: Array) -> tuple[Array, Array]:
    """The sum of two numbers of two floats each (Joldes et al. 2017, Algorithm 6)."""
    total, error = _two_sum(high, high_2)
    lows, lost = _two_sum(low, low_2)
    total, error = _renormalized(total, error + lows)
    return _renormalized(total, error + lost)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b as a float and what it lost, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _renormalized(a: Array, b: Array) -> tuple[Array, Array]:
    """The same for |a| >= |b| (Dekker)."""
    total = a + b
    return total, b - (total - a)

"""Matching images with captions by prototypes of words: scores of all pairs (MASK, Eq. 10).

How well a word fits an image (the highest cosine of its prototype with the image's regions) does
not depend on the caption around it. So it is computed once per image and distinct word: the word
table [n, U], one matrix product per block of images on the device. A caption's score is the mean of
the table over its words: the table times the sparse counts of words, on the host while the device
works on the next block. No region meets a caption, and no loop goes over pairs.

How an image's regions and a caption's words make one score (`POOLINGS`):

    max_mean       mean over words of the max over regions (the paper's)
    global_mean    mean over all words and regions of their cosines
    bidirectional  max_mean, averaged with the mean over regions of the max over words (MACK)

"global_mean" takes the place of the pooling in Eq. 10, which acts on the matrix of cosines; so it
is that matrix's mean, and not the cosine of two mean vectors.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int
from scipy import sparse

from trm_jax.data.caption_words import CaptionWords
from trm_jax.losses.cosine import normalize
from trm_jax.types import Array, UserError

POOLINGS = ("max_mean", "global_mean", "bidirectional")

# "bidirectional" compares this many captions with a block of images at a time.
_CAPTIONS = 1024


def score_all(
    images: Iterable[tuple[ArrayLike, ArrayLike]],
    prototypes: ArrayLike,
    captions: CaptionWords,
    *,
    pooling: str = "max_mean",
    memory_mb: float = 16,
    out: np.ndarray | None = None,
    to_host: Callable[[Any], Any] = jax.device_get,
) -> np.ndarray:
    """Scores every image with every caption.

    Args:
        images: batches of (regions [n, r, Z], mask [n, r] bool), of any sizes and any scale, on the
            host (a memory-mapped file, say) or on a device. Regions where the mask is False do not
            count; an image without a region scores 0.
        prototypes: [U, Z], any scale, one for each of `captions.words`.
        captions: the words of m captions; one without words scores 0.
        pooling: one of `POOLINGS`.
        memory_mb: what the arrays of one block of images may take, on the device and on the host
            apart from the result; it sets the size of the block (at least one image). Small blocks
            stay in the cache of a CPU; on a GPU larger ones mean fewer transfers.
        out: float32 [n_images, m] to write the scores to, a memory-mapped file for example. Without
            it the result is held twice for a moment.
        to_host: see `evaluate.multilabel.evaluate`.

    Returns:
        float32 [n_images, m], in [-1, 1]: `out`, if it was given.

    Raises:
        UserError: shapes or widths do not fit, a vector is not finite, there is no image or no
            caption, or the pooling is unknown.
    """
    if pooling not in POOLINGS:
        raise UserError(f"pooling '{pooling}' is unknown; choose one of {', '.join(POOLINGS)}")
    counts, lengths = _word_counts(captions), np.diff(captions.indptr)
    if not len(lengths):
        raise UserError("there is no caption to match: check data.root and the split")
    unit = _unit_prototypes(prototypes, len(captions.words))
    # Without any word there is nothing to take a maximum over, and every score is 0.
    sides = _by_length(captions) if pooling == "bidirectional" and captions.words else None
    done, blocks = 0, []
    found = _dispatched(images, unit, pooling, memory_mb * 1e6, len(lengths), sides)
    for (table, side), start, count in _one_ahead(found):
        scores = _means(counts, lengths, _fetch(table, start, count, to_host))
        if sides is not None:
            scores[sides.order] += np.asarray(to_host(side))[: len(lengths), :count]
            scores *= 0.5
            scores[lengths == 0] = 0.0
        if out is None:
            blocks.append(np.ascontiguousarray(scores.T))
        elif done + count > len(out) or out.shape[1] != len(lengths):
            raise UserError(
                f"`out` is {list(out.shape)}; it must have a row for each image (at least "
                f"{done + count}) and {len(lengths)} columns, one for each caption"
            )
        else:
            out[done : done + count] = scores.T
        done += count
    if not done:
        raise UserError("there is no image to match: check data.root and the split")
    if out is not None and done < len(out):
        raise UserError(f"`out` has {len(out)} rows, there are {done} images")
    return np.concatenate(blocks) if out is None else out


def word_table(
    images: Iterable[tuple[ArrayLike, ArrayLike]],
    prototypes: ArrayLike,
    *,
    pooling: str = "max_mean",
    memory_mb: float = 16,
    to_host: Callable[[Any], Any] = jax.device_get,
) -> np.ndarray:
    """How well each word fits each image: float32 [n_images, U], the max (or mean) of the cosines.

    Args:
        images, prototypes, memory_mb, to_host: see `score_all`.
        pooling: "max_mean": the highest cosine over the regions; "global_mean": their mean.

    Raises:
        UserError: as `score_all`, or the pooling has no such table.
    """
    if pooling not in POOLINGS[:2]:
        raise UserError(f"pooling '{pooling}' has no word table; choose max_mean or global_mean")
    unit = _unit_prototypes(prototypes, None)
    found = _dispatched(images, unit, pooling, memory_mb * 1e6, 0, None)
    rows = [
        _fetch(table, start, count, to_host).T for (table, _), start, count in _one_ahead(found)
    ]
    if not rows:
        raise UserError("there is no image to match: check data.root and the split")
    return np.concatenate(rows)


def caption_scores(table: np.ndarray, captions: CaptionWords, *, block: int = 128) -> np.ndarray:
    """Mean of a word table over each caption's words: float32 [n, m], 0 for a caption without.

    Args:
        table: [n, U], of `word_table`, its columns in the order of `captions.words`.
        captions: m captions.
        block: images at a time; it bounds the memory and changes no number.

    Raises:
        UserError: the table has not as many columns as the captions have distinct words.
    """
    if table.ndim != 2 or table.shape[1] != len(captions.words):
        raise UserError(
            f"the word table is {list(table.shape)}, the captions have {len(captions.words)} "
            "distinct words: it needs a column for each"
        )
    counts, lengths = _word_counts(captions), np.diff(captions.indptr)
    scores = np.empty((len(table), len(lengths)), np.float32)
    for start in range(0, len(table), block):
        columns = np.ascontiguousarray(table[start : start + block].T, np.float32)
        scores[start : start + block] = _means(counts, lengths, columns).T
    return scores


def best_regions(
    regions: ArrayLike, mask: ArrayLike, prototypes: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """The region of one image that fits each word best, for pictures: (place [J], cosine [J]).

    Args:
        regions: [r, Z].
        mask: [r] bool; regions where it is False are never chosen.
        prototypes: [J, Z], of a caption's words.

    Raises:
        UserError: the image has no region, or the widths differ.
    """
    unit = _unit_prototypes(prototypes, None)
    vectors, kept = _checked(jnp.asarray(regions)[None], jnp.asarray(mask)[None], unit, 0)
    if not np.asarray(kept).any():
        raise UserError("the image has no region: no word has a best one")
    cosines = jnp.einsum("rz,jz->jr", normalize(vectors[0]), unit, precision="highest")
    cosines = np.asarray(jnp.where(kept, cosines, -jnp.inf))
    best = cosines.argmax(axis=1)
    return best, np.take_along_axis(cosines, best[:, None], axis=1)[:, 0]


class _Sides(NamedTuple):
    """Captions by length, in blocks, for the maximum over words.

    words: int32 [blocks, captions, L]; the rest of a row repeats its first word.
    longest: int32 [blocks], words of the longest caption.
    order: [m], the caption in each row.
    """

    words: np.ndarray
    longest: np.ndarray
    order: np.ndarray


def _by_length(captions: CaptionWords) -> _Sides:
    """Pads the captions' words; a repeated word changes no maximum."""
    lengths, nonzero = np.diff(captions.indptr), len(captions.indices)
    first = captions.indices[np.minimum(captions.indptr[:-1], nonzero - 1)]
    words = np.repeat(first[:, None], lengths.max(), axis=1)
    column = np.arange(nonzero) - np.repeat(captions.indptr[:-1], lengths)
    words[np.repeat(np.arange(len(lengths)), lengths), column] = captions.indices
    order = np.argsort(lengths, kind="stable")
    block = min(_CAPTIONS, len(order))
    padding = -len(order) % block
    words = np.pad(words[order], ((0, padding), (0, 0)))
    longest = np.pad(lengths[order], (0, padding)).reshape(-1, block).max(axis=1)
    shape = (-1, block, words.shape[1])
    return _Sides(words.reshape(shape), longest.astype(np.int32), order)


def _word_counts(captions: CaptionWords) -> sparse.csr_array:
    """float32 [m, U]: how often each word is in each caption, repeats merged, words in order.

    So captions of the same words have the same score to the last bit, whatever their order.
    """
    ones = np.ones(len(captions.indices), np.float32)
    shape = (len(np.diff(captions.indptr)), len(captions.words))
    counts = sparse.csr_array((ones, captions.indices.copy(), captions.indptr.copy()), shape=shape)
    counts.sum_duplicates()
    return counts


def _means(counts: sparse.csr_array, lengths: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Means [m, b] of the table's columns [U, b] over the words of each caption."""
    scores = counts @ columns
    scores /= np.maximum(lengths, 1).astype(np.float32)[:, None]
    return scores


def _dispatched(
    images: Iterable[tuple[ArrayLike, ArrayLike]],
    unit: Array,
    pooling: str,
    memory: float,
    n_captions: int,
    sides: _Sides | None,
) -> Iterator[tuple[tuple[Array, Array | None], int, int]]:
    """Starts the device on each block: (table [U, b], region side [., b]), first image, images."""
    sizes: dict[int, int] = {}  # regions per image -> images per block: few compilations
    position = 0
    on_device = None if sides is None else jax.device_put((sides.words, sides.longest))
    for regions, of_image in images:
        vectors, mask = _checked(regions, of_image, unit, position)
        n, r, _ = vectors.shape
        if not n:
            continue
        if r not in sizes:
            limit = max(1, int(memory / _bytes_per_image(r, unit, n_captions, pooling)))
            sizes[r] = -(-n // -(-n // limit))  # equal blocks: the last needs little padding
        for start in range(0, n, sizes[r]):
            block, kept, count = _padded(vectors, mask, start, sizes[r])
            if on_device is None:
                found = _table(block, kept, unit, pooling=pooling), None
            else:
                found = _both_sides(block, kept, unit, *on_device)
            yield found, position + start, count
        position += n


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each after the next one was made: the device works while the host does."""
    held = collections.deque()
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.popleft()
    yield from held


def _bytes_per_image(r: int, unit: Array, n_captions: int, pooling: str) -> int:
    """What the arrays of one image of a block take: regions, cosines, table and scores."""
    n_words, width = unit.shape
    cosines = {
        "max_mean": r * n_words,
        "global_mean": 0,
        "bidirectional": r * (2 * n_words + 3 * min(n_captions, _CAPTIONS)),
    }
    return 4 * (2 * r * width + cosines[pooling] + 3 * n_words + 3 * n_captions)


def _padded(vectors: Any, mask: Any, start: int, size: int) -> tuple[Any, Any, int]:
    """Rows from `start` on, filled up to `size` by images without a region; how many are real."""
    vectors, mask = vectors[start : start + size], mask[start : start + size]
    count = len(vectors)
    if count < size:
        pad = (jnp if isinstance(vectors, jax.Array) else np).pad
        vectors = pad(vectors, ((0, size - count), (0, 0), (0, 0)))
        mask = np.pad(np.asarray(mask), ((0, size - count), (0, 0)))
    return vectors, mask, count


@functools.partial(jax.jit, static_argnames="pooling")
def _table(
    vectors: Float[Array, "b r Z"],
    mask: Bool[Array, "b r"],
    unit: Float[Array, "U Z"],
    *,
    pooling: str,
) -> Float[Array, "U b"]:
    """The word table of a block, words first: the layout that the sparse product reads."""
    regions = normalize(vectors)
    if pooling == "global_mean":
        total = jnp.where(mask[:, :, None], regions, 0.0).sum(axis=1)
        mean = total / jnp.maximum(mask.sum(axis=1), 1)[:, None]
        return jnp.einsum("uz,bz->ub", unit, mean, precision="highest")
    # One product of two matrices: the batched form of it is slower on CPUs.
    flat = regions.reshape(-1, regions.shape[2])
    cosines = jnp.einsum("xz,uz->xu", flat, unit, precision="highest")
    cosines = cosines.reshape(*mask.shape, unit.shape[0])
    best = jnp.where(mask[:, :, None], cosines, -jnp.inf).max(axis=1)
    return jnp.where(mask.any(axis=1)[:, None], best, 0.0).T


@jax.jit
def _both_sides(
    vectors: Float[Array, "b r Z"],
    mask: Bool[Array, "b r"],
    unit: Float[Array, "U Z"],
    words: Int[Array, "blocks c L"],
    longest: Int[Array, " blocks"],
) -> tuple[Float[Array, "U b"], Float[Array, "blocks_c b"]]:
    """The word table, and for each caption the mean over regions of the max over its words."""
    flat = normalize(vectors).reshape(-1, vectors.shape[2])
    cosines = jnp.einsum("uz,xz->ux", unit, flat, precision="highest")
    kept = mask.reshape(1, -1)
    table = jnp.where(kept, cosines, -jnp.inf).reshape(-1, *mask.shape).max(axis=2)
    table = jnp.where(mask.any(axis=1)[None], table, 0.0)
    cosines = jnp.where(kept, cosines, 0.0)  # a region that does not count adds 0 to the sum
    n_regions = jnp.maximum(mask.sum(axis=1), 1)[None]

    def of_captions(part: tuple[Array, Array]) -> Array:
        of_caption, length = part

        def step(j, best):
            return jnp.maximum(best, jnp.take(cosines, of_caption[:, j], axis=0, mode="clip"))

        best = jnp.take(cosines, of_caption[:, 0], axis=0, mode="clip")
        best = lax.fori_loop(1, length, step, best)
        return best.reshape(-1, *mask.shape).sum(axis=2) / n_regions

    return table, lax.map(of_captions, (words, longest)).reshape(-1, mask.shape[0])


def _fetch(table: Any, start: int, count: int, to_host: Callable[[Any], Any]) -> np.ndarray:
    """The table [U, count] on the host, of images whose regions are finite."""
    host = np.ascontiguousarray(np.asarray(to_host(table))[:, :count])
    bad = np.flatnonzero(~np.isfinite(host).all(axis=0))
    if len(bad):
        raise UserError(
            f"the regions of image {start + bad[0]} (counted from 0) are not finite; check its "
            "features"
        )
    return host


def _unit_prototypes(prototypes: ArrayLike, n_words: int | None) -> Array:
    """Unit vectors [U, Z] float32 of finite prototypes, one for each of `n_words` (None: any)."""
    vectors = np.asarray(prototypes)
    if vectors.ndim != 2 or (n_words is not None and len(vectors) != n_words):
        raise UserError(
            f"the prototypes are {list(vectors.shape)}; they must be "
            f"[{'words' if n_words is None else n_words}, width], one for each distinct word"
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise UserError(f"{len(bad)} of {len(vectors)} prototypes are not finite, first {bad[0]}")
    return normalize(jnp.asarray(vectors, jnp.float32))


def _checked(regions: Any, mask: Any, unit: Array, position: int) -> tuple[Any, Any]:
    """The arrays of a batch, if they fit each other and the prototypes."""
    regions, mask = (
        array if isinstance(array, jax.Array) else np.asarray(array) for array in (regions, mask)
    )
    if regions.ndim != 3 or mask.shape != regions.shape[:2] or mask.dtype != bool:
        raise UserError(
            f"the batch from image {position} on has regions {list(regions.shape)} and a mask "
            f"{mask.dtype}{list(mask.shape)}; they must be [n, r, Z] and bool [n, r]"
        )
    if regions.shape[2] != unit.shape[1]:
        raise UserError(
            f"the regions from image {position} on are {regions.shape[2]} wide, the prototypes "
            f"{unit.shape[1]}: both must come from the same encoder"
        )
    return regions, mask

"""Fits a knowledge to one domain by unpaired images and texts of it (MASK, appendix H).

What is learnt is one matrix W [Z, Z]. Prototypes become v W (`memory.knowledge_file.transform`) and
the regions that they are matched with mu W (`transformed`). The networks stay as they are.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Float

from trm_jax.data.caption_words import CaptionWords
from trm_jax.losses.domain_matching import cycle_consistency_loss
from trm_jax.types import Array, UserError

_ADAM = optax.scale_by_adam()
_REPORTS = 10


class RegionLists(NamedTuple):
    """The regions of n images without padding; image i has vectors[indptr[i] : indptr[i + 1]].

    vectors: [regions, Z], any float type, any scale; a memory-mapped file may be here.
    indptr: int64 [n + 1], ascending from 0.
    """

    vectors: np.ndarray
    indptr: np.ndarray


class FineTuning(NamedTuple):
    """What fine-tuning has found, and how.

    matrix: W, float32 [Z, Z].
    loss: float64 [steps], L_ss before each step.
    per_word, per_region: float64 [steps], means of its two kinds of terms. W = 0 would give
        log(words of the batch) and log(regions of the batch).
    """

    matrix: np.ndarray
    loss: np.ndarray
    per_word: np.ndarray
    per_region: np.ndarray


def list_regions(images: Iterable[tuple[ArrayLike, ArrayLike]]) -> RegionLists:
    """Gathers the regions of batches of images on the host.

    Args:
      images: batches of (regions [n, r, Z], mask [n, r] bool) as `evaluate.knowledge_matching`
        takes them, on the host or on a device. What the mask leaves out is not looked at.

    Raises:
      UserError: shapes do not fit, a region is not finite, or there is no image.
    """
    parts, counts = [], [np.zeros(1, np.int64)]
    for regions, mask in images:
        regions, mask = np.asarray(regions), np.asarray(mask)
        if regions.ndim != 3 or mask.shape != regions.shape[:2] or mask.dtype != bool:
            raise UserError(
                f"a batch has regions {list(regions.shape)} and a mask "
                f"{mask.dtype}{list(mask.shape)}; they must be [n, r, Z] and bool [n, r]"
            )
        kept = regions[mask]
        if parts and kept.shape[1] != parts[0].shape[1]:
            raise UserError(
                f"regions are {parts[0].shape[1]} wide in one batch and {kept.shape[1]} in "
                "another; take all from one encoder"
            )
        if not np.isfinite(kept).all():
            raise UserError("regions of the images are not finite; check their features")
        parts.append(kept)
        counts.append(mask.sum(axis=1, dtype=np.int64))
    if not parts:
        raise UserError("there is no image to fine-tune on: check data.root and the split")
    return RegionLists(np.concatenate(parts), np.concatenate(counts).cumsum())


def fit(
    images: RegionLists,
    prototypes: Float[np.ndarray, "U Z"],
    captions: CaptionWords,
    *,
    steps: int,
    batch_images: int = 128,
    batch_texts: int = 128,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> FineTuning:
    """Learns W from the identity on: Adam on L_ss of batches of images and of texts, unpaired.

    Images and texts come in two independent orders, each a new permutation when it is used up; what
    is left of a permutation and no full batch is not used, so that none is twice in a batch. The
    different words of a batch's texts are its words. Images without regions and texts without words
    are passed over. The same arguments give the same bits on the same device.

    Args:
      images: of `list_regions`, mu of the frozen encoder.
      prototypes: [U, Z], one for each of `captions.words`, of any length.
      captions: the words of the texts.
      steps: updates, 1 or more.
      batch_images, batch_texts: of a batch, all where there are fewer.
      learning_rate: Adam's.
      seed: of the two orders.

    Raises:
      UserError: a setting or a shape cannot be, prototypes are not finite, no image has a region or
        no text a word, or the loss stops being finite.
    """
    _check_settings(steps, batch_images, batch_texts, learning_rate)
    _check_prototypes(prototypes, images, captions)
    with_regions = np.flatnonzero(np.diff(images.indptr))
    with_words = np.flatnonzero(np.diff(captions.indptr))
    for found, what in ((with_regions, "image has a region"), (with_words, "text has a word")):
        if not len(found):
            raise UserError(f"no {what} to fine-tune on: check the data of this domain")
    orders = zip(
        _batches(with_regions, batch_images, np.random.default_rng([seed, 0])),
        _batches(with_words, batch_texts, np.random.default_rng([seed, 1])),
        strict=True,
    )
    width = prototypes.shape[1]
    matrix = jnp.eye(width, dtype=jnp.float32)
    state = _ADAM.init(matrix)
    rooms, terms, pending = [0, 0], [], []
    for step, (of_images, of_texts) in zip(range(1, steps + 1), orders, strict=False):
        rows = _entries(images.indptr, of_images)
        words = np.unique(captions.indices[_entries(captions.indptr, of_texts)])
        rooms = [max(r, _room(len(x))) for r, x in zip(rooms, (words, rows), strict=True)]
        sides = (
            _padded(prototypes[words], rooms[0]),
            len(words),
            _padded(images.vectors[rows], rooms[1]),
            len(rows),
        )
        matrix, state, values = _step(matrix, state, *sides, learning_rate)
        pending.append(values)
        if step == steps or step % max(1, steps // _REPORTS) == 0:
            terms.extend(_fetched(pending, len(terms), steps))
            pending = []
    sums = np.array(terms)  # [steps, (words' sum, words, regions' sum, regions)]
    return FineTuning(
        matrix=np.asarray(matrix),
        loss=sums[:, 0] + sums[:, 2],
        per_word=sums[:, 0] / sums[:, 1],
        per_region=sums[:, 2] / sums[:, 3],
    )


def transformed(
    images: Iterable[tuple[ArrayLike, ArrayLike]], matrix: ArrayLike | None
) -> Iterator[tuple[ArrayLike, ArrayLike]]:
    """Batches of images as fine-tuned prototypes meet them: (mu W [n, r, Z], mask [n, r]).

    Args:
      images: batches of (mu [n, r, Z], mask [n, r]).
      matrix: W [Z, Z]; None leaves the regions as they are.

    Raises:
      UserError: the regions are of another width than W.
    """
    if matrix is None:
        yield from images
        return
    matrix = jnp.asarray(matrix, jnp.float32)
    for regions, mask in images:
        width = np.shape(regions)[-1]
        if width != len(matrix):
            raise UserError(
                f"regions are {width} wide, the knowledge was fine-tuned on {len(matrix)}: both "
                "must come from the same encoder"
            )
        yield _map(jnp.asarray(regions, jnp.float32), matrix), mask


@jax.jit
def _map(regions: Float[Array, "n r Z"], matrix: Float[Array, "Z Z"]) -> Float[Array, "n r Z"]:
    return jnp.matmul(regions, matrix, precision="highest")


@partial(jax.jit, donate_argnums=(0, 1))
def _step(
    matrix: Float[Array, "Z Z"],
    state: Any,
    words: Float[Array, "J Z"],
    n_words: ArrayLike,
    regions: Float[Array, "I Z"],
    n_regions: ArrayLike,
    learning_rate: ArrayLike,
) -> tuple[Float[Array, "Z Z"], Any, Float[Array, "4"]]:
    """One update, and (sum of the words' terms, words, sum of the regions' terms, regions)."""
    words_where = jnp.arange(words.shape[0]) < n_words
    regions_where = jnp.arange(regions.shape[0]) < n_regions

    def loss(matrix):
        terms = cycle_consistency_loss(
            matrix, words, regions, words_where=words_where, regions_where=regions_where
        )
        sums = [side.sum() for side in terms]
        return sums[0] + sums[1], sums

    (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(matrix)
    update, state = _ADAM.update(gradient, state)
    values = jnp.stack([sums[0], words_where.sum(), sums[1], regions_where.sum()])
    return matrix - learning_rate * jnp.asarray(update), state, values


def _fetched(pending: list[Array], done: int, steps: int) -> list[np.ndarray]:
    """The values of some steps on the host, the last of them shown; all of them are finite."""
    values = [np.asarray(x, np.float64) for x in jax.device_get(pending)]
    for step, value in enumerate(values, start=done + 1):
        if not np.isfinite(value).all():
            raise UserError(
                f"fine-tuning: the loss of step {step} is not finite; take a smaller learning_rate"
            )
    words, n_words, regions, n_regions = values[-1]
    print(
        f"fine-tuning: step {done + len(values)} of {steps}, loss per word "
        f"{words / n_words:.4f}, per region {regions / n_regions:.4f}",
        flush=True,
    )
    return values


def _batches(items: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    size = min(size, len(items))
    while True:
        order = rng.permutation(items)
        for start in range(0, len(items) - size + 1, size):
            yield order[start : start + size]


def _entries(indptr: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where the entries of some rows of a ragged array lie, row after row."""
    counts = indptr[rows + 1] - indptr[rows]
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(indptr[rows], counts) + within


def _room(count: int) -> int:
    """`count` or up to an eighth more, one of eight sizes between powers of two: few programs."""
    unit = 1 << max(0, count.bit_length() - 4)
    return -(-count // unit) * unit


def _padded(vectors: np.ndarray, room: int) -> np.ndarray:
    padded = np.zeros((room, vectors.shape[1]), np.float32)
    padded[: len(vectors)] = vectors
    return padded


def _check_settings(steps: int, images: int, texts: int, learning_rate: float) -> None:
    for name, value in (("steps", steps), ("batch_images", images), ("batch_texts", texts)):
        if value < 1:
            raise UserError(f"fine-tuning: {name}={value} must be 1 or more")
    if not 0 < learning_rate < math.inf:
        raise UserError(f"fine-tuning: learning_rate={learning_rate} must be positive")


def _check_prototypes(prototypes: np.ndarray, images: RegionLists, captions: CaptionWords) -> None:
    if len(prototypes) != len(captions.words):
        raise UserError(
            f"there are {len(prototypes)} prototypes and {len(captions.words)} words of the texts; "
            "give one for each word"
        )
    if prototypes.shape[1] != images.vectors.shape[1]:
        raise UserError(
            f"prototypes are {prototypes.shape[1]} wide, regions {images.vectors.shape[1]}: both "
            "must come from the same encoder"
        )
    bad = np.flatnonzero(~np.isfinite(prototypes).all(axis=1))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(prototypes)} prototypes are not finite, that of "
            f"{captions.words[bad[0]]!r} the first; build the knowledge again"
        )

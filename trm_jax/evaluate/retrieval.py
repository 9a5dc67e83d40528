"""Image-text retrieval metrics: recall at 1, 5 and 10 in both directions and their sum.

An image may have any number of captions (at least one), a text belongs to one image. Image to text
counts the best-ranked of an image's captions; text to image counts the text's image. A rank is the
number of candidates that score strictly higher, plus those that score the same and come earlier
(a stable descending sort), so a constant score matrix gives chance order and never 100 %.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from trm_jax.types import Batch, UserError

_LEVELS = (1, 5, 10)


def ranks(
    scores: ArrayLike, image_of_text: ArrayLike, *, block: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """0-based ranks of the right answers: ([n_images] image to text, [n_texts] text to image).

    Args:
        scores: [n_images, n_texts], finite, higher is more similar.
        image_of_text: [n_texts] int, the row of `scores` that a text describes.
        block: rows (or columns) ranked at once; it bounds the memory and changes no number.

    Raises:
        UserError: shapes or indices do not fit, an image has no text, or a score is not finite.
    """
    scores, owner = np.asarray(scores), np.asarray(image_of_text)
    _check(scores, owner)
    n_images, n_texts = scores.shape
    to_text = np.empty(n_images, np.int64)
    for start in range(0, n_images, block):
        rows = scores[start : start + block]
        images = np.arange(start, start + len(rows))
        own = np.where(owner[None, :] == images[:, None], rows, -np.inf)
        to_text[start : start + block] = _rank_of(rows, own.argmax(axis=1))
    to_image = np.empty(n_texts, np.int64)
    for start in range(0, n_texts, block):
        columns = np.ascontiguousarray(scores[:, start : start + block].T)
        to_image[start : start + block] = _rank_of(columns, owner[start : start + block])
    return to_text, to_image


def recalls(scores: ArrayLike, image_of_text: ArrayLike, *, block: int = 256) -> dict[str, float]:
    """i2t_R@1, i2t_R@5, i2t_R@10, t2i_R@1, .. and Rsum (their sum), in per cent; see `ranks`."""
    return recalls_of(*ranks(scores, image_of_text, block=block))


def recalls_of(to_text: np.ndarray, to_image: np.ndarray) -> dict[str, float]:
    """The same of the ranks of the right answers, to images' queries and to texts'."""
    values = {f"i2t_R@{k}": 100.0 * float((to_text < k).mean()) for k in _LEVELS}
    values |= {f"t2i_R@{k}": 100.0 * float((to_image < k).mean()) for k in _LEVELS}
    return values | {"Rsum": sum(values.values())}


def folded_recalls(
    scores: ArrayLike, image_of_text: ArrayLike, *, folds: int = 5
) -> dict[str, float]:
    """Mean of `recalls` over equal runs of consecutive images (COCO-1K: 5 folds of 1,000).

    Raises:
        UserError: `folds` does not divide the number of images, or as `ranks`.
    """
    scores, owner = np.asarray(scores), np.asarray(image_of_text)
    _check(scores, owner)
    if folds < 1 or len(scores) % folds:
        raise UserError(f"{len(scores)} images cannot be cut into {folds} equal folds")
    size = len(scores) // folds
    parts = []
    for start in range(0, len(scores), size):
        texts = np.flatnonzero((owner >= start) & (owner < start + size))
        parts.append(recalls(scores[start : start + size, texts], owner[texts] - start))
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def score_all(
    embed_image_fn: Callable[[Batch], dict[str, Any]],
    embed_text_fn: Callable[[Batch], dict[str, Any]],
    image_batches: Iterable[Batch],
    text_batches: Iterable[Batch],
    *,
    to_host: Callable[[Any], Any] = jax.device_get,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeds both sides and scores all pairs by their cosines.

    Args:
        embed_image_fn, embed_text_fn: batch -> {"embedding": [n, d], ...}; any scale (the rows are
            normalised here, in float32), jitted, with the parameters bound.
        image_batches: dicts with index [n], the image's position, unique among the valid rows.
        text_batches: dicts with image_index [n], the index of the image that a text describes.
            Both may carry valid [n] bool; rows where it is False are dropped.
        to_host: see `evaluate.multilabel.evaluate`.

    Returns:
        (scores [n_images, n_texts], texts in the order of their images; the row of each text's
        image [n_texts]; the images' positions [n_images], ascending).

    Raises:
        UserError: a text names an image that is not there, or there is no valid row.
    """
    images, index = _embed(embed_image_fn, image_batches, "index", to_host)
    texts, owner = _embed(embed_text_fn, text_batches, "image_index", to_host)
    order = np.argsort(index, kind="stable")
    images, index = images[order], index[order]
    if (np.diff(index) == 0).any():
        raise UserError("the image batches hold the same index twice: images must be unique")
    row = np.minimum(np.searchsorted(index, owner), len(index) - 1)
    missing = int((index[row] != owner).sum())
    if missing:
        raise UserError(f"{missing} texts describe images that are not in the image batches")
    text_order = np.argsort(row, kind="stable")  # the same ties on any number of processes
    return images @ texts[text_order].T, row[text_order], index


def evaluate(
    embed_image_fn: Callable[[Batch], dict[str, Any]],
    embed_text_fn: Callable[[Batch], dict[str, Any]],
    image_batches: Iterable[Batch],
    text_batches: Iterable[Batch],
    *,
    folds: int = 1,
    to_host: Callable[[Any], Any] = jax.device_get,
) -> dict[str, float]:
    """The recalls of `score_all`, whose arguments these are.

    folds: 1, or `folded_recalls`. Raises UserError as `score_all` and `ranks`.
    """
    sides = embed_image_fn, embed_text_fn, image_batches, text_batches
    scores, owner, _ = score_all(*sides, to_host=to_host)
    return folded_recalls(scores, owner, folds=folds)


def _rank_of(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rank [b] of entry target [b] within its row of rows [b, m]: greater, plus earlier equal."""
    value = np.take_along_axis(rows, target[:, None], axis=1)
    earlier = np.arange(rows.shape[1])[None, :] < target[:, None]
    return ((rows > value) | ((rows == value) & earlier)).sum(axis=1)


def _check(scores: np.ndarray, owner: np.ndarray) -> None:
    """Raises UserError unless `scores` and `owner` describe a retrieval problem."""
    if scores.ndim != 2 or owner.shape != scores.shape[1:] or owner.dtype.kind not in "iu":
        raise UserError(
            f"scores {list(scores.shape)} must be [n_images, n_texts] and image_of_text "
            f"{owner.dtype}{list(owner.shape)} integers [n_texts]"
        )
    bad = int(scores.size - np.isfinite(scores).sum())
    if bad:
        raise UserError(f"{bad} of {scores.size} retrieval scores are not finite")
    if owner.size and (owner.min() < 0 or owner.max() >= len(scores)):
        raise UserError(f"image_of_text must lie in [0, {len(scores)}), the rows of the scores")
    captioned = np.bincount(owner, minlength=len(scores)) > 0
    if not captioned.all() or not len(scores):
        raise UserError(
            f"{int((~captioned).sum())} of {len(scores)} images have no text (the first is "
            f"{int(np.argmin(captioned)) if len(scores) else 'none'}): leave them out"
        )


def _embed(
    embed: Callable[[Batch], dict[str, Any]],
    batches: Iterable[Batch],
    key: str,
    to_host: Callable[[Any], Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings [N, d] float32 of the valid rows and their `key` [N]."""
    embeddings, keys = [], []
    for batch in batches:
        if key not in batch:
            raise UserError(f"the retrieval batches have no '{key}'; they have {sorted(batch)}")
        part = {"embedding": embed(batch)["embedding"], key: batch[key]}
        part["valid"] = batch.get("valid", np.ones(len(batch[key]), bool))
        part = {name: np.asarray(array) for name, array in to_host(part).items()}
        embeddings.append(part["embedding"][part["valid"]].astype(np.float32))
        keys.append(part[key][part["valid"]])
    if not sum(map(len, keys)):
        raise UserError("the retrieval set has no valid row: check data.root and the split")
    vectors = np.concatenate(embeddings)
    norm = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True) + 1e-12)
    return vectors / norm, np.concatenate(keys)

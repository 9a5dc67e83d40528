"""Re-ranking the best candidates of one model by the scores of another (MASK, Eq. 15).

For each query the first k candidates of the base model are ordered anew by ZS(base) + alpha
ZS(other), z-scores over those k; the candidates below them keep their places. Queries are images
(which texts?) and texts (which images?), so re-ranking gives two rankings and no longer one matrix
of scores. They are kept as the lists of the first k, which is all that changes: small to save, and
enough for the recalls of both directions and for pictures of what moved.
"""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from trm_jax.evaluate import retrieval
from trm_jax.types import UserError

_MIN_STD = 1e-8


class Ranking(NamedTuple):
    """The first k candidates of each of q queries, before and after.

    before: int32 [q, k], candidates of the base model, best first.
    order: int32 [q, k], the same candidates, re-ranked.
    moves: int32 [q, k], places that each candidate in `order` gained: above 0 promoted, below 0
        demoted.
    scores: float32 [q, k], Eq. 15 of the candidates in `order`; they do not increase along a row.
    """

    before: Int[np.ndarray, "q k"]
    order: Int[np.ndarray, "q k"]
    moves: Int[np.ndarray, "q k"]
    scores: Float[np.ndarray, "q k"]


class Reranked(NamedTuple):
    """Both directions: images as queries (q = n_images), and texts (q = n_texts)."""

    to_text: Ranking
    to_image: Ranking


def rerank(
    base: ArrayLike,
    other: ArrayLike,
    *,
    alpha: float = 0.15,
    top: int = 100,
    block: int = 256,
    names: tuple[str, str] = ("base", "other"),
) -> Reranked:
    """Re-ranks a score matrix in both directions.

    Args:
        base: [n_images, n_texts], finite, higher is more similar; it may be a memory-mapped file.
        other: the same shape; of MASK, usually.
        alpha: weight of the other model, at least 0; 0 changes nothing.
        top: k, candidates to re-rank; at most the number of texts and that of images.
        block: queries at a time; it bounds the memory and changes no number.
        names: what errors call the two matrices, such as their files.

    Raises:
        UserError: the matrices differ in shape or hold a score that is not finite, k is larger than
            a gallery, or alpha is negative.
    """
    base, other = _checked(base, other, names)
    n_images, n_texts = base.shape
    for size, gallery in ((n_texts, "texts"), (n_images, "images")):
        _check_top(top, size, gallery)
    return Reranked(
        to_text=_ranking(base, other, alpha, top, block),
        to_image=_ranking(base.T, other.T, alpha, top, block),
    )


def rerank_rows(
    base: ArrayLike,
    other: ArrayLike,
    *,
    alpha: float = 0.15,
    top: int = 100,
    block: int = 256,
    names: tuple[str, str] = ("base", "other"),
) -> Ranking:
    """Re-ranks in one direction: queries are rows [q, g], candidates are columns; see `rerank`."""
    base, other = _checked(base, other, names)
    _check_top(top, base.shape[1], "candidates")
    return _ranking(base, other, alpha, top, block)


def place_scores(base: ArrayLike, ranking: Ranking, *, block: int = 256) -> np.ndarray:
    """The re-ranked direction as a score matrix for any evaluator: minus the place of a candidate.

    Re-ranked z-scores cannot be compared with the scores of candidates below the first k; places
    can. They are distinct, so no tie is decided differently from `ranking`.

    Args:
        base: [q, g], the base scores, queries in rows (transposed for `to_image`).
        ranking: of these scores.
        block: queries at a time.

    Returns:
        float32 [q, g]: 0 for the best candidate, then -1, -2, ..., exact up to 2^24.
    """
    base = np.asarray(base)
    _check_fits(base, ranking)
    places = np.empty(base.shape, np.float32)
    descending = -np.arange(base.shape[1], dtype=np.float32)[None]
    for start in range(0, len(base), block):
        rows = slice(start, start + block)
        order = np.argsort(-_floating(base[rows]), axis=1, kind="stable")
        order[:, : ranking.order.shape[1]] = ranking.order[rows]
        np.put_along_axis(places[rows], order, descending, axis=1)
    return places


def ranks(
    base: ArrayLike, image_of_text: ArrayLike, reranked: Reranked, *, block: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """0-based ranks of the right answers after re-ranking, as `retrieval.ranks` has them before.

    Args:
        base: [n_images, n_texts], the scores that were re-ranked.
        image_of_text: [n_texts] int, the row of `base` that a text describes.
        reranked: of `base`.
        block: see `retrieval.ranks`.

    Raises:
        UserError: as `retrieval.ranks`, or the rankings are of other scores.
    """
    base, owner = np.asarray(base), np.asarray(image_of_text)
    to_text, to_image = retrieval.ranks(base, owner, block=block)
    _check_fits(base, reranked.to_text)
    _check_fits(base.T, reranked.to_image)
    images = np.arange(len(base))[:, None]
    return (
        _after(to_text, owner[reranked.to_text.order] == images),
        _after(to_image, reranked.to_image.order == owner[:, None]),
    )


def recalls(
    base: ArrayLike, image_of_text: ArrayLike, reranked: Reranked, *, block: int = 256
) -> dict[str, float]:
    """i2t_R@1, .., t2i_R@10 and Rsum in per cent, after re-ranking; see `ranks`."""
    return retrieval.recalls_of(*ranks(base, image_of_text, reranked, block=block))


def examples(before: ArrayLike, after: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Queries to show, as Table 10 chooses them: (positive, negative), the largest moves first.

    Positive: the right answer was not first and moved up. Negative: it was first and moved down.

    Args:
        before, after: [q] ranks of the right answers, of `retrieval.ranks` and of `ranks`.
    """
    before, after = np.asarray(before), np.asarray(after)
    gain = before - after
    order = np.argsort(-np.abs(gain), kind="stable")
    return order[(gain > 0)[order]], order[((before == 0) & (after > 0))[order]]


def _ranking(base: np.ndarray, other: np.ndarray, alpha: float, top: int, block: int) -> Ranking:
    """`rerank_rows` of checked matrices."""
    if not (np.isfinite(alpha) and alpha >= 0):
        raise UserError(f"the re-ranking weight alpha is {alpha}; it must be 0 or more")
    shape = (len(base), top)
    before, order, moves = (np.empty(shape, np.int32) for _ in range(3))
    scores = np.empty(shape, np.float32)
    for start in range(0, len(base), block):
        rows = slice(start, start + block)
        part = np.ascontiguousarray(base[rows])
        first = _first(part, top)
        mixed = _zscores(np.take_along_axis(part, first, axis=1))
        mixed = mixed + alpha * _zscores(np.take_along_axis(other[rows], first, axis=1))
        # Stable: candidates that score the same stay in the order of the base model.
        was = np.argsort(-mixed, axis=1, kind="stable")
        before[rows] = first
        order[rows] = np.take_along_axis(first, was, axis=1)
        moves[rows] = was - np.arange(top)
        scores[rows] = np.take_along_axis(mixed, was, axis=1)
    return Ranking(before, order, moves, scores)


def _first(rows: np.ndarray, top: int) -> np.ndarray:
    """The `top` largest of each row [b, g], best first, of equal ones the earlier: [b, top].

    As a stable sort of the whole rows gives them, at the price of a partition.
    """
    rows = _floating(rows)
    last = rows.shape[1] - top
    lowest = np.partition(rows, last, axis=1)[:, last : last + 1]
    chosen = rows > lowest
    wanted = top - chosen.sum(axis=1, keepdims=True)
    equal = rows == lowest
    chosen |= equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= wanted)
    columns = np.nonzero(chosen)[1].reshape(-1, top)
    order = np.argsort(-np.take_along_axis(rows, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def _zscores(values: np.ndarray) -> np.ndarray:
    """Z-scores [b, k] along rows by the population's deviation, 0 where that is below 1e-8."""
    values = values.astype(np.float64)
    deviation = values.std(axis=1, keepdims=True)
    centred = values - values.mean(axis=1, keepdims=True)
    flat = deviation < _MIN_STD
    return np.where(flat, 0.0, centred / np.where(flat, 1.0, deviation))


def _after(rank: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Ranks [q]: the first right one among the re-ranked [q, k], or as before where there is none.

    A right answer below the first k keeps its place, and one among them is better than it.
    """
    return np.where(right.any(axis=1), right.argmax(axis=1), rank)


def _floating(scores: np.ndarray) -> np.ndarray:
    """Scores that may be negated and compared fast: float32 or float64."""
    if scores.dtype in (np.float32, np.float64):
        return scores
    return scores.astype(np.float32 if scores.dtype.kind == "f" else np.float64)


def _checked(
    base: ArrayLike, other: ArrayLike, names: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Both matrices, if they can be re-ranked."""
    base, other = np.asarray(base), np.asarray(other)
    for scores, name in zip((base, other), names, strict=True):
        if scores.ndim != 2 or not scores.size or scores.dtype.kind not in "fiu":
            raise UserError(
                f"the {name} scores are {scores.dtype}{list(scores.shape)}; re-ranking needs "
                "numbers [n_images, n_texts]"
            )
    if base.shape != other.shape:
        turned = base.shape == other.shape[::-1]
        raise UserError(
            f"the {names[0]} scores are {list(base.shape)}, the {names[1]} scores "
            f"{list(other.shape)}: "
            + ("transpose one of them" if turned else "both must be of the same images and texts")
        )
    for scores, name in zip((base, other), names, strict=True):
        _check_finite(scores, name)
    return base, other


def _check_finite(scores: np.ndarray, name: str, block: int = 256) -> None:
    """Raises UserError, with the place of the first, if a score is not finite."""
    bad, first = 0, None
    for start in range(0, len(scores), block):
        row, column = np.nonzero(~np.isfinite(scores[start : start + block]))
        if first is None and len(row):
            first = (start + int(row[0]), int(column[0]))
        bad += len(row)
    if first is not None:
        raise UserError(
            f"{bad} of {scores.size} {name} scores are not finite, the first at row {first[0]}, "
            f"column {first[1]} (counted from 0)"
        )


def _check_top(top: int, size: int, gallery: str) -> None:
    """Raises UserError unless 1 <= top <= size."""
    if not 1 <= top <= size:
        raise UserError(
            f"re-ranking the first {top} needs a gallery of at least as many, and k >= 1; "
            f"there are {size} {gallery}: set k to {size} or less"
        )


def _check_fits(base: np.ndarray, ranking: Ranking) -> None:
    """Raises UserError if `ranking` cannot be one of `base` [q, g]."""
    if base.ndim != 2 or len(base) != len(ranking.order) or ranking.order.max() >= base.shape[1]:
        raise UserError(
            f"the ranking is of {len(ranking.order)} queries, the scores are {list(base.shape)}; "
            "queries must be the rows (transpose the scores of the other direction)"
        )

"""Prototypes for words outside the knowledge, from their word vectors (MASK, Section 3.4, App. B).

Two constructions: a weighted mean of the prototypes of the nearest words, and a map of the whole
space of words by similarity Procrustes. Both run once for a set of words, on the host in float64.
K words of the knowledge, U unknown ones, N the width of word vectors, Z that of prototypes.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from trm_jax.types import UserError

# Unknown words at a time: [block, K] cosines are held.
_BLOCK = 256


class Interpolation(NamedTuple):
    """Prototypes of unknown words and how they came about.

    prototypes: [U, Z] float64.
    neighbours: [U, m] int64 in 0..K-1, by falling cosine; of equal ones the first word leads.
    weights:    [U, m] float64 >= 0 that sum to 1.
    """

    prototypes: np.ndarray
    neighbours: np.ndarray
    weights: np.ndarray

    @property
    def top(self) -> int:
        """m, the neighbours that were used: what was asked for, K at most."""
        return self.neighbours.shape[1]


class Procrustes(NamedTuple):
    """The map v = scale * matrix @ (w - word_mean) + prototype_mean.

    matrix:         [Z, N] float64; its columns are orthonormal if rank = N, else it is zero on the
                    directions in which the words of the knowledge do not differ.
    scale:          c > 0.
    word_mean:      [N].
    prototype_mean: [Z].
    rank:           r of the covariance of both spaces, N at most. Below N, what an unknown word has
                    in the other N - r directions is lost: a caller should say so.
    """

    matrix: np.ndarray
    scale: float
    word_mean: np.ndarray
    prototype_mean: np.ndarray
    rank: int


def interpolate(
    word_vectors: Float[np.ndarray, "K N"],
    prototypes: Float[np.ndarray, "K Z"],
    queries: Float[np.ndarray, "U _"],
    *,
    top: int = 10,
) -> Interpolation:
    """A prototype for each unknown word from its nearest known words (Eq. 11-13).

    The m = min(top, K) words of highest cosine (Eq. 13) are weighed by the softmax of the dot
    products of the vectors as they are (Eq. 11); the prototype is the weighted sum (Eq. 12).

    Args:
      word_vectors: [K, N] of the knowledge.
      prototypes: [K, Z] of the knowledge, or its random regions.
      queries: [U, N], vectors of the unknown words, none of them zero.
      top: >= 1.

    Raises:
      UserError: `top` is below 1, the widths differ, or a query is zero or not finite.
    """
    if top < 1:
        raise UserError(f"top={top} neighbours; an unknown word needs one at least")
    _check_queries(word_vectors, queries)
    known, prototypes = word_vectors.astype(np.float64), prototypes.astype(np.float64)
    m = min(top, len(known))
    units = known / np.maximum(np.linalg.norm(known, axis=1, keepdims=True), np.finfo(float).tiny)
    result = Interpolation(
        prototypes=np.empty((len(queries), prototypes.shape[1])),
        neighbours=np.empty((len(queries), m), np.int64),
        weights=np.empty((len(queries), m)),
    )
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK].astype(np.float64)
        cosines = (block @ units.T) / np.linalg.norm(block, axis=1, keepdims=True)
        for row, query in enumerate(block):
            nearest = _highest(cosines[row], m)
            logits = known[nearest] @ query
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            result.neighbours[start + row] = nearest
            result.weights[start + row] = weights
            result.prototypes[start + row] = weights @ prototypes[nearest]
    return result


def fit_procrustes(
    word_vectors: Float[np.ndarray, "K N"], prototypes: Float[np.ndarray, "K Z"]
) -> Procrustes:
    """The best map from word vectors to prototypes that keeps angles (App. B).

    With centred words W~ and prototypes V~ and the reduced SVD V~^T W~ = U S V^T of rank r:
    matrix A = U_r V_r^T, scale c = tr(S_r) / |W~|^2, the least squares solution over all A with
    A^T A = I. Reflections are among them, so no determinant is corrected.

    Args:
      word_vectors: [K, N] of the knowledge.
      prototypes: [K, Z] of the knowledge.

    Raises:
      UserError: Z < N, where no such A exists; or the words or the prototypes do not differ.
    """
    (_, word_width), width = word_vectors.shape, prototypes.shape[1]
    if width < word_width:
        raise UserError(
            f"Procrustes needs prototypes at least as wide as word vectors, not {width} < "
            f"{word_width}; take narrower word vectors, or interpolation"
        )
    words, prototypes = word_vectors.astype(np.float64), prototypes.astype(np.float64)
    # What rounding alone, of the centring too, can make of a singular value that is zero.
    floor = max(len(words), width) * np.finfo(float).eps
    floor *= float(np.linalg.norm(words) * np.linalg.norm(prototypes))
    word_mean, prototype_mean = words.mean(axis=0), prototypes.mean(axis=0)
    words, prototypes = words - word_mean, prototypes - prototype_mean
    left, singular, right = np.linalg.svd(prototypes.T @ words, full_matrices=False)
    rank = int((singular > floor).sum())
    if not rank:
        raise UserError(
            "Procrustes needs words whose vectors and prototypes differ; this knowledge has none; "
            "take interpolation"
        )
    return Procrustes(
        matrix=left[:, :rank] @ right[:rank],
        scale=float(singular[:rank].sum() / np.square(words).sum()),
        word_mean=word_mean,
        prototype_mean=prototype_mean,
        rank=rank,
    )


def apply_procrustes(
    mapping: Procrustes, queries: Float[np.ndarray, "U _"]
) -> Float[np.ndarray, "U Z"]:
    """The prototypes of unknown words under a fitted map (App. B, Eq. 23).

    Args:
      mapping: of `fit_procrustes`.
      queries: [U, N], vectors of the unknown words.

    Returns:
      [U, Z] float64.

    Raises:
      UserError: as `interpolate`.
    """
    _check_queries(mapping.word_mean[None], queries)
    centred = queries.astype(np.float64) - mapping.word_mean
    return mapping.scale * centred @ mapping.matrix.T + mapping.prototype_mean


def _highest(values: np.ndarray, m: int) -> np.ndarray:
    """The places of the m highest values, by falling value; of equal ones the first place."""
    least = np.partition(values, len(values) - m)[len(values) - m]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")[:m]]


def _check_queries(word_vectors: np.ndarray, queries: np.ndarray) -> None:
    if queries.shape[1] != word_vectors.shape[1]:
        raise UserError(
            f"the unknown words have vectors of width {queries.shape[1]}, the knowledge of "
            f"{word_vectors.shape[1]}; read both from the same file of word vectors"
        )
    usable = np.isfinite(queries).all(axis=1) & queries.any(axis=1)
    if not usable.all():
        raise UserError(
            f"the vector of unknown word number {int(np.argmin(usable))} is zero or not finite; "
            "drop the word as one without a vector"
        )

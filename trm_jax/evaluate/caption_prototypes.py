"""Prototypes for the words of captions: those of a knowledge, and estimates for all other words.

Source: MASK, section 3.4 and appendix B.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from trm_jax.data.caption_words import CaptionWords
from trm_jax.memory import unknown_words
from trm_jax.types import UserError

UNKNOWN = ("interpolate", "procrustes", "drop")


class CaptionPrototypes(NamedTuple):
    """A prototype for each of the words of captions.

    vectors: float32 [U, Z].
    neighbours: for each unknown word, the words of the knowledge that it was made of, the nearest
        first; empty for "procrustes".
    report: what was done, in what JSON can say.
    """

    vectors: np.ndarray
    neighbours: dict[str, tuple[str, ...]]
    report: dict[str, Any]


def estimate(
    captions: CaptionWords,
    words: Sequence[str],
    word_vectors: Float[np.ndarray, "K N"],
    prototypes: Float[np.ndarray, "K Z"],
    read: Callable[[Sequence[str]], np.ndarray],
    *,
    unknown: str = "interpolate",
    neighbours: int = 10,
) -> CaptionPrototypes:
    """Looks words up in a knowledge, and makes prototypes of those that it lacks.

    Args:
      captions: their words; `known` ones must be among `words`.
      words: K of the knowledge.
      word_vectors: [K, N].
      prototypes: [K, Z], or random regions, or anything else that stands in their place.
      read: words -> their vectors [u, N]; asked for unknown ones only.
      unknown: "interpolate" (Eq. 11-13), "procrustes" (appendix B), or "drop": then captions must
        have none.
      neighbours: m of "interpolate"; K if there are no more.

    Raises:
      UserError: `unknown` is none of these, or the spaces do not allow a map.
    """
    if unknown not in UNKNOWN:
        raise UserError(f"unknown words: {unknown!r} is none of {', '.join(UNKNOWN)}")
    place = {word: row for row, word in enumerate(words)}
    vectors = np.zeros((len(captions.words), prototypes.shape[1]), np.float32)
    known = np.flatnonzero(captions.known)
    vectors[known] = prototypes[[place[captions.words[row]] for row in known]]
    rows = np.flatnonzero(~captions.known)
    report: dict[str, Any] = {"words_known": len(known), "words_unknown": len(rows)}
    made_of: dict[str, tuple[str, ...]] = {}
    if len(rows):
        names = [captions.words[row] for row in rows]
        queries = read(names)
        if unknown == "interpolate":
            found = unknown_words.interpolate(word_vectors, prototypes, queries, top=neighbours)
            vectors[rows] = found.prototypes
            report["neighbours"] = found.top
            made_of = {
                name: tuple(str(words[int(k)]) for k in near)
                for name, near in zip(names, found.neighbours, strict=True)
            }
        elif unknown == "procrustes":
            fitted = unknown_words.fit_procrustes(word_vectors, prototypes)
            vectors[rows] = unknown_words.apply_procrustes(fitted, queries)
            report |= {"procrustes_rank": fitted.rank, "word_width": word_vectors.shape[1]}
        else:
            raise UserError("unknown words are to be dropped, but the captions have some")
    return CaptionPrototypes(vectors, made_of, report)

"""Word vectors from texts alone, where no file of vectors is at hand.

Source: Levy, Goldberg and Dagan, "Improving distributional similarity with lessons learned from
word embeddings", 2015: the positive pointwise mutual information (PPMI) of words and the words
around them, its contexts smoothed, and its truncated singular value decomposition. Here a text, a
caption say, is one context: a word is around all other words of its text.

V words, D the width of the vectors.
"""

import collections
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse
from scipy.sparse.linalg import svds

from trm_jax.data.caption_words import tokens
from trm_jax.types import UserError

# What is a smaller part of the greatest, of singular values or lengths, is what rounding left of 0.
_LEAST = 1e-6


class CorpusVectors:
    """Vectors of the words of some texts; stands in the place of `word_vectors.WordVectors`.

    Args: see `fit`, which makes these.

    Attributes:
      words: V of them, in lower case, the most frequent first.
      vectors: float32 [V, D], of each word.
      width: D.
    """

    def __init__(self, words: Sequence[str], vectors: Float[np.ndarray, "V D"]):
        self.words = tuple(words)
        self.vectors = vectors
        self.width = vectors.shape[1]
        self._rows = {word: row for row, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._rows

    def has(self, words: Sequence[str]) -> Bool[np.ndarray, " W"]:
        """Whether there is a vector of each word as it is written."""
        return np.array([word in self._rows for word in words], bool)

    def read(self, words: Sequence[str]) -> tuple[Float[np.ndarray, "W D"], Bool[np.ndarray, " W"]]:
        """(float32 [W, D], zero where there is no vector of the word; whether there is one)."""
        found = self.has(words)
        matrix = np.zeros((len(words), self.width), np.float32)
        matrix[found] = self.vectors[[self._rows[word] for word in words if word in self._rows]]
        return matrix, found


def fit(
    texts: Iterable[str],
    *,
    width: int = 300,
    min_count: int = 5,
    smoothing: float = 0.75,
    shift: float = 1.0,
) -> CorpusVectors:
    """Makes vectors of the words of texts, by U sqrt(S) of PPMI = U S V^T.

    Words are the tokens with a letter that captions are cut into, in lower case. What has a vector
    occurs beside another word more often than by chance. The same texts, in any order, give the
    same vectors on the same machine; of each column the entry of the greatest size is positive.

    Args:
      texts: of any number; read once.
      width: D.
      min_count: a word that occurs less often is left out, of contexts too.
      smoothing: see `positive_pmi`.
      shift: see `positive_pmi`.

    Raises:
      UserError: a setting cannot be, or the texts have no more than D words with a vector.
    """
    if min(width, min_count) < 1 or not smoothing > 0 or not shift > 0:
        raise UserError(
            f"word vectors of width={width}, min_count={min_count}, smoothing={smoothing}, "
            f"shift={shift}; all of them must be positive"
        )
    words, occurrences = _occurrences(texts, min_count)
    information = positive_pmi(cooccurrences(occurrences), smoothing=smoothing, shift=shift)
    told = np.diff(information.indptr) > 0
    if told.sum() <= width:
        raise UserError(
            f"the texts have {int(told.sum())} words that occur {min_count} times and beside "
            f"others; vectors of width {width} need more: take a smaller width or more texts"
        )
    vectors = _factors(information, width)
    lengths = np.linalg.norm(vectors, axis=1)
    told &= lengths > _LEAST * lengths.max()
    return CorpusVectors(
        [word for word, kept in zip(words, told, strict=True) if kept],
        vectors[told].astype(np.float32),
    )


def cooccurrences(occurrences: sparse.csr_array) -> sparse.csr_array:
    """How often two words stand in one text, [V, V] with the diagonal: pairs of different places.

    Args:
      occurrences: [texts, V], how often each word is in each text. Of one that is n times in a text
        n (n - 1) pairs are of the word with itself.
    """
    pairs = (occurrences.T @ occurrences).tocsr()
    pairs -= sparse.diags_array(occurrences.sum(axis=0), dtype=pairs.dtype)
    pairs.eliminate_zeros()
    return pairs


def positive_pmi(
    counts: sparse.csr_array, *, smoothing: float = 0.75, shift: float = 1.0
) -> sparse.csr_array:
    """max(log(P(w, c) / (P(w) P'(c))) - log(shift), 0), float64 [V, V]; zeros are not stored.

    Args:
      counts: [V, V], pairs of a word w (row) and a context c, all >= 0.
      smoothing: P'(c) is proportional to the count of c to this power; below 1, rare contexts,
        whose information is overestimated, count less.
      shift: above 1, what is little more than chance is dropped too (the k of word2vec's negative
        samples).
    """
    pairs = counts.astype(np.float64).tocoo()
    of_word, of_context = (np.asarray(pairs.sum(axis=axis)).ravel() for axis in (1, 0))
    smooth = of_context**smoothing
    row, column = pairs.coords
    # P(w, c) / P(w) has no need of the number of all pairs.
    ratio = pairs.data / of_word[row] / (smooth[column] / smooth.sum())
    values = np.maximum(np.log(ratio) - np.log(shift), 0.0)
    information = sparse.csr_array((values, (row, column)), shape=pairs.shape)
    information.eliminate_zeros()
    return information


def _occurrences(texts: Iterable[str], min_count: int) -> tuple[list[str], sparse.csr_array]:
    """The frequent words, the most frequent first, and how often each is in each text."""
    rows = [
        collections.Counter(token.lower() for token in tokens(text) if _has_letter(token))
        for text in texts
    ]
    total = collections.Counter()
    for row in rows:
        total.update(row)
    words = sorted(word for word, count in total.items() if count >= min_count)
    words.sort(key=lambda word: -total[word])
    column = {word: number for number, word in enumerate(words)}
    entries = [
        (number, column[word], count)
        for number, row in enumerate(rows)
        for word, count in row.items()
        if word in column
    ]
    text, word, count = np.array(entries, np.int64).reshape(-1, 3).T
    return words, sparse.csr_array((count, (text, word)), shape=(len(rows), len(words)))


def _has_letter(token: str) -> bool:
    return any(character.isalpha() for character in token)


def _factors(matrix: sparse.csr_array, width: int) -> np.ndarray:
    """U sqrt(S) of the `width` greatest singular values, by falling value, with fixed signs."""
    # The method starts from a random vector unless it is given one.
    start = np.random.default_rng(0).normal(size=len(matrix.indptr) - 1)
    found, values, _ = svds(matrix, k=width, v0=start)
    left, singular = np.asarray(found), np.asarray(values)
    order = np.argsort(-singular, kind="stable")
    left, singular = left[:, order], singular[order]
    greatest = left[np.abs(left).argmax(axis=0), np.arange(width)]
    # Below that, where the matrix has a lower rank, values are rounding and vectors anything.
    singular = np.where(singular > _LEAST * singular.max(), singular, 0.0)
    return left * np.where(greatest < 0, -1.0, 1.0) * np.sqrt(singular)

"""The words of captions that an unpaired matcher can use, as rows of indices into a word list.

A caption is scored by its words: those of the knowledge have a prototype, any other with a word
vector gets one from its neighbours, the rest is dropped. Tokens are those of NLTK's word tokenizer;
they are neither lemmatised nor filtered by a list, and repeats stay. A word of the knowledge with
several tokens ("traffic light") is one word of a caption.

A token is looked up, in this order, as it is written in the knowledge, in lower case in the
knowledge, as it is written among the word vectors, in lower case among them. So "Man" at the start
of a caption is the knowledge's "man", though the vectors may have a "Man".
"""

import array
import collections
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64
from tqdm import tqdm

from trm_jax.data.tagger import open_tagger
from trm_jax.types import UserError

_NOUNS = frozenset(("NN", "NNS", "NNP", "NNPS"))
# The tags of the Penn Treebank that each choice takes, None for all.
_TAGS = {"all": None, "nouns_adjectives": _NOUNS | {"JJ", "JJR", "JJS"}, "nouns": _NOUNS}
CHOICES = tuple(_TAGS)

# The tokenizer takes one sentence. The tagger divides a caption at the same places.
_FULL_STOP = re.compile(r"(?<=\w\w\.)(?=\s)")
_LETTER = re.compile(r"[^\W\d_]")


class CaptionWords(NamedTuple):
    """The usable words of m captions; those of caption i are indices[indptr[i] : indptr[i + 1]].

    indptr: int64 [m + 1], ascending from 0. indices: int32, into `words`, in a caption's order.
    words: U of them, each once, as the knowledge or the word vectors have them.
    known: bool [U], whether the knowledge has the word; else its prototype is to be estimated.
    dropped: token -> how often it was left out for want of a vector, the most frequent first.
    """

    indptr: Int64[np.ndarray, " m_plus_1"]
    indices: Int32[np.ndarray, " n"]
    words: tuple[str, ...]
    known: Bool[np.ndarray, " U"]
    dropped: Mapping[str, int]

    def of(self, caption: int) -> tuple[str, ...]:
        """The words of one caption, in its order, with repeats."""
        part = self.indices[self.indptr[caption] : self.indptr[caption + 1]]
        return tuple(self.words[index] for index in part)

    @property
    def unusable(self) -> int:
        """The number of captions without a usable word."""
        return int((np.diff(self.indptr) == 0).sum())

    def describe(self) -> str:
        """One line: how many words the knowledge has, are to be estimated, were dropped."""
        known = int(self.known[self.indices].sum())
        return (
            f"{len(self.indptr) - 1:,} captions: {known:,} words of the knowledge, "
            f"{len(self.indices) - known:,} outside it with a vector, "
            f"{sum(self.dropped.values()):,} dropped without one; {self.unusable:,} captions "
            "without a usable word"
        )


def tokens(text: str) -> list[str]:
    """The tokens of a caption by NLTK's word tokenizer, punctuation among them; needs no data."""
    tokenize = _tokenizer().tokenize
    return [token for sentence in _FULL_STOP.split(text) for token in tokenize(sentence)]


def usable(
    texts: Sequence[str],
    known: Collection[str],
    has_vector: Callable[[str], bool],
    *,
    caption_words: str = "all",
    tagger: str | Path = "",
    longest: int = 3,
    source: str = "the captions",
) -> CaptionWords:
    """The words of each caption that can be scored.

    From the first token on, the longest concept of the knowledge is taken, up to `longest` tokens;
    what is left are single tokens with a letter. A concept has the tag of its last token, so that
    "hot dog" is a noun. What is not of the chosen tags is left out and not counted as dropped.

    Args:
      texts: m captions.
      known: the words of the knowledge; concepts of several tokens have spaces between them.
      has_vector: whether there is a vector of a word, as it is written.
      caption_words: "all", "nouns_adjectives" or "nouns".
      tagger: see `open_tagger`; not needed for "all".
      longest: tokens of the longest concept, from 1.
      source: what the captions are from, for messages.

    Returns:
      A row a caption, of no words where none can be used.

    Raises:
      UserError: a text is empty, `caption_words` or `longest` has another value, or the tagger is
        needed and its data is not there.
    """
    if caption_words not in CHOICES:
        raise UserError(f"caption_words is '{caption_words}'; it is one of {', '.join(CHOICES)}")
    if longest < 1:
        raise UserError(f"concepts of {longest} tokens cannot be looked for; take 1 or more")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"{source}: line {number} is empty; give it a text or take it out")
    tags = _TAGS[caption_words]
    tagged = None if tags is None else open_tagger(tagger)
    lookup = _Lookup(known, has_vector, longest)
    indptr, indices = array.array("q", [0]), array.array("i")
    for text in tqdm(texts, desc="words of captions", unit="caption", disable=None):
        if tags is None or tagged is None:
            parts = tokens(text)
            wanted = [True] * len(parts)
        else:
            found = tagged(text)
            parts = [text[start:end] for start, end, _ in found]
            wanted = [tag in tags for *_, tag in found]
        indices.extend(lookup.rows(parts, wanted))
        indptr.append(len(indices))
    return CaptionWords(
        np.array(indptr, np.int64),
        np.array(indices, np.int32),
        tuple(lookup.numbers),
        np.array(lookup.known, bool),
        dict(lookup.dropped.most_common()),
    )


class _Lookup:
    """Numbers the words of captions as they are met."""

    def __init__(self, known: Collection[str], has_vector: Callable[[str], bool], longest: int):
        self.numbers: dict[str, int] = {}
        self.known: list[bool] = []
        self.dropped: collections.Counter[str] = collections.Counter()
        self._knowledge = frozenset(known)
        self._has_vector = has_vector
        self._longest = longest
        self._rows: dict[str, int | None] = {}
        self._concepts, self._starts = _concepts(self._knowledge, longest)

    def rows(self, parts: Sequence[str], wanted: Sequence[bool]) -> list[int]:
        """The numbers of one caption's words, of units whose last token is wanted."""
        rows, end = [], 0
        while end < len(parts):
            start = end
            concept, end = self._concept(parts, start)
            if not wanted[end - 1]:
                continue
            word = parts[start] if concept is None else concept
            if concept is None and not _LETTER.search(word):
                continue
            if word not in self._rows:
                self._rows[word] = self._number(word)
            row = self._rows[word]
            if row is None:
                self.dropped[word] += 1
            else:
                rows.append(row)
        return rows

    def _concept(self, parts: Sequence[str], start: int) -> tuple[str | None, int]:
        """The longest concept of several tokens at `start`, if any, and where it ends."""
        first = parts[start]
        if first in self._starts or first.lower() in self._starts:
            for end in range(min(start + self._longest, len(parts)), start + 1, -1):
                text = " ".join(parts[start:end])
                for form in (text, text.lower()):
                    if form in self._concepts:
                        return self._concepts[form], end
        return None, start + 1

    def _number(self, word: str) -> int | None:
        """The number of the word in the form that is known or has a vector; None for none."""
        forms = tuple(dict.fromkeys((word, word.lower())))
        form = next((form for form in forms if form in self._knowledge), None)
        known = form is not None
        if form is None:
            form = next((form for form in forms if self._has_vector(form)), None)
        if form is None:
            return None
        if form not in self.numbers:
            self.numbers[form] = len(self.known)
            self.known.append(known)
        return self.numbers[form]


@functools.lru_cache(maxsize=4)
def _concepts(knowledge: frozenset[str], longest: int) -> tuple[dict[str, str], frozenset[str]]:
    """(words of several tokens, by these: a caption's "women's hat" has three; first tokens)."""
    found: dict[str, str] = {}
    starts: set[str] = set()
    for word in sorted(knowledge):
        parts = tokens(word)
        if 1 < len(parts) <= longest:
            found.setdefault(" ".join(parts), word)
            starts.add(parts[0])
    return found, frozenset(starts)


@functools.cache
def _tokenizer() -> Any:
    from nltk.tokenize import NLTKWordTokenizer  # late: NLTK takes a second to import

    return NLTKWordTokenizer()

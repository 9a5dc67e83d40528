"""Word vectors of some words from a file of GloVe, word2vec or fastText.

`read` takes them in one pass. `open_file` finds them by an index that is kept beside the file, so
that all further reading is by position: for runs that learn late which words they need.
word_vector_files.py has the formats.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from trm_jax.data import word_vector_files as files
from trm_jax.data.word_vector_index import WordIndex, open_index
from trm_jax.types import UserError


def read(
    path: Path, words: Sequence[str], width: int | None = None
) -> tuple[Float[np.ndarray, "V D"], Bool[np.ndarray, " V"]]:
    """The vectors of some words.

    The file is read word by word, so that one of several gigabytes needs little memory. Words are
    compared as they are written, case included; of two lines of one word the first counts. The
    width of every line is checked, the numbers of those that are asked for.

    Args:
      path: of the file, in any format of word_vector_files.py.
      words: V of them; an empty one is in no file.
      width: D of the model, None to take any.

    Returns:
      (float32 [V, D], zero where the file lacks the word; whether it has the word).

    Raises:
      UserError: the file cannot be read, is empty, cut off, no such file or of another width, or
        a line has another width than the first or something that is not a finite number.
    """
    places: dict[bytes, list[int]] = {}
    for place, word in enumerate(words):
        if word:
            places.setdefault(_encoded(word), []).append(place)
    try:
        with path.open("rb") as file:
            return _read(path, file, places, len(words), width)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


@runtime_checkable
class VectorSource(Protocol):
    """Where vectors of words come from: a file (`WordVectors`) or texts (`corpus_vectors.py`)."""

    width: int

    def __contains__(self, word: str) -> bool: ...

    def has(self, words: Sequence[str]) -> Bool[np.ndarray, " V"]:
        """Whether there is a vector of each word as it is written."""
        ...

    def read(self, words: Sequence[str]) -> tuple[Float[np.ndarray, "V D"], Bool[np.ndarray, " V"]]:
        """(float32 [V, D], zero where there is no vector of the word; whether there is one)."""
        ...


class WordVectors:
    """The vectors of one file, each looked up where an index says that it stands.

    Nothing but the index is held; the file is open during a call only.

    Args: see `open_file`, which makes these.

    Attributes:
      path: of the file.
      width: D, of each vector.
    """

    def __init__(self, path: Path, layout: files.Layout, index: WordIndex):
        self.path = path
        self.width = layout.width
        self._layout = layout
        self._index = index

    def __len__(self) -> int:
        return len(self._index.keys)

    def __contains__(self, word: str) -> bool:
        return bool(self.has([word])[0])

    def has(self, words: Sequence[str]) -> Bool[np.ndarray, " V"]:
        """Whether the file has each word as it is written; it has no empty one."""
        return self._offsets(words) >= 0

    def read(self, words: Sequence[str]) -> tuple[Float[np.ndarray, "V D"], Bool[np.ndarray, " V"]]:
        """(float32 [V, D], zero where the file lacks the word; whether it has the word).

        Raises UserError if the file cannot be read, was changed since it was opened, or has
        something that is not a finite number in one of these vectors.
        """
        offsets = self._offsets(words)
        matrix = np.zeros((len(words), self.width), np.float32)
        try:
            with self.path.open("rb") as file:
                for row in map(int, np.argsort(offsets, kind="stable")):  # from front to back
                    if offsets[row] >= 0:
                        matrix[row] = self._vector(file, int(offsets[row]), words[row])
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror})") from None
        return matrix, offsets >= 0

    def _offsets(self, words: Sequence[str]) -> np.ndarray:
        offsets = self._index.find([_encoded(word) for word in words])
        return np.where([bool(word) for word in words], offsets, -1)

    def _vector(self, file: BinaryIO, offset: int, word: str) -> np.ndarray:
        payload = files.payload_at(self.path, file, self._layout, offset, _encoded(word))
        return files.decode(self.path, self._layout, payload, f"the vector of {word!r}")


def open_file(path: Path, width: int | None = None, *, cache: Path | None = None) -> WordVectors:
    """Opens a file of vectors by the index that is kept of it; the first time the file is scanned.

    Args:
      path: of the file, in any format of word_vector_files.py.
      width: D that the vectors must have, None to take any.
      cache: a folder for the index where the file's own cannot be written, see `open_index`.

    Raises:
      UserError: the file cannot be read, is empty, cut off, no such file or of another width, or
        a line has another width than the first.
    """

    def scan() -> Iterable[tuple[int, bytes]]:
        with path.open("rb") as file:
            for record in _shown(files.records(path, file, layout)):
                yield record.offset, record.word

    try:
        with path.open("rb") as file:
            layout = files.layout_of(path, file)
        if width is not None and layout.width != width:
            raise UserError(
                f"{path} has vectors of width {layout.width}, {width} is needed; take the file "
                "that the others are from"
            )
        return WordVectors(path, layout, open_index(path, scan, cache=cache))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


class Found(NamedTuple):
    """Vectors of V words.

    vectors: float32 [V, D], zero where none was found. found: which have one. composed: whose
    vector is the mean of their parts' and stands in the file for no word.
    """

    vectors: Float[np.ndarray, "V D"]
    found: Bool[np.ndarray, " V"]
    composed: Bool[np.ndarray, " V"]

    @property
    def missing(self) -> int:
        """The number of words without a vector."""
        return int((~self.found).sum())


def read_any_case(source: VectorSource, words: Sequence[str]) -> Found:
    """The vectors of some words, if need be of their lower case or of their parts.

    A word is looked up as it is written, then in lower case. One of several tokens ("traffic
    light", "traffic_light") is looked up with spaces and with "_" between them; if the file has it
    in no form, its vector is the mean of its tokens' vectors, each found in the same way. Tokens
    without a vector are left out of the mean: some files have no "of".

    Args:
      source: the vectors.
      words: V of them.

    Raises:
      UserError: see `WordVectors.read`.
    """
    parts = {word: word.replace("_", " ").split() for word in words}
    forms = {word: _forms(word, " ".join(tokens)) for word, tokens in parts.items()}
    for token in [token for tokens in parts.values() for token in tokens]:
        forms.setdefault(token, _forms(token, token))
    every = list(dict.fromkeys(form for several in forms.values() for form in several))
    there = {form for form, has in zip(every, source.has(every), strict=True) if has}
    written = {
        word: next((form for form in several if form in there), None)
        for word, several in forms.items()
    }
    used = list(dict.fromkeys(form for form in written.values() if form is not None))
    row = {form: number for number, form in enumerate(used)}
    table, _ = source.read(used)
    matrix = np.zeros((len(words), source.width), np.float32)
    found, composed = np.zeros(len(words), bool), np.zeros(len(words), bool)
    for place, word in enumerate(words):
        whole = written[word]
        chosen = [whole] if whole is not None else [written[token] for token in parts[word]]
        rows = [row[form] for form in chosen if form is not None]
        if rows:
            matrix[place] = table[rows].mean(axis=0)
            found[place], composed[place] = True, whole is None
    return Found(matrix, found, composed)


def _forms(word: str, spaced: str) -> list[str]:
    """How a file may have a word, the best first; `spaced` is the word with spaces in it."""
    written = [word, spaced, spaced.replace(" ", "_")]
    return [form for form in dict.fromkeys([*written, *map(str.lower, written)]) if form]


def _read(
    path: Path, file: BinaryIO, places: dict[bytes, list[int]], size: int, wanted: int | None
) -> tuple[np.ndarray, np.ndarray]:
    layout = files.layout_of(path, file)
    if wanted is not None and layout.width != wanted:
        raise UserError(
            f"{path} has vectors of width {layout.width}, the model embeds words in {wanted}; set "
            f"model.matching.text.embedding={layout.width} or take another file"
        )
    matrix = np.zeros((size, layout.width), np.float32)
    found = np.zeros(size, bool)
    kind = "word" if layout.binary else "line"
    for record in _shown(files.records(path, file, layout)):
        rows = places.get(record.word)
        if rows is not None and not found[rows[0]]:
            place = f"{kind} {record.number}"
            matrix[rows] = files.decode(path, layout, record.payload, place)
            found[rows] = True
    return matrix, found


def _shown(records: Iterable[files.Record]) -> tqdm:
    return tqdm(records, desc="reading word vectors", unit=" words", disable=None)


def _encoded(word: str) -> bytes:
    return word.encode(errors="surrogatepass")

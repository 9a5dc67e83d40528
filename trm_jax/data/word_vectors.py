"""Word vectors as GloVe and fastText publish them: a text file, a word and its numbers a line.

Sources: Pennington et al., "GloVe: Global Vectors for Word Representation", EMNLP 2014; Bojanowski
et al., "Enriching Word Vectors with Subword Information", TACL 2017, whose files start with a line
of two numbers, the count of words and the width.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Bool, Float
from tqdm import tqdm

from trm_jax.types import UserError

# A line of a text file of vectors is shorter; a file without line ends is not read as one.
_LONGEST = 1 << 20
_ARCHIVES = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip archive"}


def read(
    path: Path, words: Sequence[str], width: int | None = None
) -> tuple[Float[np.ndarray, "V D"], Bool[np.ndarray, " V"]]:
    """The vectors of some words.

    The file is read line by line, so that one of several gigabytes needs little memory. Words are
    compared as they are written, case included; of two lines of one word the first counts. The
    width of every line is checked, the numbers of those that are asked for.

    Args:
      path: of the file, GloVe's or fastText's text format.
      words: V of them; an empty one is in no file.
      width: D of the model, None to take any.

    Returns:
      (float32 [V, D], zero where the file lacks the word; whether it has the word).

    Raises:
      UserError: the file cannot be read, is empty, cut off, no such text or of another width, or
        a line has another width than the first or something that is not a finite number.
    """
    places: dict[bytes, list[int]] = {}
    for place, word in enumerate(words):
        if word:
            places.setdefault(word.encode(errors="surrogatepass"), []).append(place)
    try:
        with path.open("rb") as file:
            return _read(path, file, places, len(words), width)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def _read(
    path: Path, file: BinaryIO, places: dict[bytes, list[int]], size: int, wanted: int | None
) -> tuple[np.ndarray, np.ndarray]:
    lines = _lines(path, file)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path} is empty; fetch it again")
    header = _header(first)
    if header is None:
        lines = itertools.chain([first], lines)
    count, width = header or (None, first.count(b" "))
    if width < 1:
        raise UserError(f"{path}: line 1 is not a word and its numbers; this is no file of vectors")
    if wanted is not None and width != wanted:
        raise UserError(
            f"{path} has vectors of width {width}, the model embeds words in {wanted}; set "
            f"model.matching.text.embedding={width} or take another file"
        )
    matrix = np.zeros((size, width), np.float32)
    found = np.zeros(size, bool)
    before = 1 if header else 0
    number = before
    shown = tqdm(lines, desc="reading word vectors", unit=" words", disable=None)
    for number, line in enumerate(shown, start=before + 1):
        plain = line.count(b" ") == width
        word = line[: line.find(b" ")] if plain else _spaced(path, number, line, width)
        rows = places.get(word)
        if rows is not None and not found[rows[0]]:
            matrix[rows] = _numbers(path, number, line[len(word) + 1 :])
            found[rows] = True
    if count is not None and number - before != count:
        raise UserError(
            f"{path} has {number - before} words, its first line says {count}; if it was cut off, "
            "fetch it again, else correct that line"
        )
    return matrix, found


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Lines without their ends; only b"\\n" ends one, since words may hold other separators."""
    number = 0
    while line := file.readline(_LONGEST):
        number += 1
        if number == 1:
            _check_head(path, line)
        if len(line) == _LONGEST:
            raise UserError(f"{path}: line {number} is too long; this is no text file of vectors")
        yield line.rstrip(b" \r\n")


def _check_head(path: Path, line: bytes) -> None:
    for magic, kind in _ARCHIVES.items():
        if line.startswith(magic):
            raise UserError(f"{path} is {kind}; unpack it and give the text file inside")
    if b"\0" in line:
        raise UserError(f"{path} is no text; give the text form of the vectors (.txt, .vec)")


def _header(line: bytes) -> tuple[int, int] | None:
    """fastText's (number of words, width), None if the line is none."""
    fields = line.split(b" ")
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        return int(fields[0]), int(fields[1])
    return None


def _spaced(path: Path, number: int, line: bytes, width: int) -> bytes:
    """The word of a line of another width, if it is one with spaces, as the largest GloVe has."""
    fields = line.rsplit(b" ", width)
    word = fields[0]
    if len(fields) <= width or _is_number(word.rsplit(b" ", 1)[-1]):
        raise UserError(
            f"{path}: line {number} has {line.count(b' ')} numbers, not {width}; the file is "
            "damaged, fetch it again"
        )
    return word


def _numbers(path: Path, number: int, text: bytes) -> np.ndarray:
    fields = text.split(b" ")
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            vector = np.array([float(field) for field in fields], np.float32)
    except ValueError:
        wrong = next(field for field in fields if not _is_number(field))
        raise UserError(
            f"{path}: line {number} has {wrong.decode(errors='replace')!r} in place of a number; "
            "the file is damaged, fetch it again"
        ) from None
    if not np.isfinite(vector).all():
        raise UserError(
            f"{path}: line {number} has a number that is not finite; the file is damaged, fetch "
            "it again"
        )
    return vector


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True

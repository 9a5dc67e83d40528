"""The formats that word vectors are published in, told by content and read record by record.

    GloVe text                 a word and its numbers a line, spaces between
    fastText, word2vec text    the same below a line of two numbers: the count of words, the width
    word2vec binary            that first line, then of each word its bytes, a space and its numbers
                               as float32 (little-endian), in some files with a line end behind

Sources: Pennington et al., "GloVe: Global Vectors for Word Representation", EMNLP 2014; Mikolov et
al., "Distributed Representations of Words and Phrases and their Compositionality", NIPS 2013 (the
program word2vec writes both of its formats); Bojanowski et al., "Enriching Word Vectors with
Subword Information", TACL 2017.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

from trm_jax.types import UserError

# A line of a text file of vectors is shorter; a file without line ends is not read as one.
_LONGEST = 1 << 20
_LONGEST_WORD = 1 << 12  # bytes of a word in a binary file
_WIDEST = 1 << 16  # numbers of a vector
_CHUNK = 1 << 18  # bytes of a binary file at a time
_HEADS = {
    b"PK\x03\x04": "a zip archive; unpack it and give the text file inside",
    b"\x1f\x8b": "a gzip archive; unpack it and give the text file inside",
    b"\xba\x16\x4f\x2f": "a model of fastText (.bin); give the text form of its vectors (.vec)",
}
_CONTROL = frozenset(range(32)) - set(b"\t\n\r") | {127}


class Layout(NamedTuple):
    """What the head of a file says of the rest.

    binary: whether numbers are float32 and not text. width: D, of a vector. count: of the words,
    None where the file does not say it. start: the byte at which the first word stands.
    """

    binary: bool
    width: int
    count: int | None
    start: int


class Record(NamedTuple):
    """One word as the file has it.

    number: its line in a text file, its place from 1 in a binary one. offset: the byte at which
    the word starts. word: its bytes. payload: what holds its numbers, see `decode`.
    """

    number: int
    offset: int
    word: bytes
    payload: bytes


def layout_of(path: Path, file: BinaryIO) -> Layout:
    """The format of an open file, from its first lines.

    Raises:
      UserError: the file is empty, or it is an archive or anything else than word vectors.
      OSError: it cannot be read.
    """
    first = file.readline(_LONGEST)
    if not first:
        raise UserError(f"{path} is empty; fetch it again")
    for head, kind in _HEADS.items():
        if first.startswith(head):
            raise UserError(f"{path} is {kind}")
    if b"\0" in first:
        raise UserError(f"{path} is no text; give the text form of the vectors (.txt, .vec)")
    _check_length(path, 1, first)
    fields = first.rstrip(b" \r\n").split(b" ")
    count, width, start = None, len(fields) - 1, 0
    if width == 1 and all(field.isdigit() and len(field) < 16 for field in fields):
        count, width, start = int(fields[0]), int(fields[1]), len(first)
    elif not all(map(_is_number, fields[1:])):
        width = 0
    if not 0 < width <= _WIDEST:
        raise UserError(f"{path}: line 1 is not a word and its numbers; this is no file of vectors")
    binary = count is not None and _is_binary(file, start, width)
    return Layout(binary, width, count, start)


def records(path: Path, file: BinaryIO, layout: Layout) -> Iterator[Record]:
    """Every word of an open file in its order; the file is read once, little of it at a time.

    Raises:
      UserError: a line has another width than the first, the file has not as many words as its
        first line says, or it is no such file.
      OSError: it cannot be read.
    """
    file.seek(layout.start)
    read = _binary_records if layout.binary else _text_records
    return read(path, file, layout)


def payload_at(path: Path, file: BinaryIO, layout: Layout, offset: int, word: bytes) -> bytes:
    """The payload of the word that stands at the byte `offset` of an open file.

    Raises UserError if another word stands there, for the file is not the one that was indexed.
    """
    file.seek(offset)
    if layout.binary:
        data = file.read(len(word) + 1 + 4 * layout.width)
        whole = len(data) == len(word) + 1 + 4 * layout.width
    else:
        data = file.readline(_LONGEST).rstrip(b" \r\n")
        whole = data.count(b" ", len(word)) == layout.width
    if not (whole and data.startswith(word + b" ")):
        raise UserError(
            f"{path} is not as its index says; delete {path.name}*.index, beside it or in the "
            "cache folder, and start again"
        )
    return data[len(word) + 1 :]


def decode(path: Path, layout: Layout, payload: bytes, place: str) -> Float[np.ndarray, " D"]:
    """The vector of one word, float32 [D].

    Args:
      path: of the file. layout: its format. payload: of the word.
      place: where it stands, for the message.

    Raises:
      UserError: something in it is no finite number that float32 holds.
    """
    if layout.binary:
        vector = np.frombuffer(payload, "<f4").astype(np.float32)
    else:
        fields = payload.split(b" ")
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
                vector = np.array([float(field) for field in fields], np.float32)
        except ValueError:
            wrong = next(field for field in fields if not _is_number(field))
            raise UserError(
                f"{path}: {place} has {wrong.decode(errors='replace')!r} in place of a number; "
                "the file is damaged, fetch it again"
            ) from None
    if not np.isfinite(vector).all():
        raise UserError(
            f"{path}: {place} has a number that is not finite; the file is damaged, fetch it again"
        )
    return vector


def _is_binary(file: BinaryIO, start: int, width: int) -> bool:
    """Whether what stands below a first line of two numbers is word2vec's binary format.

    It is not if the second line reads as text, and neither if the first vector's bytes could be
    text: then the file is a damaged text, and the message should say so.
    """
    fields = file.readline(_LONGEST).rstrip(b" \r\n").rsplit(b" ", width)
    if len(fields) > width and all(map(_is_number, fields[1:])):
        return False
    file.seek(start)
    sample = file.read(_LONGEST_WORD)
    sample = sample[: sample.find(b" ") + 1 + 4 * width]
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        if error.end < len(sample):  # else the sample ends within a letter
            return True
    return not _CONTROL.isdisjoint(sample)


def _text_records(path: Path, file: BinaryIO, layout: Layout) -> Iterator[Record]:
    """Lines; only b"\\n" ends one, since words may hold other separators."""
    width, offset = layout.width, layout.start
    before = 0 if layout.count is None else 1
    number = before
    while line := file.readline(_LONGEST):
        number += 1
        _check_length(path, number, line)
        text = line.rstrip(b" \r\n")
        plain = text.count(b" ") == width
        word = text[: text.find(b" ")] if plain else _spaced(path, number, text, width)
        yield Record(number, offset, word, text[len(word) + 1 :])
        offset += len(line)
    if layout.count is not None and number - before != layout.count:
        raise UserError(
            f"{path} has {number - before} words, its first line says {layout.count}; if it was "
            "cut off, fetch it again, else correct that line"
        )


def _binary_records(path: Path, file: BinaryIO, layout: Layout) -> Iterator[Record]:
    size, data, at, base = 4 * layout.width, b"", 0, layout.start
    longest = _LONGEST_WORD + 1 + size
    for number in range(1, (layout.count or 0) + 1):
        if len(data) - at < longest:
            base += at
            data, at = data[at:] + file.read(_CHUNK + longest), 0
        at += data.startswith(b"\n", at)
        space = data.find(b" ", at, at + _LONGEST_WORD)
        end = space + 1 + size
        if space < 0 and len(data) - at >= _LONGEST_WORD:
            raise UserError(
                f"{path}: no word ends where word {number} of the binary file should; the file is "
                "damaged, fetch it again"
            )
        if space < 0 or end > len(data):
            raise UserError(
                f"{path} ends within word {number}, its first line says {layout.count}; the file "
                "was cut off, fetch it again"
            )
        yield Record(number, base + at, data[at:space], data[space + 1 : end])
        at = end
    if (data[at:] + file.read(_CHUNK)).strip(b"\r\n"):
        raise UserError(
            f"{path} does not end with word {layout.count}, as its first line says; the file is "
            "damaged, fetch it again"
        )


def _check_length(path: Path, number: int, line: bytes) -> None:
    if len(line) == _LONGEST:
        raise UserError(f"{path}: line {number} is too long; this is no text file of vectors")


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


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True

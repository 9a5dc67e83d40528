"""Where each word of a file of vectors stands, kept so that a file is scanned once only.

A file of gigabytes has millions of words, and a run needs some thousand of them. The index is two
sorted arrays, 16 bytes a word whatever its length, and it is read where a search touches it:

    facts    JSON, 256 bytes   version, size and time of the file of vectors, words, CRC of the rest
    keys     uint64 [V]        the first 64 bits of the BLAKE2 hash of each word, ascending
    offsets  int64 [V]         the byte of the file at which that word stands

It lies beside the file (NAME.index), or in a cache folder where that cannot be written.
"""

import array
import contextlib
import errno
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from trm_jax.types import UserError

_VERSION = 1
_HEAD = 256  # bytes of the facts, filled up with spaces
_SMALL = 1 << 24  # bytes of a file that is scanned in a fraction of a second: nothing is kept
_CHUNK = 1 << 20


class WordIndex(NamedTuple):
    """The places of V words; arrays as the head of this file has them, in memory or mapped."""

    keys: UInt64[np.ndarray, " V"]
    offsets: Int64[np.ndarray, " V"]

    def find(self, words: Sequence[bytes]) -> Int64[np.ndarray, " n"]:
        """The offset of each word, the first one where the file has it twice; -1 for none.

        Two words share a key once in some million files; what stands at an offset should still be
        compared with the word.
        """
        if not len(self.keys) or not words:
            return np.full(len(words), -1, np.int64)
        wanted = np.frombuffer(b"".join(map(_key, words)), "<u8")
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[at] == wanted, self.offsets[at], -1).astype(np.int64)


def open_index(
    path: Path,
    scan: Callable[[], Iterable[tuple[int, bytes]]],
    *,
    cache: Path | None = None,
) -> WordIndex:
    """The index of a file: that which is kept, or a new one, which is then kept.

    Of a file below 16 MiB nothing is kept. A kept index is made anew if the file's size or time
    of change is another, or if it is damaged; a line says so. It appears whole or not at all.

    Args:
      path: of the vectors.
      scan: yields (offset, bytes) of each word of the file in its order.
      cache: a folder for the index where the file's own cannot be written or its mode lets nobody
        write; it is made if missing. None: then the index is made in each run.

    Raises:
      UserError: the file was changed while it was scanned; and what `scan` raises.
      OSError: the file is not there.
    """
    facts = _facts(path)
    places = _places(path, cache) if facts["size"] >= _SMALL else []
    for place in places:
        kept = _load(place, facts)
        if kept is not None:
            return kept
    index = _build(scan())
    if _facts(path) != facts:
        raise UserError(f"{path} has changed while it was read; start again when it is complete")
    if places and len(index.keys):
        _keep(places, index, facts)
    return index


def _key(word: bytes) -> bytes:
    return hashlib.blake2b(word, digest_size=8).digest()


def _facts(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"version": _VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _places(path: Path, cache: Path | None) -> list[Path]:
    """Where the index may lie. Files of one name in several folders may share the cache."""
    places = [path.with_name(f"{path.name}.index")]
    if cache is not None:
        folder = hashlib.sha256(os.fsencode(path.absolute().parent)).hexdigest()[:12]
        places.append(cache / f"{path.name}.{folder}.index")
    return places


def _build(words: Iterable[tuple[int, bytes]]) -> WordIndex:
    keys, offsets = bytearray(), array.array("q")
    for offset, word in words:
        keys += _key(word)
        offsets.append(offset)
    unsorted = np.frombuffer(keys, "<u8")
    order = np.argsort(unsorted, kind="stable")  # of two lines of one word the first counts
    return WordIndex(unsorted[order], np.frombuffer(offsets, np.int64)[order])


def _load(place: Path, facts: dict[str, int]) -> WordIndex | None:
    """What is kept, None if it is not there or not of these facts."""
    if not place.is_file():
        return None
    try:
        with place.open("rb") as file:
            known = json.loads(file.read(_HEAD))
            stale = any(known[name] != facts[name] for name in facts)
            count = known["words"]
            if not stale and _crc(file) != (known["crc32"], 16 * count):
                raise ValueError
            arrays = () if stale else _mapped(file, count)
    except Exception:  # noqa: BLE001 (damaged in whatever way: it is made anew)
        print(f"{place} is damaged; the index is made anew")
        return None
    if stale:
        print(f"{place} is of an older version of the file; the index is made anew")
        return None
    return WordIndex(*arrays)


def _mapped(file: BinaryIO, count: int) -> tuple[np.ndarray, np.ndarray]:
    keys = np.memmap(file, "<u8", "r", _HEAD, (count,))
    return keys, np.memmap(file, "<i8", "r", _HEAD + 8 * count, (count,))


def _crc(file: BinaryIO) -> tuple[int, int]:
    """CRC-32 and size in bytes of the rest of a file."""
    crc, size = 0, 0
    while data := file.read(_CHUNK):
        crc, size = zlib.crc32(data, crc), size + len(data)
    return crc, size


def _keep(places: Sequence[Path], index: WordIndex, facts: dict[str, Any]) -> None:
    """Writes the first of `places` that can be written."""
    parts = (index.keys.astype("<u8").data, index.offsets.astype("<i8").data)
    crc = zlib.crc32(parts[1], zlib.crc32(parts[0]))
    head = json.dumps(facts | {"words": len(index.keys), "crc32": crc}).encode().ljust(_HEAD)
    reason = None
    for place in places:
        temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.parent.stat().st_mode & 0o222:
                raise PermissionError(errno.EACCES, "the folder is read-only")
            with temporary.open("wb") as out:
                for part in (head, *parts):
                    out.write(part)
            os.replace(temporary, place)
            return
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = error.strerror
    print(f"{places[-1]} cannot be written ({reason}): the index is made in each run")

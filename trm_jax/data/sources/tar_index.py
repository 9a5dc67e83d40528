"""Where image and caption of each sample lie in the tar shards of a WebDataset.

A shard is a tar archive whose samples are neighbouring members KEY.ENDING, as img2dataset and
webdataset write them. Its headers are read once; what they say is kept in a file beside the shard
and made anew when size or time of the shard change:

    SHARD.tar.txt.npz   (SHARD.tar.json.npz where captions come from the json members)
        table  uint32 [n, 4]  block and bytes of the image, block and bytes of the caption's member
        keys   bytes [n]      KEY, utf-8
        facts  JSON           version, size and mtime_ns of the shard, samples left out, damage

A block is 512 bytes, the unit of tar. Several processes may make it at once: each writes a file of
its own and renames it.
"""

import contextlib
import functools
import hashlib
import json
import os
import random
import tarfile
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from trm_jax.types import UserError

BLOCK = 512
IMAGES = ("jpg", "jpeg", "png", "webp")
_VERSION = 1
_LARGEST = 2**32 - 1
# Reading headers waits for the disk or the network more than it computes.
_THREADS = 16


class ShardIndex(NamedTuple):
    """One shard with n samples.

    size, mtime_ns: of the shard when it was read.
    table: uint32 [n, 4], see above.
    left_out: samples without an image or without a caption's member.
    damage: where the shard is damaged, "" for a whole one; `table` has the samples before it.
    file: where all this, and the keys, are kept.
    """

    path: Path
    size: int
    mtime_ns: int
    table: np.ndarray
    left_out: int
    damage: str
    file: Path


def open_indexes(
    shards: Sequence[Path], *, text: str = "txt", index_dir: str | Path = ""
) -> list[ShardIndex]:
    """The indexes of `shards`, made where they are missing or older than their shard.

    Args:
      shards: tar files.
      text: ending of the members that hold the captions, "txt" or "json".
      index_dir: where the indexes are kept; "" is beside the shards.

    Raises:
      UserError: a shard cannot be read, or an index cannot be written.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda path: _load(path, index_file(path, text, index_dir)), shards))
        missing = [place for place, index in enumerate(found) if index is None]
        # Processes that start together so share the work rather than repeat it in step.
        random.Random(uuid.uuid4().int).shuffle(missing)
        made = pool.map(lambda place: _make(shards[place], text, index_dir), missing)
        shown = tqdm(
            made,
            total=len(missing),
            desc="indexing shards",
            unit="shard",
            disable=None if len(missing) > 1 else True,
        )
        try:
            for place, index in zip(missing, shown, strict=True):
                found[place] = index
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [index for index in found if index is not None]


def index_file(shard: Path, text: str, index_dir: str | Path = "") -> Path:
    """Where the index of a shard is kept."""
    if not index_dir:
        return shard.with_name(f"{shard.name}.{text}.npz")
    # Shards of several folders may share a name.
    folder = hashlib.sha256(str(shard.parent.resolve()).encode()).hexdigest()[:12]
    return Path(index_dir).expanduser() / f"{shard.name}.{folder}.{text}.npz"


def read_keys(index: ShardIndex) -> np.ndarray:
    """Bytes [n]: the keys of the samples. Raises UserError if the index is gone."""
    return _read_keys(index.file, len(index.table), index.mtime_ns)


# Keys are asked for in the order of the shards.
@functools.lru_cache(maxsize=8)
def _read_keys(file: Path, count: int, mtime_ns: int) -> np.ndarray:
    try:
        with np.load(file) as archive:
            facts, keys = json.loads(str(archive["facts"])), archive["keys"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"the index {file} cannot be read ({error}); start again") from error
    if (len(keys), facts["mtime_ns"]) != (count, mtime_ns):
        raise UserError(f"the index {file} was replaced while it was in use; start again")
    return keys


class _Scan(NamedTuple):
    rows: list[tuple[int, int, int, int]]
    keys: list[bytes]
    left_out: int
    damage: str


def _load(path: Path, file: Path) -> ShardIndex | None:
    """The index of a shard as it is kept, None if there is none for this very shard."""
    size, mtime_ns = _stat(path)
    try:
        with np.load(file) as archive:
            facts = json.loads(str(archive["facts"]))
            if (facts["version"], facts["size"], facts["mtime_ns"]) != (_VERSION, size, mtime_ns):
                return None
            table = archive["table"]
    except Exception:  # noqa: BLE001 (not there, or damaged in whatever way: it is made anew)
        return None
    return ShardIndex(path, size, mtime_ns, table, facts["left_out"], facts["damage"], file)


def _make(path: Path, text: str, index_dir: str | Path) -> ShardIndex:
    """Reads the headers of a shard and keeps what they say."""
    file = index_file(path, text, index_dir)
    index = _load(path, file)
    if index is not None:  # another process made it meanwhile
        return index
    size, mtime_ns = _stat(path)
    scan = _scan(path, size, text)
    table = np.asarray(scan.rows, np.uint32).reshape(-1, 4)
    facts = {"version": _VERSION, "size": size, "mtime_ns": mtime_ns}
    facts |= {"left_out": scan.left_out, "damage": scan.damage}
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            keys = np.asarray(scan.keys, np.bytes_)
            np.savez(out, table=table, keys=keys, facts=np.asarray(json.dumps(facts)))
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"the index {file} cannot be written ({error.strerror}); set data.options.index_dir "
            "to a folder for the indexes of the shards"
        ) from error
    return ShardIndex(path, size, mtime_ns, table, scan.left_out, scan.damage, file)


def _stat(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check data.root") from error
    return status.st_size, status.st_mtime_ns


def _scan(path: Path, size: int, text: str) -> _Scan:
    """Reads all headers of a shard."""
    rows, keys, left_out = [], [], 0
    current, sample, damage = "", {}, ""

    def close() -> int:
        """Ends the sample under way; 1 if it lacks its image or its caption."""
        if "image" in sample and "text" in sample:
            rows.append((*sample["image"], *sample["text"]))
            keys.append(current.encode("utf-8", "surrogateescape"))
            return 0
        return 1 if sample else 0

    try:
        with path.open("rb") as file:
            for member in _members(file, size):
                if isinstance(member, str):
                    damage = member
                    break
                key, ending = _split(member.name)
                if key != current:
                    left_out += close()
                    current, sample = key, {}
                kind = "image" if ending in IMAGES else "text" if ending == text else "other"
                if key and member.size <= _LARGEST:
                    sample.setdefault(kind, (member.offset // BLOCK, member.size))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    cut = close()  # what the damage cut is not one that lacks something
    return _Scan(rows, keys, left_out + (0 if damage else cut), damage)


class _Member(NamedTuple):
    """A file of an archive, or with the name "" something else in it.

    offset, size: of its content. end: where the next header begins.
    """

    name: str
    offset: int
    size: int
    end: int


def _members(file: BinaryIO, size: int) -> Iterator[_Member | str]:
    """The files of an archive of `size` bytes that are there in full; then where it breaks."""
    end = 0  # of the last member
    while True:
        file.seek(end)
        block = file.read(BLOCK)
        if len(block) < BLOCK:  # there is no block of zeros, which marks the end
            yield f"cut short at byte {size:,}"
            return
        if block == bytes(BLOCK):
            return
        member = _plain(block, end) or _parsed(file, end)
        if member is None or member.size < 0 or member.end <= end:
            yield (
                f"damaged at byte {end:,}" if end + BLOCK < size else f"cut short at byte {size:,}"
            )
            return
        if member.offset + member.size > size:
            yield f"cut short at byte {size:,}"
            return
        end = member.end
        if member.name:
            yield member


def _plain(block: bytes, start: int) -> _Member | None:
    """What a header of the commonest kind says; None for any other.

    Python's tarfile takes five times as long, and this is done millions of times.
    """
    name = block[:100].rstrip(b"\0")
    if block[156] not in b"0\0" or block[257:262] != b"ustar" or block[345] or len(name) == 100:
        return None
    try:
        size, stated = (int(block[a:b].rstrip(b" \0"), 8) for a, b in ((124, 136), (148, 156)))
    except ValueError:
        return None
    if stated != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    content = start + BLOCK
    end = content + -(-size // BLOCK) * BLOCK
    return _Member(name.decode("utf-8", "surrogateescape"), content, size, end)


def _parsed(file: BinaryIO, start: int) -> _Member | None:
    """What tarfile makes of a header: of long names, links, folders; None for noise."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            found, end = tar.next(), tar.offset
    except OSError:
        raise
    except Exception:  # noqa: BLE001 (headers of noise break the parser in many ways)
        return None
    if found is None:
        return None
    name, size = (found.name, found.size) if found.isreg() else ("", 0)
    return _Member(name, found.offset_data, size, end)


def _split(name: str) -> tuple[str, str]:
    """("a/0001", "jpg") of "./a/0001.jpg": the ending begins at the first dot of the file name."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, ending = last.partition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if stem else ("", "")

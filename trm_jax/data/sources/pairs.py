"""Image-text pairs in ArrayRecord files, made by launch/prepare.py --dataset=pairs.

A folder holds, for each split ("train", "test"):

    SPLIT-00000.array_record, ...  one record a sample
    ids_SPLIT.txt                  one id a line, in the order of the records
    skipped_SPLIT.txt              why each of the other samples was left out, one a line

and `pairs.json`, which says what the files hold and what they were made of. A record is

    4 bytes        n, little-endian
    n bytes        JSON, utf-8: {"id": str, "captions": [str, ...]}
    what remains   the image file, as it was

so that array_record, json and an image decoder read it. Nothing in it is an absolute path.
"""

import functools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from trm_jax.data.sources.base import decode_image, file_fingerprint
from trm_jax.data.sources.lazy import JoinedPairs
from trm_jax.data.sources.records import read_json
from trm_jax.types import BadSampleError, UserError

METADATA = "pairs.json"
LAYOUT = 1  # of the folder; another number is refused
# Open files of this process, over all sources: the usual limit is 1,024.
_OPEN_FILES = 256
_REMEDY = "run launch/prepare.py again"


def pack(name: str, captions: Sequence[str], image: bytes) -> bytes:
    """The record of one sample, as the head of this file has it."""
    head = json.dumps({"id": name, "captions": list(captions)}, ensure_ascii=False).encode()
    return len(head).to_bytes(4, "little") + head + image


def unpack(record: bytes) -> tuple[str, tuple[str, ...], bytes]:
    """(id, captions, image file) of a record; ValueError or KeyError if it is none."""
    start = 4 + int.from_bytes(record[:4], "little")
    head = json.loads(record[4:start])
    return head["id"], tuple(head["captions"]), record[start:]


class PairRecords(JoinedPairs):
    """One split of a folder of pairs; a Source.

    root: the folder. split: "train" or "test".
    Raises UserError for a folder without the split, and for a file that is missing or cut short.
    """

    def __init__(self, root: str | Path, split: str):
        self._root = Path(root)
        self._split = split
        metadata = read_metadata(self._root)
        if split not in metadata["splits"]:
            raise UserError(
                f"{root} has no split '{split}'; it has {', '.join(metadata['splits'])}. Prepare "
                "it too, or evaluate on another dataset with data.test_dataset"
            )
        files = metadata["splits"][split]["files"]
        self._paths = [self._root / file["name"] for file in files]
        # The times tell files that were replaced from those that this process has open.
        self._times = [
            _check(path, file["bytes"]) for path, file in zip(self._paths, files, strict=True)
        ]
        self._starts = np.cumsum([0, *(file["records"] for file in files)])
        self._last = _Last()

    @property
    def captioned(self) -> range:
        """All positions: a sample without a caption is no pair."""
        return range(len(self))

    @property
    def num_bytes(self) -> int:
        """Size of all records."""
        return sum(path.stat().st_size for path in self._paths)

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the files."""
        return file_fingerprint(self._paths)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if the record or its image is broken."""
        name, _, image = self._record(index)
        return {"image": decode_image(image, name)}

    def encoded(self, index: int) -> bytes:
        """The image file. Raises BadSampleError if the record is broken."""
        return self._record(index)[2]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the image; BadSampleError if the record is broken."""
        return self._record(index)[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**state, "_last": _Last()}.items():
            setattr(self, name, value)

    def record(self, index: int) -> bytes:
        """One record as it lies in its file. Raises BadSampleError if it is damaged."""
        file, row = self._place(index)
        try:
            return _reader(self._paths[file], self._times[file]).read([row])[0]
        except Exception as error:  # array_record raises what its C++ library says
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadSampleError(f"{self._paths[file]}, record {row}: {reason}") from error

    def _record(self, index: int) -> tuple[str, tuple[str, ...], bytes]:
        # Caption and image of a sample are asked for one after the other.
        if self._last.index != index:
            try:
                self._last.parts = unpack(self.record(index))
            except (ValueError, KeyError, TypeError) as error:
                raise BadSampleError(f"{self._root}: sample {index} is no pair") from error
            self._last.index = index
        return self._last.parts

    def _id(self, index: int) -> str:
        text, ends = _lines(self._root / f"ids_{self._split}.txt", len(self), self._times[0])
        start = ends[index - 1] + 1 if index else 0
        return text[start : ends[index]].tobytes().decode()


class _Last(threading.local):
    """The record that a thread read last."""

    index = -1
    parts: tuple[str, tuple[str, ...], bytes] = ("", (), b"")


def read_metadata(folder: Path) -> dict[str, Any]:
    """What pairs.json says. Raises UserError where it is missing, damaged or of another layout."""
    if not (folder / METADATA).is_file():
        raise UserError(
            f"{folder} has no {METADATA}: it is no folder that launch/prepare.py --dataset=pairs "
            "made; check data.root"
        )
    metadata = read_json(folder / METADATA, _REMEDY)
    if metadata.get("layout") != LAYOUT or "splits" not in metadata:
        raise UserError(f"{folder / METADATA} is of another version of this package; {_REMEDY}")
    return metadata


def _check(path: Path, size: int) -> int:
    """When the file was written, in ns; UserError if it is not whole."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {_REMEDY}")
    status = path.stat()
    if status.st_size != size:
        raise UserError(
            f"{path} has {status.st_size:,} of {size:,} bytes; copy it again or {_REMEDY}"
        )
    return status.st_mtime_ns


@functools.lru_cache(maxsize=_OPEN_FILES)
def _reader(path: Path, mtime_ns: int) -> Any:
    """An open file; one that leaves the cache is closed when nobody reads from it any more."""
    del mtime_ns
    # For random access: no reading ahead, and a buffer for one record rather than for many.
    return ArrayRecordReader(
        str(path), "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=1 << 16
    )


@functools.lru_cache(maxsize=4)
def _lines(path: Path, count: int, mtime_ns: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of a text file, mapped; ends of its `count` lines)."""
    del mtime_ns
    try:
        text = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    ends = np.flatnonzero(text == ord("\n"))
    if len(ends) != count:
        raise UserError(f"{path} has {len(ends):,} ids for {count:,} records; {_REMEDY}")
    return text, ends

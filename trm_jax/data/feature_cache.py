"""Dense features of a frozen image tower, computed once and read back in place of the images.

A cache is a folder of two files: `features.array_record`, one record an example in the order of the
source, and `meta.json`, which says what the records are and what they were made of. It holds what
the tower gives in its compute dtype, so training from it sees the same numbers, but for the
rounding of a tower that was compiled for other batches.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import ml_dtypes  # noqa: F401 (names bfloat16 for numpy)
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from trm_jax.data.sources.base import Source
from trm_jax.types import BadSampleError, UserError

_RECORDS, _META = "features.array_record", "meta.json"
_VERSION = 1


def cache_key(source: Source, **settings: Any) -> str:
    """16 hex digits that change with the images' ids and with anything in `settings`."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in source.ids:
        digest.update(f"{name}\n".encode())
    return digest.hexdigest()[:16]


def data_hash(source: Source) -> str:
    """SHA-256 of the source's `fingerprint()` (its files' names and sizes), or of its ids alone."""
    digest = hashlib.sha256()
    fingerprint = getattr(source, "fingerprint", None)
    for name in source.ids if fingerprint is None else [fingerprint()]:
        digest.update(f"{name}\n".encode())
    return digest.hexdigest()


class CachedFeatures:
    """`source` with read() answered from a cache folder: {"dense", "global_embedding"}.

    Args:
      source: gives ids, labels and captions; its images are not read any more.
      folder: a finished cache.
      made_of: the hashes that the cache must have been made of.

    Raises:
      UserError: the cache is of another encoder or of other data, or it is damaged.
    """

    def __init__(self, source: Source, folder: Path, made_of: Mapping[str, str]):
        self.source = source
        self.ids, self.class_names, self.labels = source.ids, source.class_names, source.labels
        for name in ("file_rows", "num_file_rows"):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        self._folder = folder
        self._meta = _read_meta(folder)
        self._bad = frozenset(self._meta["bad"])
        self._records: grain.sources.ArrayRecordDataSource | None = None
        stale = sorted(key for key in made_of if made_of[key] != self._meta["made_of"].get(key))
        if stale:
            raise UserError(
                f"the cached features in {folder} are stale: the {' and the '.join(stale)} changed "
                "since they were made; delete that folder, or set data.cache_dir to another"
            )
        if self._meta["count"] != len(source):
            raise UserError(f"the cached features in {folder} are damaged; delete that folder")

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}

    def read(self, index: int) -> dict[str, np.ndarray]:
        """The cached features of one example; BadSampleError where its image was unreadable."""
        if index in self._bad:
            raise BadSampleError(f"{self.ids[index]}: unreadable when the cache was made")
        try:
            if self._records is None:
                self._records = grain.sources.ArrayRecordDataSource(str(self._folder / _RECORDS))
            record = self._records[index]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise UserError(
                f"the cached features in {self._folder} are damaged ({str(error).splitlines()[0]});"
                " delete that folder"
            ) from None
        features, start = {}, 0
        for name, (shape, dtype) in self._meta["arrays"].items():
            count = int(np.prod(shape))
            array = np.frombuffer(record, np.dtype(dtype), count, start)
            features[name] = array.reshape(shape)
            start += array.nbytes
        return features

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one example."""
        return self.source.captions(index)


def write_cache(
    folder: Path,
    batches: Iterable[Any],
    encode: Callable[[Any], Mapping[str, Any]],
    *,
    size: int,
    made_of: Mapping[str, str],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Encodes every example once and moves the finished folder into place, so that a killed
    run leaves no half-written cache. A second run that wants the same cache waits for the first.

    Args:
      folder: where the cache will lie.
      batches: evaluation batches (`index`, `valid` and the inputs), in the order of the source.
      encode: batch -> {"dense" [n, hw, d], "global_embedding" [n, d]}.
      size: N, the number of examples.
      made_of: names of what the features depend on, each with its hash.
      tick: called before each batch and while waiting; what it raises ends the work.

    Raises:
      UserError: the place cannot be written, or the disk is too small.
    """
    with _workspace(folder, tick) as workspace:
        if workspace is None:
            return
        meta = _write_records(workspace, batches, encode, size, tick)
        meta |= {"version": _VERSION, "count": size, "made_of": dict(made_of)}
        (workspace / _META).write_text(json.dumps(meta, indent=1) + "\n")
        os.rename(workspace, folder)


@contextlib.contextmanager
def _workspace(folder: Path, tick: Callable[[], None]) -> Iterator[Path | None]:
    """An empty folder beside `folder` for this process alone; None once another made the cache."""
    workspace = folder.with_name(f".{folder.name}.incomplete")
    while True:
        try:
            workspace.mkdir(parents=True, exist_ok=True)
            lock = os.open(workspace, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: {folder.parent} cannot be written ({error.strerror}); choose "
                "another"
            ) from error
        try:
            # The system gives the lock back when a process dies, however that happens.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if workspace.is_dir() and os.path.samestat(os.fstat(lock), os.stat(workspace)):
                break
            os.close(lock)  # of a folder that its owner has moved or removed meanwhile
        except BlockingIOError:
            os.close(lock)
            tick()
            time.sleep(0.2)
        if folder.is_dir():
            yield None
            return
    try:
        if folder.is_dir():
            yield None
            return
        for path in workspace.iterdir():  # what a killed run left
            path.unlink()
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
        os.close(lock)


def _write_records(folder: Path, batches, encode, size: int, tick) -> dict[str, Any]:
    """Writes the records; returns the layout and the rows that could not be read."""
    arrays: dict[str, tuple[tuple[int, ...], str]] = {}
    bad: list[int] = []
    # Floats hardly shrink, and unpacking them takes four times as long as reading them.
    writer = ArrayRecordWriter(str(folder / _RECORDS), "group_size:1,uncompressed")
    try:
        for batch in batches:
            tick()
            features = {name: np.asarray(array) for name, array in encode(batch).items()}
            if not arrays:
                arrays = {k: (v.shape[1:], str(v.dtype)) for k, v in features.items()}
                _check_space(folder, size * sum(v[0].nbytes for v in features.values()))
            for row, index in enumerate(batch["index"]):
                if index < 0:
                    continue  # padding
                if not batch["valid"][row]:
                    bad.append(int(index))
                writer.write(b"".join(array[row].tobytes() for array in features.values()))
    finally:
        writer.close()
    return {"arrays": arrays, "bad": bad}


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the cached features need {needed / 1e9:.1f} GB, {folder.parent} has "
            f"{free / 1e9:.1f} GB; set data.cache_dir to another disk or data.cache_features=False"
        )


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / _META).read_text())
    except (OSError, ValueError):
        meta = {}
    if meta.get("version") != _VERSION:
        raise UserError(
            f"{folder} holds no cached features that this version can read; delete that folder"
        )
    return meta

"""Writing images into ArrayRecord files by a TFDS builder, and reading them back to check them.

Images are read and decoded by a pool of threads; what is written is the bytes of their files.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trm_jax.data.sources.base import decode_image
from trm_jax.data.sources.coco import CocoImages
from trm_jax.data.sources.prepared import LAYOUT
from trm_jax.data.sources.records import Records
from trm_jax.data.sources.voc import VocImages
from trm_jax.types import BadSampleError

# Bytes of images in one file. A file's images are in memory at once while it is written.
_SHARD_BYTES = 256 << 20
# Images read and decoded ahead of the writer, for each thread.
_AHEAD = 4

# Called before each image with ("reading" or "checking", split, images done, images in all).
Report = Callable[[str, str, int, int], None]


@dataclasses.dataclass
class Split:
    """One split on its way.

    kept, digests: the row and the SHA-256 of each image that was written.
    bad: why each of the others was not.
    """

    name: str
    source: CocoImages | VocImages
    kept: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    bad: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.paths = [self.source.image_path(row) for row in range(len(self.source))]
        self.sizes = [_size(path) for path in self.paths]

    def shards(self) -> list[range]:
        """Neighbouring rows that share a file."""
        starts = np.cumsum([0, *self.sizes[:-1]]) // _SHARD_BYTES
        edges = [0, *(np.flatnonzero(np.diff(starts)) + 1).tolist(), len(self.paths)]
        return [range(first, last) for first, last in itertools.pairwise(edges)]

    def content_sha256(self) -> str:
        """What reading the records back must give."""
        return content_sha256(
            (self.source.ids[row], self.source.labels[row], digest)
            for row, digest in zip(self.kept, self.digests, strict=True)
        )


def build(workspace: Path, splits: Mapping[str, Split], report: Report) -> Path:
    """Writes the records; the folder that holds them."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examples = {
            name: [
                functools.partial(_examples, split, rows, pool, report) for rows in split.shards()
            ]
            for name, split in splits.items()
        }
        num_classes = len(next(iter(splits.values())).source.class_names)
        builder = _builder_class()(
            examples, num_classes, data_dir=workspace, file_format="array_record"
        )
        try:
            # TFDS prints where it writes, which is not where the dataset will be.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return Path(builder.data_dir)


@functools.cache
def _builder_class() -> Any:
    """The TFDS builder; made late, since importing TFDS takes its time."""
    import tensorflow_datasets as tfds

    class PreparedImages(tfds.core.ShardBasedBuilder, skip_registration=True):
        """Writes examples in the order and the files that they come in."""

        # Its module is no package of datasets in which TFDS should look for files.
        code_path = None
        VERSION = tfds.core.Version(f"{LAYOUT}.0.0")

        def __init__(self, examples: Mapping[str, Sequence[Callable]], num_classes: int, **place):
            self._examples = examples
            self._num_classes = num_classes
            super().__init__(**place)

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "image/id": tfds.features.Text(),
                "image/filename": tfds.features.Text(),
                "labels": tfds.features.Tensor(shape=(self._num_classes,), dtype=np.int8),
                "captions": tfds.features.Sequence(tfds.features.Text()),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Images with labels: 1, -1, or 0 for difficult instances only.",
                features=tfds.features.FeaturesDict(features),
            )

        def _shard_iterators_per_split(self, dl_manager):
            del dl_manager
            return self._examples

    return PreparedImages


def _examples(
    split: Split, rows: range, pool: Executor, report: Report
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads, decodes and hashes the images of `rows`; yields (row, example) of the sound ones."""
    for row, (data, digest, reason) in zip(
        rows, _ahead(pool, _load, [split.paths[row] for row in rows]), strict=True
    ):
        report("reading", split.name, row, len(split.paths))
        if reason:
            split.bad.append(reason)
            continue
        split.kept.append(row)
        split.digests.append(digest)
        yield (
            row,
            {
                "image": data,
                "image/id": split.source.ids[row],
                "image/filename": split.paths[row].name,
                "labels": split.source.labels[row],
                "captions": list(split.source.captions(row)),
            },
        )


def _load(path: Path) -> tuple[bytes, bytes, str]:
    """(the bytes of an image, their SHA-256, why they are of no use or "")."""
    try:
        data = path.read_bytes()
        decode_image(data, path.name)
    except (BadSampleError, OSError) as error:
        return b"", b"", str(error)
    return data, hashlib.sha256(data).digest(), ""


def _ahead(pool: Executor, function: Callable, items: Sequence[Any]) -> Iterator[Any]:
    """map() over threads that runs at most a few items ahead of its reader."""
    waiting: deque = deque()
    limit = _AHEAD * (os.cpu_count() or 1)
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def read_back(
    records: Records, split: str, report: Report
) -> Iterator[tuple[str, np.ndarray, bytes]]:
    """Id, labels and SHA-256 of the image of each record: what `content_sha256` takes."""
    for row in range(len(records)):
        report("checking", split, row, len(records))
        example = records[row]
        yield (
            example["image/id"].decode(),
            example["labels"],
            hashlib.sha256(example["image"]).digest(),
        )


def content_sha256(examples: Iterable[tuple[str, np.ndarray, bytes]]) -> str:
    """SHA-256 over id, a zero byte, int8 labels and SHA-256 of the image, image by image."""
    digest = hashlib.sha256()
    for name, labels, image in examples:
        digest.update(name.encode() + b"\0" + labels.astype(np.int8).tobytes() + image)
    return digest.hexdigest()


def _size(path: Path) -> int:
    """In bytes; -1 if there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1

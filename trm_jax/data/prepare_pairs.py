"""From any captioned source to ArrayRecord files of image-text pairs, each image decoded once.

Image files are copied as they are. A sample whose image or caption cannot be used is left out and
listed. The folder is built beside its place and moved there when it is whole and was read back, as
`prepare.py` does it; `sources/pairs.py` says what is in it and reads it.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import cv2
from array_record.python.array_record_module import ArrayRecordWriter

from trm_jax.data.feature_cache import data_hash
from trm_jax.data.prepare import check_empty, check_same, whole_folder
from trm_jax.data.prepare_records import Report
from trm_jax.data.sources import open_source
from trm_jax.data.sources.base import Source, decode_image
from trm_jax.data.sources.lazy import captioned
from trm_jax.data.sources.pairs import LAYOUT, METADATA, PairRecords, pack, read_metadata
from trm_jax.types import BadSampleError, UserError

DATASET = "pairs"
# Bytes of records in one file: large, since a run keeps files open.
_FILE_BYTES = 1 << 30
# Samples that the threads read and decode at a time.
_CHUNK = 256
# A record a group, so that reading one reads no other. JPEG and PNG are compressed already.
_WRITER = "group_size:1,uncompressed"


def prepare_pairs(
    dataset: str,
    source: str | Path,
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    splits: Sequence[str] = ("train",),
    report: Report = lambda phase, split, done, total: None,
) -> tuple[dict[str, Any], bool]:
    """Makes the folder `out` of the images with captions of a dataset.

    Args:
      dataset: a dataset of `open_source` whose examples are images, such as "webdataset".
      source: its place, as data.root.
      out: a folder that does not exist, is empty, or holds what this call would make.
      options: its options, as data.options.
      splits: some of "train" and "test".
      report: told about each sample; what it raises ends the preparation.

    Returns:
      (the content of pairs.json, whether `out` was there already).

    Raises:
      UserError: there is no usable pair, or `out` holds something else.
    """
    out = Path(out).resolve()
    options = dict(options or {})
    opened = {name: open_source(dataset, name, root=str(source), **options) for name in splits}
    made_of = {
        "dataset": dataset,
        "options": options,
        "data": {name: _data_hash(source) for name, source in opened.items()},
    }
    text = json.dumps(made_of, sort_keys=True, default=list)
    source_sha256 = hashlib.sha256(text.encode()).hexdigest()
    if (out / METADATA).is_file():
        metadata = read_metadata(out)
        check_same(out, metadata, source_sha256)
        for name in opened:
            PairRecords(out, name)  # names a file that is missing or cut short
        return metadata, True
    check_empty(out)
    with whole_folder(out, sum(map(_num_bytes, opened.values()))) as workspace:
        folder = workspace / "pairs"
        folder.mkdir()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            facts = {
                name: _Writer(folder, name, source).write(pool, report)
                for name, source in opened.items()
            }
        metadata = {
            "layout": LAYOUT,
            "dataset": DATASET,
            "made_of": made_of,
            "splits": facts,
            "source_sha256": source_sha256,
        }
        content = json.dumps(metadata, indent=1, default=list) + "\n"
        (folder / METADATA).write_text(content, encoding="utf-8")
        for name in opened:
            _read_back(PairRecords(folder, name), name, facts[name]["sha256"], report)
        os.replace(folder, out)
    return json.loads(content), False


@dataclasses.dataclass
class _Writer:
    """Writes one split."""

    folder: Path
    split: str
    source: Source
    files: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    captions: int = 0
    skipped: int = 0

    def write(self, pool: Executor, report: Report) -> dict[str, Any]:
        """Writes all samples; what pairs.json says of the split."""
        digest, writer = hashlib.sha256(), None
        with (
            (self.folder / f"ids_{self.split}.txt").open("wb") as ids,
            (self.folder / f"skipped_{self.split}.txt").open("wb") as reasons,
        ):
            try:
                for record in self._records(pool, report, ids, reasons):
                    if writer is None or self.files[-1]["bytes"] > _FILE_BYTES:
                        self._close(writer)
                        writer = self._next_file()
                    writer.write(record)
                    self.files[-1]["records"] += 1
                    self.files[-1]["bytes"] += len(record)
                    digest.update(hashlib.sha256(record).digest())
            finally:
                self._close(writer)
        images = sum(file["records"] for file in self.files)
        if not images:
            raise UserError(f"not one {self.split} sample has an image and a caption to be used")
        for file in self.files:
            file["bytes"] = (self.folder / file["name"]).stat().st_size
        return {
            "images": images,
            "captions": self.captions,
            "skipped": self.skipped,
            "sha256": digest.hexdigest(),
            "files": self.files,
        }

    def _records(
        self, pool: Executor, report: Report, ids: BinaryIO, reasons: BinaryIO
    ) -> Iterator[bytes]:
        """Reads and decodes the samples; the records of the sound ones, in order."""
        positions = iter(captioned(self.source))
        total, done = len(captioned(self.source)), 0
        while chunk := [int(index) for index in itertools.islice(positions, _CHUNK)]:
            for name, captions, image, reason in pool.map(self._load, chunk):
                report("reading", self.split, done, total)
                done += 1
                if reason:
                    self.skipped += 1
                    reasons.write(_line(f"{name}\t{reason}"))
                    continue
                self.captions += len(captions)
                ids.write(_line(name))
                yield pack(name, captions, image)

    def _load(self, index: int) -> tuple[str, tuple[str, ...], bytes, str]:
        """(id, captions, image file, why they are of no use or "")."""
        name = str(self.source.ids[index])
        try:
            captions = tuple(text for text in self.source.captions(index) if text.strip())
            if not captions:
                raise BadSampleError("the caption is empty")
            image = _image_file(self.source, index)
        except (BadSampleError, OSError) as error:
            return name, (), b"", str(error)
        return name, captions, image, ""

    def _next_file(self) -> ArrayRecordWriter:
        name = f"{self.split}-{len(self.files):05d}.array_record"
        self.files.append({"name": name, "records": 0, "bytes": 0})
        return ArrayRecordWriter(str(self.folder / name), _WRITER)

    def _close(self, writer: ArrayRecordWriter | None) -> None:
        if writer is not None:
            writer.close()


def _image_file(source: Source, index: int) -> bytes:
    """The image file of a sample, once it was decoded; a PNG of an image that has no file."""
    if hasattr(source, "encoded"):
        data = source.encoded(index)  # pyright: ignore[reportAttributeAccessIssue]
    elif hasattr(source, "image_path"):
        data = source.image_path(index).read_bytes()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        inputs = source.read(index)
        if "image" not in inputs:
            raise UserError("the source has precomputed features; pairs need its images")
        return cv2.imencode(".png", cv2.cvtColor(inputs["image"], cv2.COLOR_RGB2BGR))[1].tobytes()
    decode_image(data, "image")
    return data


def _num_bytes(source: Source) -> int:
    """What the records will take; 0 where that is not known before."""
    return getattr(source, "num_bytes", 0)


def _data_hash(source: Source) -> str:
    """Changes with images and captions, without reading those that lie on a disk."""
    digest = hashlib.sha256(data_hash(source).encode())
    if not hasattr(source, "captioned"):
        for index in range(len(source)):
            digest.update(json.dumps(source.captions(index)).encode())
    return digest.hexdigest()


def _read_back(records: PairRecords, split: str, expected: str, report: Report) -> None:
    """Raises UserError unless the records are those that were written."""
    digest = hashlib.sha256()
    for index in range(len(records)):
        report("checking", split, index, len(records))
        digest.update(hashlib.sha256(records.record(index)).digest())
    if digest.hexdigest() != expected:
        raise UserError(
            f"the {split} records differ from what was written: the disk or the memory is faulty; "
            "run the command again"
        )


def _line(text: str) -> bytes:
    return " ".join(text.splitlines()).encode() + b"\n"

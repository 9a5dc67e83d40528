"""Region features of a bottom-up-attention detector: TSV files, or one npz file per image.

Source: Anderson et al., "Bottom-up and top-down attention for image captioning and visual question
answering", CVPR 2018. A line of a TSV holds an image in columns that tabs part:

    image_id image_w image_h num_boxes boxes features                 (the authors' files)
    image_id image_h image_w and four columns on objects and attributes, then the same three
                                                                      (LXMERT's files)

boxes and features are base64 of float32 [num_boxes, 4] and [num_boxes, D]. An npz file IMAGE_ID.npz
holds x, features or feat [num_bbox, D], bbox [num_bbox, 4], num_bbox, image_w and image_h, as
bottom-up-attention.pytorch writes it. Boxes are (x1, y1, x2, y2) in pixels.

Where the lines of a TSV begin is kept in a file beside it and made anew when size or time of the
TSV change:

    FILE.tsv.npz
        table  int64 [n, 2]  first byte and bytes of each line
        keys   bytes [n]     image_id, utf-8
        facts  JSON          version, size and mtime_ns of the TSV
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from trm_jax.data.sources.base import file_fingerprint
from trm_jax.types import BadSampleError, UserError

_VERSION = 1
_TSV = re.compile(r"\.tsv(\.\d+)?$")
# Number of columns -> those of width, height, number of boxes, boxes and features.
_COLUMNS = {6: (1, 2, 3, 4, 5), 10: (2, 1, 7, 8, 9)}
_FEATURES = ("x", "features", "feat")


class _Image(NamedTuple):
    """What a file says of one image; `boxes` may be None in an npz file."""

    features: np.ndarray  # [n, D]
    boxes: np.ndarray | None  # [n, 4]
    width: int
    height: int


class ButdRegions:
    """The regions of the images of TSV files or of a folder; a Source without captions.

    path: a TSV; a folder of TSV files (NAME.tsv, NAME.tsv.0); or a folder of npz files.
    regions: r of each image. More are cut to the first ones, the detector's surest; an image with
      fewer is a BadSampleError when it is read.
    index_dir: folder for the indexes of TSV files, by default beside them.
    width: D, of the first image.
    ids: image_id, or the npz file's name without its ending. Of an image that is there twice (the
      authors' files have such) the first is taken.

    Raises UserError if there is no such file or folder, for a line that is no image (by its
    number), if an index cannot be written, and if not one image can be used.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, path: str | Path, *, regions: int = 36, index_dir: str | Path = ""):
        if regions < 1:
            raise UserError(f"regions is {regions}; give 1 or more")
        self.num_regions = regions
        path = Path(path).expanduser()
        self._files = _files(path)
        self._table = np.zeros((0, 3), np.int64)  # file, first byte, bytes: of TSV files alone
        if self._files[0].suffix == ".npz":
            keys = [file.name.removesuffix(".npz") for file in self._files]
        else:
            indexes = [_open_index(file, index_dir) for file in self._files]
            keys = [key.decode("utf-8", "replace") for _, found in indexes for key in found]
            tables = [np.insert(table, 0, number, 1) for number, (table, _) in enumerate(indexes)]
            self._table = np.concatenate(tables)
        first: dict[str, int] = {}
        for row, key in enumerate(keys):
            first.setdefault(key, row)
        self.ids: Sequence[str] = tuple(first)
        self._rows = tuple(first.values())
        self._positions = {key: position for position, key in enumerate(self.ids)}
        self.labels = np.zeros((len(self.ids), 0), np.int8)
        self.width = self._find_width(path)

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, names: Sequence[str]) -> int | None:
        """The position of the image that has one of `names` as its id, None if there is none."""
        return next((self._positions[name] for name in names if name in self._positions), None)

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the files."""
        return file_fingerprint(self._files)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"features": [r, D]} in the precision of the file.

        Raises BadSampleError if the file or line is missing or damaged, has fewer than r regions or
        another width, or holds a NaN or an infinity.
        """
        features = self._image(index).features[: self.num_regions]
        if features.shape[1] != self.width:
            raise BadSampleError(
                f"{self._name(index)}: features have {features.shape[1]} numbers, not {self.width} "
                "as in the first image"
            )
        if not np.isfinite(features).all():
            raise BadSampleError(f"{self._name(index)}: features hold a NaN or an infinity")
        return {"features": features}

    def boxes(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """(float32 [r, 4] of x1, y1, x2, y2 in pixels, (width, height) of the image).

        Raises BadSampleError as `read` does, and if the file has no boxes.
        """
        image = self._image(index)
        if image.boxes is None:
            raise BadSampleError(f"{self._name(index)} has no boxes (bbox, image_w, image_h)")
        boxes = image.boxes[: self.num_regions].astype(np.float32)
        return boxes, (image.width, image.height)

    def captions(self, index: int) -> tuple[str, ...]:
        """(): these files have no captions."""
        del index
        return ()

    def _find_width(self, path: Path) -> int:
        """D of the first image that can be used, among the first hundred."""
        problem = f"{path} has no image"
        for index in range(min(100, len(self))):
            try:
                return self._image(index).features.shape[1]
            except BadSampleError as error:
                problem = str(error) if index == 0 else problem
        raise UserError(f"{problem}; not one of the first images can be used")

    def _image(self, index: int) -> _Image:
        row = self._rows[index]
        try:
            if len(self._table):
                file, start, size = self._table[row].tolist()
                image = _parse(_line(self._files[file], start, size))
            else:
                image = _read_npz(self._files[row])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise BadSampleError(f"{self._name(index)}: {error}") from error
        if len(image.features) < self.num_regions:
            raise BadSampleError(
                f"{self._name(index)}: {len(image.features)} regions, {self.num_regions} are needed"
            )
        return image

    def _name(self, index: int) -> str:
        """For messages."""
        row = self._rows[index]
        if len(self._table):
            return f"{self._files[self._table[row, 0]]}, image {self.ids[index]}"
        return str(self._files[row])


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a TSV of region features, or their folder")
    names = sorted(os.listdir(path))
    found = [name for name in names if _TSV.search(name)] or [n for n in names if n.endswith("npz")]
    if not found:
        raise UserError(f"{path} has no region features: neither *.tsv nor *.npz")
    return [path / name for name in found]


def _read_npz(path: Path) -> _Image:
    with path.open("rb") as file, np.load(file) as archive:
        key = next((key for key in _FEATURES if key in archive.files), None)
        if key is None:
            raise ValueError(f"it has none of the arrays {', '.join(_FEATURES)}")
        features = archive[key]
        if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
            raise ValueError(f"{key} is {features.dtype} {list(features.shape)}, not floats [n, D]")
        count = int(archive["num_bbox"]) if "num_bbox" in archive.files else len(features)
        # Some programs write the transpose.
        if len(features) < count == features.shape[1]:
            features = features.T
        if not all(name in archive.files for name in ("bbox", "image_w", "image_h")):
            return _Image(features[:count], None, 0, 0)
        boxes, width, height = (archive[name] for name in ("bbox", "image_w", "image_h"))
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) < count:
        raise ValueError(f"bbox is {list(boxes.shape)}, not [{count}, 4]")
    return _Image(features[:count], boxes[:count], int(width), int(height))


def _line(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _parse(line: bytes) -> _Image:
    """One line of a TSV; ValueError if it is damaged."""
    cells = line.split(b"\t")
    if len(cells) not in _COLUMNS:
        raise ValueError("the file was changed since it was indexed")
    width, height, count, boxes, features = (cells[column] for column in _COLUMNS[len(cells)])
    number = int(count)
    return _Image(
        features=_floats(features, number, "features"),
        boxes=_floats(boxes, number, "boxes", 4),
        width=int(float(width)),
        height=int(float(height)),
    )


def _floats(cell: bytes, rows: int, name: str, columns: int | None = None) -> np.ndarray:
    """Float32 [rows, columns] from base64."""
    data = base64.b64decode(cell.strip(), validate=True)
    if rows < 1 or not data or len(data) % (4 * rows):
        raise ValueError(f"{name} are {len(data):,} bytes, not float32 of {rows} regions")
    array = np.frombuffer(data, "<f4").reshape(rows, -1)
    if columns not in (None, array.shape[1]):
        raise ValueError(f"{name} have {array.shape[1]} numbers each, not {columns}")
    return array


def _open_index(path: Path, index_dir: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(table, keys) of a TSV, read from its index or made and kept."""
    file = _index_file(path, index_dir)
    try:
        status = path.stat()
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check data.options") from error
    facts = {"version": _VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    try:
        with file.open("rb") as data, np.load(data) as archive:
            if json.loads(str(archive["facts"])) == facts:
                return archive["table"], archive["keys"]
    except Exception:  # noqa: BLE001 (not there, or damaged in whatever way: it is made anew)
        pass
    rows, keys = _scan(path, status.st_size)
    table, names = np.asarray(rows, np.int64).reshape(-1, 2), np.asarray(keys, np.bytes_)
    _write(file, table=table, keys=names, facts=np.asarray(json.dumps(facts)))
    return table, names


def _index_file(path: Path, index_dir: str | Path) -> Path:
    if not index_dir:
        return path.with_name(f"{path.name}.npz")
    # Files of several folders may share a name.
    folder = hashlib.sha256(str(path.parent.resolve()).encode()).hexdigest()[:12]
    return Path(index_dir).expanduser() / f"{path.name}.{folder}.npz"


def _scan(path: Path, size: int) -> tuple[list[tuple[int, int]], list[bytes]]:
    """Where each line of a TSV begins, its bytes, and its image's id."""
    rows, keys, start = [], [], 0
    shown = tqdm(total=size, desc=f"indexing {path.name}", unit="B", unit_scale=True, disable=None)
    with path.open("rb") as file, shown:
        for number, line in enumerate(file, start=1):
            columns = line.count(b"\t") + 1
            if columns not in _COLUMNS and line.strip():
                raise UserError(
                    f"{path}, line {number}: {columns} columns; lines of region features have 6 or "
                    "10" + ("" if line.endswith(b"\n") else "; the file is cut short")
                )
            if columns in _COLUMNS:
                rows.append((start, len(line)))
                keys.append(line[: line.index(b"\t")])
            start += len(line)
            shown.update(len(line))
    return rows, keys


def _write(file: Path, **arrays: Any) -> None:
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            np.savez(out, **arrays)
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"the index {file} cannot be written ({error.strerror}); set data.options.index_dir to "
            "a folder for the indexes of region features"
        ) from error

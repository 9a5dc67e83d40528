"""Word-labelled regions: what a source of them is, and the one that reads an npz file.

Source: MASK, Sec. 3.1: knowledge is words with the regions that carry them; one sample is one
(region, word) pair. The arrays of a file, N regions in a row:

    features   float [N, D]
    words      str [N], or [N, m] for up to m words each; "" is no word
    image_ids  int or str [N]   optional: the image of each region; "" or a negative id is none
    boxes      float [N, 4]     optional: x, y, width, height in pixels, as COCO has them

Regions of one image are seen together; a region without an image is alone.
"""

import contextlib
import os
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int32

from trm_jax.data.sources.base import Source, file_fingerprint
from trm_jax.data.sources.region_words import clean_word, lay_out
from trm_jax.types import BadSampleError, UserError

# Rows whose finiteness is checked at a time: the array of truth values stays small.
_CHECKED_ROWS = 4096
_NAMES = ("features", "words", "image_ids", "boxes")


class RegionGroup(NamedTuple):
    """The labelled regions of one image, each with one word or more."""

    features: Float[np.ndarray, "J D"]
    boxes: Float[np.ndarray, "J 4"] | None  # x1, y1, x2, y2 in pixels of the image
    samples: Int32[np.ndarray, "S 2"]  # (region, word), ascending, each pair once


@runtime_checkable
class RegionSource(Protocol):
    """Random access to the word-labelled regions of images; `width` is D of all features."""

    width: int

    @property
    def ids(self) -> Sequence[str]:
        """Stable image ids, one per group."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary in the order of the alphabet; samples hold positions in it."""
        ...

    @property
    def word_counts(self) -> np.ndarray:
        """int64 [K]: the regions that carry each word, 1 or more."""
        ...

    def __len__(self) -> int:
        """The number of images that have a labelled region."""
        ...

    def samples(self, index: int) -> np.ndarray:
        """`group(index).samples` without reading features."""
        ...

    def group(self, index: int) -> RegionGroup:
        """The regions of one image; raises BadSampleError if they cannot be used."""
        ...

    def report(self) -> dict[str, int]:
        """Counts of what is there and of what was left out, for run.json."""
        ...


class LabelledRegions:
    """The word-labelled regions of an npz file (see the head of this file); a `RegionSource`.

    min_count: words of fewer regions are dropped, with the regions that have no other.
    box_format: of the file's boxes: "xywh", or "xyxy" for x1, y1, x2, y2.
    ids: image ids in the order of their first regions; "region-ROW" for a region without image.

    Raises UserError for a file that cannot be read, lacks features or words, or has arrays that do
    not fit each other, a feature that is not finite or a box without extent (with its row).
    """

    def __init__(self, path: str | Path, *, min_count: int = 1, box_format: str = "xywh"):
        self._path = Path(path).expanduser()
        arrays = _read(self._path, ("features", "words"))
        self._features = _Rows(self._path, arrays["features"])
        self.width = arrays["features"].shape[1]
        names, numbers = _number(arrays["words"])
        if not names:
            raise UserError(f"{self._path}: not one of its words can be used; all are empty")
        row, column = np.nonzero(numbers >= 0)
        images, image_of = _images(arrays)
        self._min_count = min_count
        self._without_word = int((numbers < 0).all(axis=1).sum())
        self._layout = lay_out(
            image_of[row],
            row,
            numbers[row, column],
            names,
            min_count=min_count,
            place=self._path,
        )
        self._boxes = _corners(self._path, arrays, box_format)
        self.ids: Sequence[str] = tuple(images[k] for k in self._layout.groups)
        self.words = self._layout.words
        self.word_counts = self._layout.counts

    def __len__(self) -> int:
        return len(self.ids)

    def samples(self, index: int) -> np.ndarray:
        """int32 [S, 2] of (region, word)."""
        return self._layout.group_samples(index)

    def group(self, index: int) -> RegionGroup:
        """The regions of one image, in the precision and order of the file."""
        rows = self._layout.group_regions(index)
        boxes = None if self._boxes is None else self._boxes[rows]
        return RegionGroup(self._features[rows], boxes, self.samples(index))

    def fingerprint(self) -> str:
        """Changes with the name and the size of the file."""
        return file_fingerprint([self._path])

    def report(self) -> dict[str, int]:
        """Counts; regions_without_word had none before rare words were dropped."""
        return self._layout.report(self._min_count) | {"regions_without_word": self._without_word}


class CaptionedRegions:
    """All regions of a file, with or without a word, beside the captions of their images; a Source.

    path, box_format: an npz as above, words not needed.
    captions: a Source; its ids are the image_ids of the file.
    num_without_regions: images of `captions` that the file does not know; they are left out.

    Raises UserError as `LabelledRegions` does, for a file without image_ids, and if it has not one
    of the images.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, path: str | Path, captions: Source, *, box_format: str = "xywh"):
        path = Path(path).expanduser()
        arrays = _read(path, ("features", "image_ids"))
        self._features = _Rows(path, arrays["features"])
        self._boxes = _corners(path, arrays, box_format)
        images, image_of = _images(arrays)
        order = np.argsort(image_of, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(image_of, minlength=len(images)))[:-1])
        rows = dict(zip(images, parts, strict=True))
        known = [index for index, name in enumerate(captions.ids) if name in rows]
        if not known:
            raise UserError(
                f"{path} has regions of none of the {len(captions):,} images; it has "
                f"{images[0]}, the captions are of {captions.ids[0]} and others"
            )
        self.ids: Sequence[str] = tuple(captions.ids[index] for index in known)
        self.labels = np.zeros((len(known), 0), np.int8)
        self.num_without_regions = len(captions) - len(known)
        self._rows = [rows[name] for name in self.ids]
        self._captions = tuple(captions.captions(index) for index in known)
        self._pictures, self._known = captions, known

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"features": [r, D]}; r differs between images."""
        return {"features": self._features[self._rows[index]]}

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one image."""
        return self._captions[index]

    def picture(self, index: int) -> np.ndarray:
        """uint8 [h, w, 3], where the captions' source has images; BadSampleError otherwise."""
        found = self._pictures.read(self._known[index]).get("image")
        if found is None:
            raise BadSampleError(f"image {self.ids[index]}: its source has no images")
        return found

    def region_boxes(self, index: int) -> np.ndarray:
        """float [r, 4] of x1, y1, x2, y2 in pixels; BadSampleError if the file has none."""
        if self._boxes is None:
            raise BadSampleError(f"image {self.ids[index]}: its file of regions has no boxes")
        return self._boxes[self._rows[index]]


class _Rows:
    """Rows of the features of a file, which a worker reads for itself."""

    def __init__(self, path: Path, array: np.ndarray):
        self._path = path
        self._array: np.ndarray | None = array

    def __getstate__(self) -> dict[str, Any]:
        # A pickled copy would be the whole array.
        return {"_path": self._path, "_array": None}

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        if self._array is None:
            self._array = _read(self._path, ("features",))["features"]
        return self._array[rows]


def save_arrays(file: Path, remedy: str, **arrays: Any) -> None:
    """Writes an npz that is there whole or not at all; UserError, with `remedy`, if it cannot."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            np.savez(out, **arrays)
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({error.strerror}); {remedy}") from error


def _read(path: Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a file that are there, checked one by one and against each other."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give an npz of word-labelled regions")
    try:
        with path.open("rb") as file, np.load(file) as archive:
            found = list(archive.files)
            arrays = {name: archive[name] for name in _NAMES if name in found}
    except (OSError, ValueError, EOFError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        hint = "; save words as np.asarray(words, str)" if "allow_pickle" in str(error) else ""
        raise UserError(f"{path} cannot be read as an npz of regions: {error}{hint}") from error
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise UserError(
            f"{path} has no array '{missing[0]}'; regions need {' and '.join(needed)}, it has "
            f"{', '.join(found) or 'nothing'}"
        )
    count = len(arrays["features"]) if arrays["features"].ndim else 0
    for name, array in arrays.items():
        _CHECKS[name](path, array)
        if len(array) != count:
            raise UserError(f"{path}: {len(array):,} {name} for {count:,} rows of features")
    return arrays


def _check_features(path: Path, features: np.ndarray) -> None:
    if features.ndim != 2 or 0 in features.shape or features.dtype.kind != "f":
        shape = list(features.shape)
        raise UserError(f"{path}: features are {features.dtype} {shape}, not floats [N, D]")
    for start in range(0, len(features), _CHECKED_ROWS):
        finite = np.isfinite(features[start : start + _CHECKED_ROWS]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise UserError(f"{path}: features of row {row} hold a NaN or an infinity")


def _check_words(path: Path, words: np.ndarray) -> None:
    if words.ndim not in (1, 2) or words.dtype.kind != "U":
        shape = list(words.shape)
        raise UserError(f"{path}: words are {words.dtype} {shape}, not strings [N] or [N, m]")


def _check_ids(path: Path, ids: np.ndarray) -> None:
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        shape = list(ids.shape)
        raise UserError(f"{path}: image_ids are {ids.dtype} {shape}, not integers or strings [N]")


def _check_boxes(path: Path, boxes: np.ndarray) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "fiu":
        shape = list(boxes.shape)
        raise UserError(f"{path}: boxes are {boxes.dtype} {shape}, not numbers [N, 4]")


def _corners(path: Path, arrays: dict[str, np.ndarray], box_format: str) -> np.ndarray | None:
    """[N, 4] of x1, y1, x2, y2, None if the file has no boxes."""
    if box_format not in ("xywh", "xyxy"):
        raise UserError(f"box_format is {box_format!r}; it is xywh or xyxy")
    if "boxes" not in arrays:
        return None
    boxes = arrays["boxes"]
    first, last = boxes[:, :2], boxes[:, 2:] + (boxes[:, :2] if box_format == "xywh" else 0)
    corners = np.concatenate([first, last], axis=1)
    good = np.isfinite(corners).all(axis=1) & (last > first).all(axis=1)
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(
            f"{path}: the box of row {row} is {boxes[row].tolist()}, which has no extent as "
            f"{box_format}; see box_format"
        )
    return corners


_CHECKS = {
    "features": _check_features,
    "words": _check_words,
    "image_ids": _check_ids,
    "boxes": _check_boxes,
}


def _number(words: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(the cleaned words, int64 [N, m] of the word at each place, -1 for none)."""
    table = words.reshape(len(words), -1)
    raw, inverse = np.unique(table, return_inverse=True)
    cleaned = [clean_word(text) for text in raw.tolist()]
    names = sorted({*cleaned} - {""})
    number = {name: position for position, name in enumerate(names)} | {"": -1}
    return names, np.asarray([number[c] for c in cleaned], np.int64)[inverse].reshape(table.shape)


def _images(arrays: dict[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """(ids of the images by their first region, int64 [N] of the image of each region)."""
    count = len(arrays["features"])
    given = arrays["image_ids"] if "image_ids" in arrays else np.full(count, "")
    is_none = given == "" if given.dtype.kind == "U" else given < 0
    names = np.where(is_none, [f"region-{row}" for row in range(count)], given.astype(str))
    unique, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.zeros(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return unique[order].tolist(), rank[inverse]

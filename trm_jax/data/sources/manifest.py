"""A user's own images and labels, listed in one CSV or JSONL file.

CSV: a header with the columns image, positives, negatives (may be absent) and split (may be
absent); lists are separated by ";" or "|". JSONL: one object a line with the same keys, lists as
arrays, and "captions" if there are any. A class that a row names in neither list is unknown there.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trm_jax.data.sources.base import file_fingerprint, read_image
from trm_jax.data.sources.coco import check_classes
from trm_jax.types import UserError

_KEYS = ("image", "positives", "negatives", "split", "captions")


class ManifestRow(NamedTuple):
    """One line of a manifest; `number` counts lines from 1, a CSV's header included."""

    number: int
    image: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    split: str
    captions: tuple[str, ...]


class ManifestImages:
    """The images of a manifest.

    path:    the .csv or .jsonl file; image paths are relative to `images`, by default its folder.
    split:   keeps the rows whose `split` says so; "" keeps all rows.
    classes: a text file with one class name a line; "" takes the names of all rows, sorted.
    unlisted: what an unlisted class means: "unknown" (0) or "negative" (-1).
    allow_empty_classes: accept a training split in which some class has no positive image.

    Raises UserError with the line number for an unreadable row or an unknown class. A missing
    image file is a BadSampleError when it is read.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "",
        *,
        classes: str | Path = "",
        images: str | Path = "",
        unlisted: str = "unknown",
        allow_empty_classes: bool = False,
    ):
        if unlisted not in ("unknown", "negative"):
            raise UserError(f"unlisted is '{unlisted}'; it is unknown or negative")
        rows = list(read_manifest(path))
        if not rows:
            raise UserError(f"{path} has no row")
        # The classes are those of the whole file, so that all splits agree on the columns.
        self.class_names = _class_names(rows, classes)
        rows = [row for row in rows if split in ("", row.split)]
        if not rows:
            raise UserError(f"{path} has no row with split '{split}'")
        self._folder = Path(images) if images else Path(path).parent
        self.ids: Sequence[str] = tuple(row.image for row in rows)
        if len(set(self.ids)) != len(self.ids):
            _refuse_duplicate(path, rows)
        self._texts = tuple(row.captions for row in rows)
        self.labels = _label_matrix(path, rows, self.class_names, unlisted)
        if split == "train" and not allow_empty_classes:
            check_classes(self.labels, self.class_names, path)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if the file is missing or broken."""
        return {"image": read_image(self._folder / self.ids[index])}

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the image files."""
        return file_fingerprint(self._folder / name for name in self.ids)

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of the image, () if none."""
        return self._texts[index]


def read_manifest(path: str | Path) -> Iterator[ManifestRow]:
    """Yields the rows of a .csv or .jsonl file; UserError with the line number for a bad one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"manifest {path} does not exist; give a .csv or .jsonl file")
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"manifest {path} is neither .csv nor .jsonl")
    records = _csv_records(path) if path.suffix == ".csv" else _jsonl_records(path)
    for number, record in records:
        unknown = sorted(set(record) - set(_KEYS))
        if unknown:
            raise UserError(f"{path}, line {number}: unknown column '{unknown[0]}'")
        image = record.get("image")
        if not isinstance(image, str) or not image:
            raise UserError(f"{path}, line {number}: no image path")
        lists = [_names(path, number, record, key) for key in ("positives", "negatives")]
        both = set(lists[0]) & set(lists[1])
        if both:
            raise UserError(
                f"{path}, line {number}: '{min(both)}' is both a positive and a negative"
            )
        yield ManifestRow(
            number=number,
            image=image,
            positives=lists[0],
            negatives=lists[1],
            split=str(record.get("split") or ""),
            captions=_names(path, number, record, "captions"),
        )


def open_manifest(
    root: str | Path,
    split: str,
    *,
    test: str | Path = "",
    classes: str | Path = "",
    images: str | Path = "",
    unlisted: str = "unknown",
    allow_empty_classes: bool = False,
) -> ManifestImages:
    """Opens one split of the manifest `root`, or of two files.

    root: the manifest; it has a `split` column unless `test` names a second file for the tests.
    classes: file of class names, needed with two files so that both agree on the columns.
    """
    options = {"classes": classes, "images": images, "unlisted": unlisted}
    if not test:
        return ManifestImages(root, split, allow_empty_classes=allow_empty_classes, **options)
    if not classes:
        raise UserError("two manifest files need data.options.classes, a file of class names")
    if split != "train":
        return ManifestImages(test, **options)
    source = ManifestImages(root, **options)
    if not allow_empty_classes:
        check_classes(source.labels, source.class_names, root)
    return source


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # utf-8-sig: spreadsheets put a byte-order mark in front of the header.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", strict=True)
        try:
            for record in reader:
                if "" in record or None in record.values():
                    raise UserError(
                        f"{path}, line {reader.line_num}: not the {len(reader.fieldnames or ())} "
                        "columns of the header"
                    )
                yield reader.line_num, record
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {reader.line_num + 1}: {error}") from error


def _jsonl_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield number, record


def _names(path: Path, number: int, record: dict[str, Any], key: str) -> tuple[str, ...]:
    """The list under `key`: an array of strings, or one string with separators."""
    value = record.get(key) or ()
    if isinstance(value, str):
        value = [value] if key == "captions" else re.split(r"[;|]", value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}, line {number}: {key} is not a list of names")
    return tuple(name.strip() for name in value if name.strip())


def _class_names(rows: Sequence[ManifestRow], classes: str | Path) -> tuple[str, ...]:
    if not classes:
        names = sorted({name for row in rows for name in (*row.positives, *row.negatives)})
        if not names:
            raise UserError("the manifest names no class; fill its positives column")
        return tuple(names)
    path = Path(classes)
    if not path.is_file():
        raise UserError(f"data.options.classes '{classes}' does not exist; one class name a line")
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(f"data.options.classes '{classes}' is empty or names a class twice")
    return tuple(names)


def _label_matrix(
    path: str | Path, rows: Sequence[ManifestRow], class_names: tuple[str, ...], unlisted: str
) -> np.ndarray:
    """int8 [N, C] in {-1, 0, +1}."""
    column_of = {name: column for column, name in enumerate(class_names)}
    labels = np.full((len(rows), len(class_names)), -1 if unlisted == "negative" else 0, np.int8)
    for labels_row, row in zip(labels, rows, strict=True):
        for value, names in ((1, row.positives), (-1, row.negatives)):
            for name in names:
                if name not in column_of:
                    raise UserError(
                        f"{path}, line {row.number}: class '{name}' is not in the class list"
                    )
                labels_row[column_of[name]] = value
    return labels


def _refuse_duplicate(path: str | Path, rows: Sequence[ManifestRow]) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        first = seen.setdefault(row.image, row.number)
        if first != row.number:
            raise UserError(
                f"{path}, line {row.number}: image '{row.image}' is on line {first} too"
            )

"""COCO and VOC by name: the raw layout, or a folder that launch/prepare.py made of it.

A prepared folder is a TFDS dataset in ArrayRecord files. Its features are `image` (the bytes of
the image file as they were), `image/id`, `image/filename`, `labels` int8 [C] and `captions`. Beside
them `prepared.json` says what it was made of, and `index_{split}.json` holds ids, labels and
captions, which are so known without reading an image. Nothing in it is an absolute path.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trm_jax.data.sources.base import Source
from trm_jax.data.sources.coco import CocoImages, check_classes
from trm_jax.data.sources.records import RecordImages, Records, label_matrix, read_json
from trm_jax.data.sources.voc import VocImages, resolve_difficult
from trm_jax.types import UserError

METADATA = "prepared.json"
LAYOUT = 1  # of the folder; another number is refused
_REMEDY = "run launch/prepare.py again"


class PreparedImages(RecordImages):
    """One split of a prepared folder.

    root, split, dataset, year: what to open; a folder made of something else is refused.
    difficult: see voc.VocImages.
    keep_empty: keep images without any label.
    allow_empty_classes: accept a training split in which some class has no image.
    file_rows, num_file_rows: for the `hcp` label protocol, see partial_labels.observe.

    Raises UserError for a damaged folder and for a class without a training image.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        dataset: str,
        year: str,
        difficult: str = "negative",
        keep_empty: bool = True,
        allow_empty_classes: bool = False,
    ):
        root = Path(root)
        metadata = read_metadata(root)
        _check_made_of(root, metadata, split, dataset, year)
        facts = metadata["splits"][split]
        index = _read_index(root, split, facts)
        records = Records(root, split)
        if not len(records) == len(index["ids"]) == facts["images"]:
            raise UserError(
                f"{root}: {len(records)} records, {len(index['ids'])} ids and {facts['images']} "
                f"images in {METADATA} do not agree; {_REMEDY}"
            )
        class_names = tuple(metadata["class_names"])
        labels = label_matrix(index["positives"], index["difficult"], len(class_names))
        rows = np.arange(len(labels))
        if not keep_empty:
            rows = np.flatnonzero((labels >= 0).any(axis=1))
        labels = resolve_difficult(labels, difficult)[rows]
        if split == "train" and not allow_empty_classes:
            check_classes(labels, class_names, root)
        captions = [tuple(index["captions"][row]) for row in rows] if index["captions"] else ()
        super().__init__(
            records,
            rows,
            ids=[index["ids"][row] for row in rows],
            class_names=class_names,
            labels=labels,
            captions=captions,
            fingerprint=facts["sha256"],
        )
        self.file_rows = np.asarray(index["file_rows"], np.int64)[rows]
        self.num_file_rows = int(facts["num_file_rows"])


def open_coco(
    root: str | Path,
    split: str,
    *,
    year: str = "2017",
    keep_empty: bool = False,
    allow_empty_classes: bool = False,
) -> Source:
    """COCO in its official layout (coco.CocoImages) or prepared; split "train" or "test" (val)."""
    options: dict[str, Any] = {
        "year": year,
        "keep_empty": keep_empty,
        "allow_empty_classes": allow_empty_classes,
    }
    if is_prepared(root):
        return PreparedImages(root, split, dataset="coco", **options)
    return CocoImages(root, split, **options)


def open_voc(
    root: str | Path,
    split: str,
    *,
    year: str = "2007",
    difficult: str = "negative",
    check_counts: bool = True,
    allow_empty_classes: bool = False,
) -> Source:
    """VOC in the layout of VOCdevkit (voc.VocImages) or prepared; split "train" or "test"."""
    options: dict[str, Any] = {
        "year": year,
        "difficult": difficult,
        "allow_empty_classes": allow_empty_classes,
    }
    if is_prepared(root):  # its counts were checked when it was made
        return PreparedImages(root, split, dataset="voc", **options)
    return VocImages(root, split, check_counts=check_counts, **options)


def is_prepared(root: str | Path) -> bool:
    """Whether launch/prepare.py made this folder."""
    return (Path(root) / METADATA).is_file()


def read_metadata(root: Path) -> dict[str, Any]:
    """What prepared.json says; UserError if it is damaged or of another layout."""
    metadata = read_json(root / METADATA, _REMEDY)
    if metadata.get("layout") != LAYOUT:
        raise UserError(
            f"{root} has layout {metadata.get('layout')}, this version reads {LAYOUT}; {_REMEDY}"
        )
    return metadata


def index_path(root: Path, split: str) -> Path:
    """The file of ids, labels and captions."""
    return root / f"index_{split}.json"


def index_of(
    ids: Sequence[str],
    labels: np.ndarray,
    file_rows: np.ndarray,
    captions: Sequence[tuple[str, ...]],
) -> dict[str, Any]:
    """What an index file holds, from N ids, labels [N, C] in {-1, 0, +1}, rows and captions."""
    return {
        "ids": list(ids),
        "positives": [np.flatnonzero(row == 1).tolist() for row in labels],
        "difficult": [np.flatnonzero(row == 0).tolist() for row in labels],
        "file_rows": np.asarray(file_rows).tolist(),
        "captions": [list(texts) for texts in captions] if any(captions) else [],
    }


def _check_made_of(
    root: Path, metadata: Mapping[str, Any], split: str, dataset: str, year: str
) -> None:
    if metadata["dataset"] != dataset:
        raise UserError(
            f"{root} was prepared from {metadata['dataset']}; set "
            f"data.dataset={metadata['dataset']}"
        )
    if metadata["year"] != year:
        raise UserError(
            f"{root} was prepared from {dataset} {metadata['year']}, not {year}; set "
            f"data.options.year={metadata['year']}"
        )
    if split not in metadata["splits"]:
        raise UserError(
            f"{root} holds no '{split}' split, only {', '.join(metadata['splits'])}; delete it and "
            "prepare it with --split=train,test"
        )


def _read_index(root: Path, split: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    path = index_path(root, split)
    if path.is_file():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != facts["index_sha256"]:
            raise UserError(f"{path} is not the file that {METADATA} describes; {_REMEDY}")
    return read_json(path, _REMEDY)

"""Datasets that TFDS itself prepared, by their TFDS name: `voc/2007`, `coco/2014` and their like.

Labels are found in one pass over the records, without decoding an image, and remembered in a file
beside them where the folder can be written.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trm_jax.data.sources.coco import check_classes
from trm_jax.data.sources.records import INFO, RecordImages, Records, label_matrix
from trm_jax.data.sources.voc import resolve_difficult
from trm_jax.types import BadSampleError, UserError

_INDEX_VERSION = 1
# What the literature trains and tests on, in the names that TFDS gives the splits.
_SPLITS = {
    "voc/2007": {"train": "train+validation", "test": "test"},
    "voc/2012": {"train": "train", "test": "validation"},
    "coco/2014": {"train": "train", "test": "validation"},
    "coco/2017": {"train": "train", "test": "validation"},
}


class TfdsImages(RecordImages):
    """One split of a dataset that TFDS prepared with file_format=array_record.

    root:  TFDS's data_dir; the records lie in {root}/{name}/{version}.
    split: "train" or "test"; for COCO and VOC the images that the raw layouts give.
    name:  such as "voc/2007"; a version may follow ("voc/2007/5.0.0"), else it is the newest.
    train_split, test_split: splits of TFDS, such as "train+validation", where the defaults do not
      suit.
    difficult: see voc.VocImages.
    keep_empty: keep images without any label.
    allow_empty_classes: accept a training split in which some class has no image.

    An image is positive for the classes of `labels_no_difficult` (`labels` beyond those are
    difficult), of `labels`, of `objects` or of `label`, whichever comes first. Examples are in the
    order of their ids: of VOC that is the order of its lists, so that `hcp` masks are the published
    ones. The order of COCO's annotation file is not in TFDS's files: there they are not.

    Raises UserError for a missing or damaged dataset, one without labels, and a class without a
    training image.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        name: str = "",
        train_split: str = "",
        test_split: str = "",
        difficult: str = "negative",
        keep_empty: bool = False,
        allow_empty_classes: bool = False,
    ):
        folder = find_folder(Path(root).expanduser(), name)
        named = "/".join(name.split("/")[:2])
        default = _SPLITS.get(named, {"train": "train", "test": "test"})[split]
        records = Records(folder, (train_split if split == "train" else test_split) or default)
        class_names = _class_names(records)
        index = _index(records)
        order = sorted(range(len(records)), key=lambda row: _numeric(index["ids"][row]))
        labels = label_matrix(index["positives"], index["difficult"], len(class_names))[order]
        kept = np.ones(len(order), np.bool_) if keep_empty else (labels >= 0).any(axis=1)
        rows = np.asarray(order)[kept]
        labels = resolve_difficult(labels[kept], difficult)
        if split == "train" and not allow_empty_classes:
            check_classes(labels, class_names, folder)
        super().__init__(
            records,
            rows,
            ids=[index["ids"][row] for row in rows],
            class_names=class_names,
            labels=labels,
            fingerprint=index["made_of"],
        )
        if named.startswith("voc/"):
            self.file_rows = np.flatnonzero(kept)
            self.num_file_rows = len(order)


def find_folder(root: Path, name: str) -> Path:
    """The folder of a dataset in TFDS's data_dir; of several versions the newest."""
    if not name:
        raise UserError("data.options.name is empty; say which dataset of TFDS, such as voc/2007")
    folder = root / name
    if (folder / INFO).is_file():
        return folder
    versions = sorted(
        (tuple(map(int, path.name.split("."))), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (path / INFO).is_file() and path.name.replace(".", "").isdigit()
    )
    if not versions:
        raise UserError(
            f"{folder} holds no dataset that TFDS prepared; check data.root and data.options.name, "
            f"or run `tfds build {name} --file_format=array_record --data_dir={root}`"
        )
    return versions[-1][1]


def _class_names(records: Records) -> tuple[str, ...]:
    feature = _label_feature(records)
    feature = getattr(feature, "feature", feature)  # of a sequence
    names = tuple(getattr(feature, "names", None) or ())
    if not names or names == tuple(str(number) for number in range(len(names))):
        raise UserError(f"{records.folder}: its labels have no class names; prompts need them")
    return names


def _label_feature(records: Records) -> Any:
    features = records.features
    for key in ("labels_no_difficult", "labels", "objects", "label"):
        if key in features:
            return features[key]["label"] if key == "objects" else features[key]
    raise UserError(
        f"{records.folder} has no labels, objects or label; it has {', '.join(features)}"
    )


def _index(records: Records) -> dict[str, Any]:
    """ids, positives and difficult of all records, from the file beside them or by reading them."""
    digest = hashlib.sha256(f"{_INDEX_VERSION} {records.split}".encode())
    for name in (INFO, "features.json"):
        digest.update((records.folder / name).read_bytes())
    made_of = digest.hexdigest()
    path = records.folder / f"trm_jax_index_{records.split}.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["made_of"] == made_of and len(index["ids"]) == len(records):
            return index
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or of no use: it is made anew
    index = {"made_of": made_of, "ids": [], "positives": [], "difficult": []}
    for row in range(len(records)):
        try:
            example = records[row]
        except BadSampleError as error:
            raise UserError(f"{error}; prepare the dataset again") from error
        positives, difficult = _labels(example)
        index["ids"].append(_image_id(example, row))
        index["positives"].append(positives)
        index["difficult"].append(difficult)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(index), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a folder that others own: the next start reads again
    return index


def _labels(example: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """(columns of the classes that are there, columns of those with difficult instances only)."""
    if "labels_no_difficult" in example:
        positives, every = example["labels_no_difficult"], example.get("labels", ())
    elif "labels" in example:
        positives = every = example["labels"]
    elif "objects" in example:
        positives = every = example["objects"]["label"]
    else:
        positives = every = [example["label"]]
    columns = sorted({int(column) for column in positives})
    return columns, sorted({int(column) for column in every} - set(columns))


def _image_id(example: Mapping[str, Any], row: int) -> str:
    """The id that the raw layout gives the image; without one the number of the record."""
    if "image/id" in example:
        name = example["image/id"]
        return name.decode() if isinstance(name, bytes) else str(int(name))
    if "image/filename" in example:
        return Path(example["image/filename"].decode()).stem
    return str(row)


def _numeric(name: str) -> tuple[int, str]:
    """Sorts numbers without leading zeros by their value, ids of one length as text."""
    return len(name), name

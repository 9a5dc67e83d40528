"""MS-COCO in its official layout: instances_*.json, captions_*.json and image folders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trm_jax.data.sources.base import file_fingerprint, read_image
from trm_jax.types import UserError

# Of a whole split: its images, and those with at least one annotation.
OFFICIAL_COUNTS = {
    ("2014", "train"): (82_783, 82_081),
    ("2014", "test"): (40_504, 40_137),
    ("2017", "train"): (118_287, 117_266),
    ("2017", "test"): (5_000, 4_952),
}


class CocoLabels(NamedTuple):
    """The label table of one instances file; N images in the order of the file.

    annotated [N] bool: the image has at least one annotation (crowd annotations count).
    file_rows [N]: the row of each image among all `num_file_rows` images of the file.
    """

    ids: tuple[str, ...]
    file_names: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: np.ndarray  # int8 [N, C] in {-1, +1}
    annotated: np.ndarray
    file_rows: np.ndarray
    num_file_rows: int


def annotation_file(root: str | Path, kind: str, part: str, year: str) -> Path:
    """{root}/annotations/{kind}_{part}{year}.json; kind "instances" or "captions"."""
    return Path(root) / "annotations" / f"{kind}_{part}{year}.json"


def read_labels(path: str | Path, *, keep_empty: bool = False) -> CocoLabels:
    """Image-level labels of an instances file: +1 iff the image has an annotation of the class.

    Classes are in the order of their category ids. Without keep_empty, images without any
    annotation are left out (2014: 82,081 of 82,783 train, 40,137 of 40,504 val). Raises UserError
    for a missing or foreign file, an image listed twice, or an annotation of an unknown image or
    category.
    """
    content = _read_json(path, ("images", "annotations", "categories"))
    categories = sorted(content["categories"], key=lambda category: category["id"])
    column_of = {category["id"]: column for column, category in enumerate(categories)}
    row_of = {image["id"]: row for row, image in enumerate(content["images"])}
    if len(row_of) != len(content["images"]):
        raise UserError(f"{path} lists an image id twice")
    labels = np.full((len(row_of), len(categories)), -1, np.int8)
    annotated = np.zeros(len(row_of), np.bool_)
    for annotation in content["annotations"]:
        row = row_of.get(annotation["image_id"])
        column = column_of.get(annotation["category_id"])
        if row is None or column is None:
            raise UserError(
                f"{path}: annotation {annotation.get('id')} is of image "
                f"{annotation['image_id']}, category {annotation['category_id']}, not both listed"
            )
        labels[row, column] = 1
        annotated[row] = True
    rows = np.arange(len(row_of)) if keep_empty else np.flatnonzero(annotated)
    images = [content["images"][row] for row in rows]
    return CocoLabels(
        ids=tuple(str(image["id"]) for image in images),
        file_names=tuple(image["file_name"] for image in images),
        class_names=tuple(category["name"] for category in categories),
        labels=labels[rows],
        annotated=annotated[rows],
        file_rows=rows,
        num_file_rows=len(row_of),
    )


def read_captions(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Image id -> captions in the order of the file."""
    captions: dict[str, list[str]] = {}
    for annotation in _read_json(path, ("annotations",))["annotations"]:
        captions.setdefault(str(annotation["image_id"]), []).append(annotation["caption"].strip())
    return {name: tuple(texts) for name, texts in captions.items()}


class CocoImages:
    """COCO photos with image-level labels, and captions where they are there.

    root:  {root}/annotations/instances_{train,val}{year}.json and {root}/{train,val}{year}/.
    split: "train", or "test": COCO's val.
    year:  "2014" or "2017".
    keep_empty: keep images without any annotation.
    allow_empty_classes: accept a training split in which some class has no image.
    file_rows, num_file_rows: for the `hcp` label protocol, see partial_labels.observe.
    annotation_files: the files that labels and captions were read from.

    Raises UserError for a missing file or folder and for a class without a training image.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        year: str = "2017",
        keep_empty: bool = False,
        allow_empty_classes: bool = False,
    ):
        part = "train" if split == "train" else "val"
        if not Path(root).is_dir():
            raise UserError(f"data.root '{root}' is not a folder; {_layout(part, year)}")
        self._folder = Path(root) / f"{part}{year}"
        instances = annotation_file(root, "instances", part, year)
        for path in (instances, self._folder):
            if not path.exists():
                raise UserError(f"{path} does not exist; {_layout(part, year)}")
        table = read_labels(instances, keep_empty=keep_empty)
        if not table.ids:
            raise UserError(f"{instances} has no image with an annotation")
        if split == "train" and not allow_empty_classes:
            check_classes(table.labels, table.class_names, instances)
        self.ids: Sequence[str] = table.ids
        self.class_names = table.class_names
        self.labels = table.labels
        self.file_rows = table.file_rows
        self.num_file_rows = table.num_file_rows
        self._file_names = table.file_names
        captions = annotation_file(root, "captions", part, year)
        self._captions = read_captions(captions) if captions.is_file() else {}
        self.annotation_files = (instances, captions) if captions.is_file() else (instances,)

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, index: int) -> Path:
        """Where the file of one image should lie."""
        return self._folder / self._file_names[index]

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the image files."""
        return file_fingerprint(self.image_path(index) for index in range(len(self)))

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if the file is missing or broken."""
        return {"image": read_image(self.image_path(index))}

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of the image, () if none."""
        return self._captions.get(self.ids[index], ())


def check_classes(labels: np.ndarray, class_names: Sequence[str], path: str | Path) -> None:
    """Raises UserError naming the classes of which no row of `labels` [N, C] is positive."""
    empty = [class_names[column] for column in np.flatnonzero(~np.any(labels > 0, axis=0)).tolist()]
    if empty:
        raise UserError(
            f"{path}: no training image of {', '.join(empty[:5])}"
            + (f" and {len(empty) - 5} more classes" if len(empty) > 5 else "")
            + "; remove the class or set data.options.allow_empty_classes"
        )


def _layout(part: str, year: str) -> str:
    return f"expected annotations/instances_{part}{year}.json and {part}{year}/ in data.root"


def _read_json(path: str | Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check data.root") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable JSON file: {error}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path} has no '{missing[0]}'; is it a COCO annotation file?")
    return content

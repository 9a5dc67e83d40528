"""COCO-Object: COCO 2017 with one mask of the 80 classes per image.

GroupViT (Xu et al., CVPR 2022) makes its masks from the pixel maps of COCO-Stuff (Caesar et al.,
CVPR 2018): things keep their class, stuff and unlabelled pixels are background. `masks="stuff"`
reads these maps; `masks="instances"` needs nothing but COCO's own annotations.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from trm_jax.data.sources.base import file_fingerprint, read_image
from trm_jax.data.sources.coco import CocoLabels, annotation_file, read_labels
from trm_jax.data.sources.segmentation import (
    BACKGROUND,
    IGNORED,
    UNDEFINED,
    MaskImages,
    check_size,
    require_files,
)
from trm_jax.types import UserError

_LAST_THING, _LAST_STUFF = 90, 181  # values in COCO-Stuff's maps, which are category ids less 1


class Region(NamedTuple):
    """One annotation of an image; `rle` is COCO's run-length code, {"size": [h, w], "counts"}."""

    column: int
    crowd: bool
    rle: Any


class CocoObjects:
    """COCO photos with the masks of all instances painted into one; a `MaskedSource`.

    Where instances overlap the smaller one is in front, and every instance is in front of crowd
    regions, whatever the order of the file.

    images: the folder of the photos. instances: instances_*.json. table: its labels.
    crowd:  what a region of many objects of one class is: "class", or "ignore" (-2).

    Raises UserError for an annotation without a usable polygon or run-length code.
    """

    def __init__(self, images: Path, instances: Path, table: CocoLabels, *, crowd: str = "class"):
        if crowd not in ("class", "ignore"):
            raise UserError(f"data.options.crowd is '{crowd}'; it is class or ignore")
        self.ids: Sequence[str] = table.ids
        self.class_names = table.class_names
        self.labels = table.labels
        self._images, self._file_names, self._instances = images, table.file_names, instances
        self._crowd = crowd
        self._sizes, self._regions = _read_regions(instances, table)

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, index: int) -> Path:
        """Where the file of one image should lie."""
        return self._images / self._file_names[index]

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the images and of the annotation file."""
        return file_fingerprint([*(self.image_path(i) for i in range(len(self))), self._instances])

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if the file is missing or broken."""
        return {"image": read_image(self.image_path(index))}

    def captions(self, index: int) -> tuple[str, ...]:
        """()."""
        del index
        return ()

    def semantic_mask(self, index: int) -> np.ndarray:
        """int16 [h, w], see base.MaskedSource."""
        size = self._sizes[index]
        check_size(size, self._instances, self.image_path(index))
        semantic = np.full(size, BACKGROUND, np.int16)
        for region in self._regions[index]:
            value = IGNORED if region.crowd and self._crowd == "ignore" else region.column
            semantic[coco_mask.decode(region.rle) == 1] = value
        return semantic


def open_coco_object(
    root: str | Path, split: str, *, masks: str = "instances", crowd: str = "class"
) -> CocoObjects | MaskImages:
    """COCO 2017 with masks; split "train", or "test": the 5,000 images of COCO's val.

    root:  {root}/annotations/instances_{train,val}2017.json and the photos in
      {root}/{train,val}2017/ or {root}/images/{train,val}2017/.
    masks: "instances", or "stuff": the maps of COCO-Stuff in {root}/stuffthingmaps/{part}2017/ or
      {root}/annotations/{part}2017/, which GroupViT's figures are of.
    crowd: see CocoObjects; COCO-Stuff's maps have no such choice.
    Raises UserError for what is missing or malformed.
    """
    part = "train" if split == "train" else "val"
    instances = annotation_file(root, "instances", part, "2017")
    images = _folder(Path(root), ("", "images"), f"{part}2017")
    table = read_labels(instances, keep_empty=True)
    if not table.ids:
        raise UserError(f"{instances} lists no image")
    require_files(images, table.file_names, instances)
    if masks == "instances":
        return CocoObjects(images, instances, table, crowd=crowd)
    if masks != "stuff":
        raise UserError(f"data.options.masks is '{masks}'; it is instances or stuff")
    maps = _folder(Path(root), ("stuffthingmaps", "annotations"), f"{part}2017")
    names = [f"{Path(name).stem}.png" for name in table.file_names]
    require_files(maps, names, instances)
    return MaskImages(
        [images / name for name in table.file_names],
        [maps / name for name in names],
        table.ids,
        table.class_names,
        _stuff_values(instances),
        labels=table.labels,
    )


def _folder(root: Path, parents: Sequence[str], name: str) -> Path:
    folders = [root / parent / name for parent in parents]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise UserError(f"neither {folders[0]} nor {folders[1]} is a folder; check data.root")


def _stuff_values(instances: Path) -> np.ndarray:
    """int16 [256]: values of COCO-Stuff's maps to classes; all but the things is background."""
    values = np.full(256, UNDEFINED, np.int16)
    values[_LAST_THING + 1 : _LAST_STUFF + 1] = BACKGROUND
    values[255] = BACKGROUND  # unlabelled; GroupViT counts it as background too
    categories = json.loads(instances.read_text(encoding="utf-8"))["categories"]
    for column, number in enumerate(sorted(category["id"] for category in categories)):
        if not 1 <= number <= _LAST_THING + 1:
            raise UserError(
                f"{instances}: category {number} is none of COCO's 90, which the maps of "
                "COCO-Stuff number; use data.options.masks=instances"
            )
        values[number - 1] = column
    return values


def _read_regions(
    path: Path, table: CocoLabels
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[Region, ...], ...]]:
    """(h, w) of each image and its regions from back to front, in the order of the table."""
    content = json.loads(path.read_text(encoding="utf-8"))
    sizes = [_size(path, image) for image in content["images"]]
    row_of = {image["id"]: row for row, image in enumerate(content["images"])}
    columns = sorted(category["id"] for category in content["categories"])
    column_of = {number: column for column, number in enumerate(columns)}
    regions: list[list[Region]] = [[] for _ in sizes]
    for annotation in content["annotations"]:
        row = row_of[annotation["image_id"]]
        crowd = bool(annotation.get("iscrowd"))
        try:
            rle = _run_lengths(annotation.get("segmentation"), *sizes[row])
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: annotation {annotation.get('id')}: {error}") from error
        regions[row].append(Region(column_of[annotation["category_id"]], crowd, rle))
    for items in regions:
        items.sort(key=lambda item: (not item.crowd, -int(coco_mask.area(item.rle))))
    rows = table.file_rows.tolist()
    return tuple(sizes[row] for row in rows), tuple(tuple(regions[row]) for row in rows)


def _size(path: Path, image: Mapping[str, Any]) -> tuple[int, int]:
    size = image.get("height"), image.get("width")
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise UserError(f"{path}: image {image['id']} has no height and width")
    return size  # pyright: ignore[reportReturnType]


def _run_lengths(segmentation: Any, height: int, width: int) -> Any:
    """COCO's run-length code of a list of polygons or of a code; ValueError says what is wrong."""
    if isinstance(segmentation, list) and segmentation:
        for polygon in segmentation:
            points = np.asarray(polygon, np.float64)
            if points.ndim != 1 or points.size < 6 or points.size % 2:
                raise ValueError("a polygon is no list x1, y1, ... of three or more points")
            # Twice the image is no slip of the pen; pycocotools walks along every edge.
            if not (np.abs(points) <= 2 * max(height, width)).all():
                raise ValueError(f"a polygon leaves its image of {width} x {height} pixels")
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError("it has no segmentation; COCO-Object needs instance masks")
    if segmentation.get("size") != [height, width]:
        raise ValueError(
            f"its run-length code is of size {segmentation.get('size')}, the image [h, w] is "
            f"{[height, width]}"
        )
    counts = segmentation["counts"]
    if isinstance(counts, str):
        rle: Any = {"size": [height, width], "counts": counts.encode("ascii", "replace")}
        # pycocotools leaves what a short code does not reach undefined.
        if coco_mask.encode(coco_mask.decode(rle))["counts"] != rle["counts"]:
            raise ValueError("its run-length code does not fill the image")
        return rle
    runs = np.asarray(counts)
    if runs.ndim != 1 or runs.dtype.kind not in "iu" or (runs < 0).any():
        raise ValueError("its run-length code is no list of counts")
    if runs.sum() != height * width:
        raise ValueError(f"its run-length code covers {runs.sum()} of {height * width} pixels")
    uncompressed: Any = {"size": [height, width], "counts": runs.tolist()}
    return coco_mask.frPyObjects(uncompressed, height, width)

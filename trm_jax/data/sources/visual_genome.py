"""Visual Genome's boxes as word-labelled regions, with the features of a detector.

Source: MASK, Sec. 3.1 and 4.1: the objects and attributes of Visual Genome are words of regions. A
box of Visual Genome takes the feature of the detected box that it overlaps most; where the user
ran the detector on Visual Genome's own boxes, that is its own. Boxes that share a detection are one
region, which carries the words of all of them: one region is never its own negative.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from pycocotools import mask as coco_mask
from tqdm import tqdm

from trm_jax.data.sources.butd import ButdRegions
from trm_jax.data.sources.labelled_regions import RegionGroup, save_arrays
from trm_jax.data.sources.region_words import lay_out
from trm_jax.data.sources.visual_genome_index import (
    Annotations,
    index_file,
    load_index,
    open_annotations,
)
from trm_jax.types import BadSampleError, UserError

_VERSION = 1
_REMEDY = "set data.options.index_dir to a folder for what is read of Visual Genome"
_NAMINGS = ("visual_genome", "coco")


class Detections(NamedTuple):
    """What a detector says of one image."""

    features: Float[np.ndarray, "n D"]
    boxes: Float[np.ndarray, "n 4"] | None  # x1, y1, x2, y2 in pixels
    size: tuple[int, int]  # (width, height) of the image as the detector saw it


class DetectedRegions(ButdRegions):
    """All regions of each image, however many; else as `ButdRegions`, which wants a number.

    most: regions of an image that are read, 0 for all; the detector's surest come first.
    """

    def __init__(self, path: str | Path, *, most: int = 0, index_dir: str | Path = ""):
        if most < 0:
            raise UserError(f"regions is {most}; give 1 or more, or 0 for all")
        super().__init__(path, regions=1, index_dir=index_dir)
        self._most = most or None

    def detections(self, index: int) -> Detections:
        """The regions of one image; BadSampleError as for `ButdRegions.read`."""
        image = self._image(index)
        features = image.features[: self._most]
        if features.shape[1] != self.width:
            raise BadSampleError(
                f"{self._name(index)}: features have {features.shape[1]} numbers, not {self.width} "
                "as in the first image"
            )
        if not np.isfinite(features).all():
            raise BadSampleError(f"{self._name(index)}: features hold a NaN or an infinity")
        boxes = None if image.boxes is None else image.boxes[: self._most].astype(np.float32)
        if boxes is not None and not (np.isfinite(boxes).all() and image.width and image.height):
            raise BadSampleError(f"{self._name(index)}: boxes or the image's size are no numbers")
        return Detections(features, boxes, (image.width, image.height))

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"features": [n, D]} in the precision of the file; n differs between images."""
        return {"features": self.detections(index).features}

    def boxes(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """(float32 [n, 4] in pixels, (width, height)); BadSampleError if the file has no boxes."""
        found = self.detections(index)
        if found.boxes is None:
            raise BadSampleError(f"{self._name(index)} has no boxes (bbox, image_w, image_h)")
        return found.boxes, found.size


def best_overlaps(
    boxes: Float[np.ndarray, "b 4"], detected: Float[np.ndarray, "n 4"], *, min_iou: float
) -> Int[np.ndarray, "b"]:
    """int64 [b]: the detected box of the highest IoU with each box, -1 where it is below min_iou.

    All boxes are x1, y1, x2, y2 on one scale. Of equal ones the first detected is taken; a box
    without extent overlaps none.
    """
    if not len(boxes) or not len(detected):
        return np.full(len(boxes), -1, np.int64)
    corners = [np.asarray(b, np.float64) for b in (detected, boxes)]
    sides = [np.column_stack([b[:, :2], b[:, 2:] - b[:, :2]]) for b in corners]
    iou = np.asarray(coco_mask.iou(sides[0], sides[1], [0] * len(boxes)))  # pyright: ignore
    best = iou.argmax(axis=0)
    good = iou[best, np.arange(len(boxes))] >= min_iou
    return np.where(good & (sides[1][:, 2:] > 0).all(axis=1), best, -1)


class VisualGenome:
    """The objects and attributes of Visual Genome on detected regions; a `RegionSource`.

    Args:
      root: the folder of image_data.json, objects.json and attributes.json.
      features: what `ButdRegions` reads: a TSV or a folder of TSV or npz files.
      min_count: words of fewer regions are dropped, with the regions that have no other.
      min_iou: in (0, 1]; a box that overlaps no detected box so much is left out.
      naming: how files of features name images: "visual_genome" by its ids, "coco" by COCO's.
      index_dir: folder for what is made of these files, by default beside them.

    Boxes, if the files of features have them, are scaled to the size that image_data.json states.
    Without boxes the features of an image are those of its objects.json boxes, if as many.

    Raises UserError as `open_annotations` and `ButdRegions` do, for an option out of its range, and
    if not one image has features or not one word is frequent enough.
    """

    def __init__(
        self,
        root: str | Path,
        features: str | Path,
        *,
        min_count: int = 5,
        min_iou: float = 0.5,
        naming: str = "visual_genome",
        index_dir: str | Path = "",
    ):
        if not 0.0 < min_iou <= 1.0:
            raise UserError(f"min_iou is {min_iou}; give a share in (0, 1]")
        if naming not in _NAMINGS:
            raise UserError(f"naming is {naming!r}; it is {' or '.join(_NAMINGS)}")
        root = Path(root).expanduser()
        found = open_annotations(root, index_dir)
        self._detector = DetectedRegions(features, index_dir=index_dir)
        self.width = self._detector.width
        self._positions = self._find(found, naming, features)
        detection, state = self._open_matches(root, Path(features), found, min_iou, index_dir)
        image_of_box = np.repeat(np.arange(len(found.ids)), np.diff(found.box_starts))
        chosen = np.flatnonzero(detection[found.sample_boxes] >= 0)
        boxes = found.sample_boxes[chosen]
        self._layout = lay_out(
            image_of_box[boxes],
            detection[boxes],
            found.sample_words[chosen],
            found.words,
            min_count=min_count,
            place=root,
        )
        self._sizes = found.sizes[self._layout.groups]
        self._min_count = min_count
        self._report = _count(found, detection, state, image_of_box)
        self.ids: Sequence[str] = tuple(str(k) for k in found.ids[self._layout.groups])
        self.words = self._layout.words
        self.word_counts = self._layout.counts

    def __len__(self) -> int:
        return len(self.ids)

    def samples(self, index: int) -> np.ndarray:
        """int32 [S, 2] of (region, word)."""
        return self._layout.group_samples(index)

    def group(self, index: int) -> RegionGroup:
        """The labelled regions of one image, boxes in its pixels as image_data.json has them.

        Raises BadSampleError if the file or line of features is missing, damaged, of another width
        or number of regions than when it was first read, or holds a NaN or an infinity.
        """
        found = self._detector.detections(int(self._positions[self._layout.groups[index]]))
        chosen = self._layout.group_regions(index)
        if chosen[-1] >= len(found.features):
            raise BadSampleError(f"image {self.ids[index]}: its features were changed meanwhile")
        boxes = _scaled(found, self._sizes[index])
        return RegionGroup(
            found.features[chosen], None if boxes is None else boxes[chosen], self.samples(index)
        )

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the files of features."""
        return self._detector.fingerprint()

    def report(self) -> dict[str, int]:
        """Counts; of boxes_without_detection those in images whose features could be used."""
        return self._layout.report(self._min_count) | self._report

    def _find(self, found: Annotations, naming: str, features: object) -> np.ndarray:
        """int64 [I]: the position of each image among the features, -1 for none."""
        ids = found.ids if naming == "visual_genome" else found.coco_ids
        names = (_names(number, naming) for number in ids.tolist())
        places = (self._detector.find(row) for row in names)
        positions = np.asarray([-1 if place is None else place for place in places], np.int64)
        if not (positions >= 0).any():
            raise UserError(
                f"{features} has features of none of the {len(ids):,} images of Visual Genome: it "
                f"has {self._detector.ids[0]} and {len(self._detector) - 1:,} more; naming is "
                f"'{naming}', it can be {' or '.join(_NAMINGS)}"
            )
        return positions

    def _open_matches(
        self, root: Path, features: Path, found: Annotations, min_iou: float, index_dir: str | Path
    ) -> tuple[np.ndarray, np.ndarray]:
        """(detection of each box or -1, state of each image), read or made and kept."""
        place = hashlib.sha256(str(features.expanduser().resolve()).encode()).hexdigest()[:12]
        file = index_file(root, f"visual_genome_on_{place}", index_dir)
        digest = hashlib.sha256(self._positions.tobytes() + found.boxes.tobytes())
        facts = {
            "version": _VERSION,
            "annotations": digest.hexdigest(),
            "features": self._detector.fingerprint(),
            "min_iou": min_iou,
        }
        kept = load_index(file, facts)
        if kept is None:
            detection, state = self._match(found, min_iou)
            arrays = {"detection": detection.astype(np.int32), "state": state}
            save_arrays(file, _REMEDY, **arrays, facts=np.asarray(json.dumps(facts)))
            return detection, state
        return kept["detection"].astype(np.int64), kept["state"]

    def _match(self, found: Annotations, min_iou: float) -> tuple[np.ndarray, np.ndarray]:
        detection = np.full(len(found.boxes), -1, np.int64)
        state = np.full(len(found.ids), _NO_FEATURES, np.int8)
        rows = np.flatnonzero(self._positions >= 0)
        for row in tqdm(rows, desc="matching boxes", unit="image", disable=None):
            part = slice(*found.box_starts[row : row + 2].tolist())
            try:
                image = self._detector.detections(int(self._positions[row]))
            except BadSampleError:
                state[row] = _UNREADABLE
                continue
            state[row], count = _USED, int(found.num_objects[row])
            boxes = _scaled(image, found.sizes[row])
            if boxes is not None:
                detection[part] = best_overlaps(found.boxes[part], boxes, min_iou=min_iou)
            elif len(image.features) == count:
                detection[part.start : part.start + count] = np.arange(count)
            else:
                state[row] = _NO_BOXES
        return detection, state


# What became of an image.
_USED, _NO_FEATURES, _UNREADABLE, _NO_BOXES = range(4)


def _names(number: int, naming: str) -> list[str]:
    """By which files of features may know an image; a negative number is none."""
    if number < 0:
        return []
    if naming == "visual_genome":
        return [str(number)]
    padded = f"{number:012d}"
    return [f"COCO_train2014_{padded}", f"COCO_val2014_{padded}", padded, str(number)]


def _scaled(found: Detections, size: np.ndarray) -> np.ndarray | None:
    """The detected boxes in pixels of an image of `size` (width, height)."""
    if found.boxes is None:
        return None
    scale = np.asarray(size, np.float32) / np.asarray(found.size, np.float32)
    return found.boxes * np.tile(scale, 2)


def _count(
    found: Annotations, detection: np.ndarray, state: np.ndarray, image_of_box: np.ndarray
) -> dict[str, int]:
    """What became of images and boxes, before rare words are dropped."""
    is_used = state[image_of_box] == _USED
    matched = detection >= 0
    regions = image_of_box[matched] * (1 + detection.max(initial=0)) + detection[matched]
    return {
        "images_in_files": len(found.ids),
        "images_without_features": int((state == _NO_FEATURES).sum()),
        "images_unreadable": int((state == _UNREADABLE).sum()),
        "images_without_boxes": int((state == _NO_BOXES).sum()),
        "boxes": len(found.boxes),
        "boxes_without_detection": int((is_used & ~matched).sum()),
        "boxes_sharing_a_detection": len(regions) - len(np.unique(regions)),
        "objects_without_synset": found.num_without_synset,
    }

"""Pascal VOC 2007 and 2012 in the layout of VOCdevkit: images, XML annotations, lists of images."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trm_jax.data.sources.base import file_fingerprint, read_image
from trm_jax.data.sources.coco import check_classes
from trm_jax.types import UserError

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# The images of a whole split, and how many of them show a non-difficult instance of each class:
# 7,306 and 7,013 in all. For 2012 only the images are counted.
OFFICIAL_COUNTS: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {
    ("2007", "train"): (5_011, (
        238, 243, 330, 181, 244, 186, 713, 337, 445, 141,
        200, 421, 287, 245, 2008, 245, 96, 229, 261, 256,
    )),
    ("2007", "test"): (4_952, (
        204, 239, 282, 172, 212, 174, 721, 322, 417, 127,
        190, 418, 274, 222, 2007, 224, 97, 223, 259, 229,
    )),
    ("2012", "train"): (5_717, ()),
    ("2012", "test"): (5_823, ()),
}
# fmt: on
# The test labels of 2012 are not public: its `val` is what papers test on.
_PARTS = {
    ("2007", "train"): "trainval",
    ("2007", "test"): "test",
    ("2012", "train"): "train",
    ("2012", "test"): "val",
}
YEARS = ("2007", "2012")
_DIFFICULT = {"negative": -1, "ignore": 0, "positive": 1}


class VocLabels(NamedTuple):
    """The label table of one list of images; a class of which an image shows only difficult
    instances is 0."""

    ids: tuple[str, ...]
    labels: np.ndarray  # int8 [N, 20] in {-1, 0, +1}
    files: tuple[Path, ...]  # that the table was read from


class VocImages:
    """VOC photos with image-level labels: +1 iff a non-difficult instance of the class is there.

    root:  the folder that contains VOCdevkit, VOCdevkit itself, or its VOC{year}.
    split: "train" or "test": `trainval` and `test` of 2007, `train` and `val` of 2012.
    year:  "2007" or "2012".
    difficult: what a class is of which an image shows only difficult instances: "negative" (as
      papers on partial labels count it), "ignore" (0, unknown) or "positive".
    check_counts: refuse a whole split whose positives are not the published ones.
    allow_empty_classes: accept a training split in which some class has no image.
    file_rows, num_file_rows: for the `hcp` label protocol, see partial_labels.observe.
    annotation_files: the files that the labels were read from.

    Raises UserError for a missing or malformed file, wrong counts, and a class without a training
    image.
    """

    class_names = VOC_CLASSES

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        year: str = "2007",
        difficult: str = "negative",
        check_counts: bool = True,
        allow_empty_classes: bool = False,
    ):
        self._folder = find_folder(root, year)
        self.ids: Sequence[str]
        self.ids, labels, self.annotation_files = read_labels(self._folder, _PARTS[year, split])
        if check_counts:
            check_official(labels, year, split, self._folder)
        self.labels = resolve_difficult(labels, difficult)
        if split == "train" and not allow_empty_classes:
            check_classes(self.labels, VOC_CLASSES, self.annotation_files[0])
        self.file_rows = np.arange(len(self.ids))
        self.num_file_rows = len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, index: int) -> Path:
        """Where the file of one image should lie."""
        return self._folder / "JPEGImages" / f"{self.ids[index]}.jpg"

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the image files."""
        return file_fingerprint(self.image_path(index) for index in range(len(self)))

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if the file is missing or broken."""
        return {"image": read_image(self.image_path(index))}

    def captions(self, index: int) -> tuple[str, ...]:
        """(): VOC has no captions."""
        del index
        return ()


def find_folder(root: str | Path, year: str) -> Path:
    """The folder VOC{year} at or below `root`; UserError if there is none."""
    if year not in YEARS:
        raise UserError(f"data.options.year is '{year}'; VOC has {' and '.join(YEARS)}")
    root, name = Path(root), f"VOC{year}"
    if not root.is_dir():
        raise UserError(f"data.root '{root}' is not a folder; {_layout(year)}")
    candidates = [root / "VOCdevkit" / name, root / name]
    # A folder that says another year is not taken for this one.
    if root.resolve().name == name or not re.fullmatch(r"VOC\d{4}", root.resolve().name):
        candidates.append(root)
    for folder in candidates:
        if (folder / "ImageSets" / "Main").is_dir():
            return folder
    raise UserError(f"data.root '{root}' holds no {name}; {_layout(year)}")


def read_labels(folder: Path, part: str) -> VocLabels:
    """Labels of the images that ImageSets/Main/{part}.txt lists.

    They are read from the 20 files ImageSets/Main/{class}_{part}.txt where all are there (1, 0:
    only difficult instances, -1), else from the annotations. Raises UserError for what is missing
    or malformed.
    """
    main = folder / "ImageSets" / "Main"
    listed = main / f"{part}.txt"
    ids = tuple(line.split()[0] for line in _lines(listed) if line.strip())
    if not ids:
        raise UserError(f"{listed} lists no image")
    if len(set(ids)) != len(ids):
        raise UserError(f"{listed} lists an image twice")
    files = [main / f"{name}_{part}.txt" for name in VOC_CLASSES]
    if all(path.is_file() for path in files):
        labels = np.stack([_class_file(path, ids) for path in files], axis=1)
    else:
        files = [folder / "Annotations" / f"{name}.xml" for name in ids]
        labels = np.stack([_annotation(path) for path in files])
    return VocLabels(ids, labels, (listed, *files))


def check_official(labels: np.ndarray, year: str, split: str, where: str | Path) -> None:
    """Raises UserError if `labels` [N, 20] are of a whole split but not its published counts."""
    num_images, positives = OFFICIAL_COUNTS[year, split]
    if len(labels) != num_images:
        return
    counts = np.sum(labels > 0, axis=0).tolist()
    for name, count, official in zip(VOC_CLASSES, counts, positives, strict=False):
        if count != official:
            raise UserError(
                f"{where}: {count} {split} images are positive for {name}, {official} in the "
                f"published VOC{year}; get the annotations anew or turn "
                "check_counts off"
            )


def resolve_difficult(labels: np.ndarray, difficult: str) -> np.ndarray:
    """`labels` with the 0 of classes that show only difficult instances replaced."""
    if difficult not in _DIFFICULT:
        raise UserError(
            f"data.options.difficult is '{difficult}'; it is one of {', '.join(_DIFFICULT)}"
        )
    return np.where(labels == 0, _DIFFICULT[difficult], labels).astype(np.int8)


def _class_file(path: Path, ids: Sequence[str]) -> np.ndarray:
    """int8 [N]: the flags of one class, in the order of `ids`."""
    flags: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("-1", "0", "1"):
            raise UserError(f"{path}, line {number}: not 'image -1', 'image 0' or 'image 1'")
        flags[words[0]] = int(words[1])
    missing = [name for name in ids if name not in flags]
    if missing:
        raise UserError(f"{path} has no line for image {missing[0]}")
    return np.asarray([flags[name] for name in ids], np.int8)


def _annotation(path: Path) -> np.ndarray:
    """int8 [20]: the classes of one XML file."""
    labels = np.full(len(VOC_CLASSES), -1, np.int8)
    try:
        tree = ElementTree.parse(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check data.root") from error
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is not readable XML: {error}") from error
    for instance in tree.iterfind("object"):
        name = (instance.findtext("name") or "").strip().lower()
        if name not in VOC_CLASSES:
            raise UserError(f"{path}: '{name}' is none of VOC's 20 classes")
        difficult = (instance.findtext("difficult") or "0").strip() == "1"
        column = VOC_CLASSES.index(name)
        labels[column] = max(labels[column], 0 if difficult else 1)
    return labels


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{path}: {reason}; check data.root") from error


def _layout(year: str) -> str:
    return (
        f"expected VOCdevkit/VOC{year} with JPEGImages/, Annotations/ and ImageSets/Main/ in "
        "data.root"
    )

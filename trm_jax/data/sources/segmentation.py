"""Photos with segmentation masks as PNG files of class indices: VOC, Context, any folder.

Sources: Everingham et al., "The Pascal Visual Object Classes Challenge 2012"; Mottaghi et al.,
"The Role of Context for Object Detection and Semantic Segmentation in the Wild", CVPR 2014, in the
59 classes that mmsegmentation uses.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from trm_jax.data.sources.base import file_fingerprint, read_image
from trm_jax.data.sources.voc import VOC_CLASSES
from trm_jax.types import BadSampleError, UserError

BACKGROUND, IGNORED = -1, -2
UNDEFINED = -3  # of a value that stands for no class; never in a mask that a source gives
_VOID = 255  # the value of ignored pixels in a file
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_ORIENTATION = 0x0112  # the EXIF tag; values from 5 on exchange width and height

# fmt: off
CONTEXT_CLASSES = (
    "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle",
    "building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow",
    "cup", "curtain", "dog", "door", "fence", "floor", "flower", "food", "grass", "ground",
    "horse", "keyboard", "light", "motorbike", "mountain", "mouse", "person", "plate", "platform",
    "pottedplant", "road", "rock", "sheep", "shelves", "sidewalk", "sign", "sky", "snow", "sofa",
    "table", "track", "train", "tree", "truck", "tvmonitor", "wall", "water", "window", "wood",
)
# fmt: on
# The words that GroupViT puts into its prompts; on VOC it keeps "aeroplane".
_GROUPVIT_VOC = {"diningtable": "table", "pottedplant": "plant", "tvmonitor": "monitor"}
_GROUPVIT_CONTEXT = {"aeroplane": "airplane", "pottedplant": "plant", "tvmonitor": "monitor"}


class MaskImages:
    """Photos, each with a file of class indices; a `MaskedSource`.

    images, masks: the files of N examples, in one order.
    ids:         N stable names.
    class_names: C foreground classes.
    values:      int16 [256], from `mask_values`: what each value of a mask file means.
    labels:      int8 [N, C]; None makes them from all masks on first use: +1 iff a pixel is of the
      class, else -1.
    """

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path],
        ids: Sequence[str],
        class_names: Sequence[str],
        values: np.ndarray,
        *,
        labels: np.ndarray | None = None,
    ):
        self.ids: Sequence[str] = tuple(ids)
        self.class_names = tuple(class_names)
        self._images, self._masks, self._values = tuple(images), tuple(masks), values
        self._labels = labels

    @property
    def labels(self) -> np.ndarray:
        """int8 [N, C] in {-1, +1}; the first use may read all masks, a bad one raises UserError."""
        if self._labels is None:
            labels = np.full((len(self), len(self.class_names)), -1, np.int8)
            for row, path in enumerate(self._masks):
                try:
                    mask = self._classes(path)
                except BadSampleError as error:
                    raise UserError(f"{error}; labels need every mask") from error
                labels[row, np.unique(mask[mask >= 0])] = 1
            self._labels = labels
        return self._labels

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, index: int) -> Path:
        """Where the file of one image should lie."""
        return self._images[index]

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the image and mask files."""
        return file_fingerprint((*self._images, *self._masks))

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if the file is missing or broken."""
        return {"image": read_image(self._images[index])}

    def captions(self, index: int) -> tuple[str, ...]:
        """()."""
        del index
        return ()

    def semantic_mask(self, index: int) -> np.ndarray:
        """int16 [h, w], see base.MaskedSource."""
        path = self._masks[index]
        mask = self._classes(path)
        check_size(mask.shape, path, self._images[index])
        return mask

    def _classes(self, path: Path) -> np.ndarray:
        mask = read_index_mask(path)
        classes = self._values[mask]
        if (classes == UNDEFINED).any():
            raise UserError(
                f"{path} has the value {mask[classes == UNDEFINED].min()}, which is none of the "
                f"{len(self.class_names)} classes; check the class list"
            )
        return classes


def mask_values(num_classes: int, *, background: bool = True) -> np.ndarray:
    """int16 [256]: the class of each value of a mask file.

    background: 0 is the background and k + 1 class k, as in VOC; else k is class k. 255 is
      ignored, values beyond the classes stand for nothing.
    """
    first = int(background)
    if num_classes > _VOID - first:
        raise UserError(
            f"{num_classes} classes do not fit into masks whose value {_VOID} is ignored"
        )
    values = np.full(256, UNDEFINED, np.int16)
    values[:first] = BACKGROUND
    values[first : first + num_classes] = np.arange(num_classes)
    values[_VOID] = IGNORED
    return values


def read_index_mask(path: str | Path) -> np.ndarray:
    """uint8 [h, w]: the values of a mask file; of a palette picture the indices, not the colours.

    Raises BadSampleError for a missing or broken file, UserError for a picture with several
    channels or values above 255.
    """
    try:
        with Image.open(path) as image:
            mask, mode = np.asarray(image), image.mode
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not a readable mask"
        raise BadSampleError(f"{path}: {reason}") from error
    if mask.ndim != 2 or mask.dtype.kind not in "bui":
        raise UserError(
            f"{path} is a picture of mode {mode}, not a mask with one class index per pixel; save "
            "it as an 8-bit grey or palette PNG"
        )
    if mask.dtype.itemsize > 1 and mask.size and not 0 <= mask.min() <= mask.max() <= 255:
        value = mask[(mask < 0) | (mask > 255)].flat[0]
        raise UserError(f"{path} has the value {value}; class indices lie in [0, 255]")
    return mask.astype(np.uint8)


def check_size(shape: tuple[int, ...], mask: object, image: Path) -> None:
    """UserError, which begins with `mask`, if [h, w] is not the size of the upright image.

    Only the header of the image is read; BadSampleError if that fails.
    """
    try:
        with Image.open(image) as opened:
            width, height = opened.size
            if opened.getexif().get(_ORIENTATION, 1) >= 5:
                width, height = height, width
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not a readable image"
        raise BadSampleError(f"{image}: {reason}") from error
    if tuple(shape) != (height, width):
        raise UserError(
            f"{mask}: the mask has {shape[1]} x {shape[0]} pixels, its image {image.name} "
            f"{width} x {height}; masks must have the size of the upright image"
        )


def open_voc_segmentation(root: str | Path, split: str, *, names: str = "groupvit") -> MaskImages:
    """VOC 2012 with masks of 20 classes: 1,464 training and 1,449 test (`val`) images.

    root:  the folder that contains VOCdevkit, VOCdevkit itself, or its VOC2012.
    names: "groupvit" (table, plant, monitor) or "voc" (diningtable, pottedplant, tvmonitor).
    Raises UserError for missing folders and for listed images without a file.
    """
    class_names = _renamed(VOC_CLASSES, _GROUPVIT_VOC, names)
    folder = _devkit(root, "VOC2012", "Segmentation", "SegmentationClass")
    return _listed(folder, "Segmentation", "SegmentationClass", split, class_names)


def open_pascal_context(root: str | Path, split: str, *, names: str = "groupvit") -> MaskImages:
    """Pascal Context with masks of 59 classes: 4,996 training and 5,104 test (`val`) images.

    The layout is mmsegmentation's: SegmentationClassContext/ holds PNG files of the values 0
    (background) to 59, as its converter makes them.

    root:  the folder that contains VOCdevkit, VOCdevkit itself, or its VOC2010.
    names: "groupvit" (airplane, plant, monitor) or "voc" (aeroplane, pottedplant, tvmonitor).
    Raises UserError for missing folders and for listed images without a file.
    """
    class_names = _renamed(CONTEXT_CLASSES, _GROUPVIT_CONTEXT, names)
    folder = _devkit(root, "VOC2010", "SegmentationContext", "SegmentationClassContext")
    return _listed(folder, "SegmentationContext", "SegmentationClassContext", split, class_names)


def open_mask_folder(root: str | Path, split: str, *, background: bool = True) -> MaskImages:
    """Any folder with images/, masks/ (a PNG of the same stem) and classes.txt (a name a line).

    split: read from images/{split} and masks/{split} (for "test" also `val`); without such
      folders every split is the whole of images/.
    background: line k of classes.txt, from 1, is the value k, and 0 the background; False: it is
      the value k - 1, and there is no background. 255 is ignored.
    Raises UserError for what is missing, an image without a mask, and a bad class list.
    """
    root = Path(root)
    for name in ("images", "masks"):
        if not (root / name).is_dir():
            raise UserError(
                f"{root / name} is not a folder; expected images/, masks/ and classes.txt in "
                "data.root"
            )
    class_names = read_class_list(root / "classes.txt")
    if background and class_names[0].lower() == "background":
        raise UserError(
            f"{root / 'classes.txt'}, line 1: the background is the value 0 without a line; remove "
            "it, or set data.options.background=False to make it a class"
        )
    part = _part(root, split)
    folder = root / "images" / part
    names = sorted(
        name for name in os.listdir(folder) if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )
    if not names:
        raise UserError(f"{folder} holds no image")
    stems = [Path(name).stem for name in names]
    for first, second in zip(stems, stems[1:], strict=False):
        if first == second:
            raise UserError(f"{folder} holds two images named {first}; remove one")
    require_files(root / "masks" / part, [f"{stem}.png" for stem in stems], f"images in {folder}")
    return MaskImages(
        [folder / name for name in names],
        [root / "masks" / part / f"{stem}.png" for stem in stems],
        stems,
        class_names,
        mask_values(len(class_names), background=background),
    )


def read_class_list(path: Path) -> tuple[str, ...]:
    """The names of a text file, one a line; UserError for gaps, repetitions and an empty file."""
    names = [line.strip() for line in _lines(path)]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"{path} names no class; write one class name a line")
    for number, name in enumerate(names, start=1):
        if not name:  # the numbers of lines are the values of pixels
            raise UserError(f"{path}, line {number}: empty, which would shift the classes below")
        if name in names[: number - 1]:
            raise UserError(f"{path}, line {number}: class '{name}' is listed twice")
    return tuple(names)


def _part(root: Path, split: str) -> str:
    """The subfolder of images/ and masks/ for `split`; "" if images/ is not divided."""
    divided = [n for n in ("train", "test", "val") if (root / "images" / n).is_dir()]
    if not divided:
        return ""
    for name in ("test", "val") if split == "test" else (split,):
        if name in divided:
            return name
    raise UserError(f"{root / 'images'} has {', '.join(divided)}, but no folder {split}")


def _renamed(
    class_names: Sequence[str], groupvit: Mapping[str, str], names: str
) -> tuple[str, ...]:
    if names not in ("groupvit", "voc"):
        raise UserError(f"data.options.names is '{names}'; it is groupvit or voc")
    return tuple(groupvit.get(n, n) if names == "groupvit" else n for n in class_names)


def _devkit(root: str | Path, year: str, lists: str, masks: str) -> Path:
    """The folder VOC{year} at or below `root` that has the lists of a task."""
    root = Path(root)
    for folder in (root / "VOCdevkit" / year, root / year, root):
        if (folder / "ImageSets" / lists).is_dir():
            break
    else:
        raise UserError(
            f"data.root '{root}' holds no VOCdevkit/{year} with ImageSets/{lists}/, JPEGImages/ "
            f"and {masks}/"
        )
    for name in ("JPEGImages", masks):
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name} is not a folder; check data.root")
    return folder


def _listed(
    folder: Path, lists: str, masks: str, split: str, class_names: tuple[str, ...]
) -> MaskImages:
    """The images that ImageSets/{lists} names for a split."""
    path = folder / "ImageSets" / lists / ("train.txt" if split == "train" else "val.txt")
    ids = [line.split()[0] for line in _lines(path) if line.strip()]
    if not ids:
        raise UserError(f"{path} lists no image")
    if len(set(ids)) != len(ids):
        raise UserError(f"{path} lists an image twice")
    require_files(folder / "JPEGImages", [f"{name}.jpg" for name in ids], path)
    require_files(folder / masks, [f"{name}.png" for name in ids], path)
    return MaskImages(
        [folder / "JPEGImages" / f"{name}.jpg" for name in ids],
        [folder / masks / f"{name}.png" for name in ids],
        ids,
        class_names,
        mask_values(len(class_names)),
    )


def require_files(folder: Path, names: Sequence[str], listed: object) -> None:
    """UserError, which names the first, if `folder` lacks files that `listed` names."""
    # One listing is much cheaper than a look at each file; a name may have folders of its own.
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [n for n in names if n not in there and not (folder / n).is_file()]
    if missing:
        others = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise UserError(f"{folder / missing[0]}{others} of {listed} do not exist; check data.root")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{path}: {reason}; check data.root") from error

"""Sources of precomputed backbone features, beside COCO labels or beside captions.

Features are [N, r, D] (regions) or [N, h, w, D] (a grid, read as r = h*w regions in row order) in
an npy or npz file, half or single precision, with the image ids beside them.
"""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trm_jax.data.sources.coco import annotation_file, check_classes, read_captions, read_labels
from trm_jax.types import UserError

# Rows whose finiteness is checked at a time: bounds the memory on a file larger than the RAM.
_CHECKED_ROWS = 512
_BLOCK = 1 << 16  # bytes


class FeatureArray:
    """Rows [r, D] of one feature file, memory-mapped (npy) or loaded once per process (npz).

    path: .npy, or .npz with the array under `key`. Raises UserError if the file, the key, the
    shape or the type is wrong, or if a row holds a NaN or an infinity.
    """

    def __init__(self, path: Path, key: str = ""):
        self._path = path
        self._key = key
        self._array: np.ndarray | None = None
        shape, dtype = self._open().shape, self._open().dtype
        if len(shape) not in (3, 4) or 0 in shape:
            raise UserError(f"{path}: features are {list(shape)}, not [n, r, D] or [n, h, w, D]")
        if not np.issubdtype(dtype, np.floating):
            raise UserError(f"{path}: features are {dtype}, not float16 or float32")
        self._check_finite()

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, row: int) -> np.ndarray:
        features = self._open()[row]
        return np.asarray(features).reshape(-1, features.shape[-1])

    def fingerprint(self) -> str:
        """SHA-256 of the file's size and of 64 blocks spread over it."""
        size = self._path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with self._path.open("rb") as file:
            for block in range(64):
                file.seek(max(0, size - _BLOCK) * block // 63)
                digest.update(file.read(_BLOCK))
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        # Workers open the file for themselves: a pickled copy would be the whole array.
        return {**self.__dict__, "_array": None}

    def _open(self) -> np.ndarray:
        if self._array is None:
            self._array = _open_array(self._path, self._key)
        return self._array

    def _check_finite(self) -> None:
        array = self._open()
        for start in range(0, len(array), _CHECKED_ROWS):
            block = np.asarray(array[start : start + _CHECKED_ROWS])
            finite = np.isfinite(block.reshape(len(block), -1)).all(axis=1)
            if not finite.all():
                row = start + int(np.argmin(finite))
                raise UserError(f"{self._path}: features of row {row} hold a NaN or an infinity")


def _open_array(path: Path, key: str) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} does not exist; check data.root")
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r")
        with path.open("rb") as file, np.load(file) as archive:
            names = archive.files
            array = archive[key] if key in names else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if array is None:
        raise UserError(f"{path} has no array '{key}'; it has {', '.join(names)}")
    return array


class LabelledFeatures:
    """Features with COCO labels, joined by the image id.

    features: npz with `image_ids` [n] and the array `key`.
    annotations: official instances JSON; captions: captions JSON or "".
    keep_empty: keep images without any annotation (their labels are all -1).
    need_all_classes: refuse data in which some class has no image.
    file_rows, num_file_rows: for the `hcp` label protocol, see partial_labels.observe.
    num_without_annotation: images of the feature file that were left out for having none.
    num_without_features: annotated images that the feature file does not cover.
    """

    def __init__(
        self,
        features: str | Path,
        annotations: str | Path,
        *,
        key: str = "grid14",
        captions: str | Path = "",
        keep_empty: bool = False,
        need_all_classes: bool = False,
    ):
        features = Path(features)
        self._features = FeatureArray(features, key)
        image_ids = _open_array(features, "image_ids")
        if len(image_ids) != len(self._features):
            raise UserError(
                f"{features}: {len(image_ids)} image_ids for {len(self._features)} feature rows"
            )
        table = read_labels(annotations, keep_empty=True)
        row_of = {name: row for row, name in enumerate(table.ids)}
        names = [str(int(number)) for number in image_ids]
        known = [row for row, name in enumerate(names) if name in row_of]
        annotated = [row for row in known if keep_empty or table.annotated[row_of[names[row]]]]
        if not annotated:
            raise UserError(f"{features} and {annotations} have no image id in common")
        self.num_without_annotation = len(names) - len(annotated)
        self.num_without_features = int(table.annotated.sum()) - sum(
            bool(table.annotated[row_of[names[row]]]) for row in known
        )
        self.class_names = table.class_names
        self.ids: Sequence[str] = tuple(names[row] for row in annotated)
        self.file_rows = np.asarray([row_of[name] for name in self.ids])
        self.num_file_rows = table.num_file_rows
        self.labels = table.labels[self.file_rows]
        if need_all_classes:
            check_classes(self.labels, self.class_names, annotations)
        self._rows = np.asarray(annotated, np.int64)
        self._captions = read_captions(captions) if captions else {}

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Changes with the features."""
        return self._features.fingerprint()

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"features": [r, D]} in the precision of the file."""
        return {"features": self._features[int(self._rows[index])]}

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of the image, () if none."""
        return self._captions.get(self.ids[index], ())


class CaptionedFeatures:
    """Region features with captions in the layout of SCAN and VSE++ "precomp" folders.

    root holds {split}_ims.npy [n, r, D] and {split}_caps.txt, k >= 1 lines per image in image
    order (five in Flickr8k, Flickr30k and COCO); {split}_ids.txt names the images. Where ims holds
    one row per caption (the 1:1 layout of SCAN's own files), every k-th row is taken.
    nouns_file: where the nouns of the captions may be kept, see noun_vocabulary.annotate.

    Raises UserError if the files do not pair up, and for an empty caption, with its line: only the
    number of a line tells its image, so a line too many shifts all that follow.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, root: str | Path, split: str, *, captions_per_image: int = 5):
        root, k = Path(root), captions_per_image
        if k < 1:
            raise UserError(f"data.options.captions_per_image is {k}; give 1 or more")
        self.nouns_file = root / f"{split}_nouns.npz"
        self._features = FeatureArray(root / f"{split}_ims.npy")
        path = root / f"{split}_caps.txt"
        texts = _read_lines(path)
        _check_pairs(path, texts, len(self._features), k)
        num_images = len(texts) // k
        self._stride = len(self._features) // num_images
        self._texts = texts
        self._per_image = k
        self.ids: Sequence[str] = self._read_ids(root / f"{split}_ids.txt", num_images)
        self.labels = np.zeros((num_images, 0), np.int8)

    def _read_ids(self, path: Path, num_images: int) -> tuple[str, ...]:
        if not path.is_file():
            return tuple(str(number) for number in range(num_images))
        ids = _read_lines(path)
        if len(ids) == len(self._texts) != num_images:
            ids = ids[:: self._per_image]
        if len(ids) != num_images:
            raise UserError(f"{path} names {len(ids)} images, the captions belong to {num_images}")
        return ids

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"features": [r, D]} in the precision of the file."""
        return {"features": self._features[index * self._stride]}

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the image."""
        return self._texts[index * self._per_image : (index + 1) * self._per_image]


def open_coco_features(
    root: str | Path,
    split: str,
    *,
    annotations: str | Path = "",
    year: str = "2017",
    key: str = "grid14",
    keep_empty: bool = False,
    allow_empty_classes: bool = False,
) -> LabelledFeatures:
    """{root}/{train,val}{year}.npz with the COCO annotations below `annotations` (default root).

    split: "train" or "test" (COCO's val). Captions are read where captions_*.json is there.
    """
    part = "train" if split == "train" else "val"
    base = Path(annotations or root)
    captions = annotation_file(base, "captions", part, year)
    return LabelledFeatures(
        Path(root) / f"{part}{year}.npz",
        annotation_file(base, "instances", part, year),
        key=key,
        captions=captions if captions.is_file() else "",
        keep_empty=keep_empty,
        need_all_classes=split == "train" and not allow_empty_classes,
    )


def _check_pairs(path: Path, texts: Sequence[str], rows: int, k: int) -> None:
    """Raises UserError unless `rows` of features belong to `texts`, k of which are one image's."""
    empty = next((line for line, text in enumerate(texts, start=1) if not text), None)
    if empty is not None:
        raise UserError(
            f"{path}, line {empty}: the caption is empty; write it there, or delete the line if it "
            f"is none of the {k} captions of image {(empty - 1) // k + 1}"
        )
    count = len(texts)
    needed = (rows, rows * k)
    if count % k or count not in needed:
        last = (count - 1) // k
        raise UserError(
            f"{path} ends at line {count}, caption {count - last * k} of {k} of image {last + 1}; "
            f"the {rows} rows of features need {needed[1]} lines, {k} per image"
            + (f" (or {needed[0]}, one per row)" if rows % k == 0 else "")
            + "; see data.options.captions_per_image"
        )


def _read_lines(path: Path) -> tuple[str, ...]:
    try:
        # A byte-order mark is none of the first caption.
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check data.root") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check data.root") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file in that encoding") from None
    # Only "\n" ends a line: other marks may stand in a caption, and rows must stay aligned.
    lines = text.rstrip("\r\n").split("\n")
    return tuple(line.strip() for line in lines)

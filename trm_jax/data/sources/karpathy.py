"""Captions and splits in Karpathy's JSON files, beside photos or beside region features.

dataset_flickr8k.json, dataset_flickr30k.json and dataset_coco.json hold

    {"images": [{"filename": str, "split": "train" | "restval" | "val" | "test",
                 "sentences": [{"raw": str}, ...], "filepath": str, "cocoid": int}, ...]}

of which filepath (the photo's folder) and cocoid are there for COCO alone.
"""

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trm_jax.data.sources.base import file_fingerprint, read_image
from trm_jax.data.sources.butd import ButdRegions
from trm_jax.types import UserError

# Where photos lie below data.root, if data.options.images does not say it.
_FOLDERS = ("images", "flickr30k-images", "Flicker8k_Dataset", "Flickr8k_Dataset", "")
_SPLITS = {"train": ("train",), "dev": ("val",), "test": ("test",)}


class KarpathyImage(NamedTuple):
    """One image of a file; names: by which files of region features may know it."""

    filename: str
    folder: str
    names: tuple[str, ...]
    captions: tuple[str, ...]


class _Karpathy:
    """What images of such a file have in common, whatever is read of them."""

    class_names: tuple[str, ...] = ()

    def __init__(
        self, images: Sequence[KarpathyImage], num_empty_captions: int, nouns_file: Path | None
    ):
        self.nouns_file = nouns_file
        self.ids: Sequence[str] = tuple(image.filename for image in images)
        self.labels = np.zeros((len(self.ids), 0), np.int8)
        self.num_empty_captions = num_empty_captions
        self._captions = tuple(image.captions for image in images)

    def __len__(self) -> int:
        return len(self.ids)

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of the image; empty ones are left out."""
        return self._captions[index]


class KarpathyPhotos(_Karpathy):
    """Captioned photos. ids: file names.

    images: of one split. folder: of the photos; one with the subfolders train2014 and val2014 is
    right for COCO.
    num_empty_captions: sentences that were left out for being empty.
    nouns_file: where the nouns of the captions may be kept, see noun_vocabulary.annotate.
    """

    def __init__(
        self,
        images: Sequence[KarpathyImage],
        folder: Path,
        *,
        num_empty_captions: int = 0,
        nouns_file: Path | None = None,
    ):
        super().__init__(images, num_empty_captions, nouns_file)
        places = {image.folder: folder / image.folder for image in images}
        self._folders = {name: p if p.is_dir() else folder for name, p in places.items()}
        self._places = tuple(image.folder for image in images)

    def image_path(self, index: int) -> Path:
        """Where the file of one image should lie."""
        return self._folders[self._places[index]] / self.ids[index]

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the image files."""
        return file_fingerprint(self.image_path(index) for index in range(len(self)))

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if the file is missing or broken."""
        return {"image": read_image(self.image_path(index))}


class KarpathyRegions(_Karpathy):
    """Captioned region features. ids: file names of the photos.

    images: of one split. regions: finds each by its photo's name without ending, or its COCO id.
    num_empty_captions, nouns_file: see `KarpathyPhotos`.
    Raises UserError if an image has no regions.
    """

    def __init__(
        self,
        images: Sequence[KarpathyImage],
        regions: ButdRegions,
        *,
        num_empty_captions: int = 0,
        nouns_file: Path | None = None,
    ):
        super().__init__(images, num_empty_captions, nouns_file)
        self._regions = regions
        rows = [regions.find(image.names) for image in images]
        self._rows = tuple(row for row in rows if row is not None)
        missing = [image for image, row in zip(images, rows, strict=True) if row is None]
        if missing:
            raise UserError(
                f"{len(missing):,} of {len(images):,} images have no region features, the first "
                f"{missing[0].filename} (looked for {', '.join(missing[0].names)}; "
                f"data.options.regions has {regions.ids[0]} and {len(regions) - 1:,} more)"
            )

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the files of features."""
        return self._regions.fingerprint()

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"features": [r, D]}, see `ButdRegions.read`."""
        return self._regions.read(self._rows[index])

    def boxes(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """(float32 [r, 4] pixels, (width, height)), see `ButdRegions.boxes`."""
        return self._regions.boxes(self._rows[index])


def open_karpathy(
    root: str | Path,
    split: str,
    *,
    annotations: str = "",
    images: str = "",
    regions: str = "",
    num_regions: int = 36,
    index_dir: str = "",
    restval: bool = True,
) -> KarpathyPhotos | KarpathyRegions:
    """One split of a Karpathy file, with photos, or with region features where `regions` is given.

    Args:
      root: the folder that the other places are relative to.
      split: "train", "dev" (the file's val) or "test".
      annotations: the JSON file, by default the only dataset_*.json in root.
      images: folder of the photos, by default one of the usual names in root.
      regions, num_regions, index_dir: see `ButdRegions`.
      restval: COCO's "restval" images are training images too, as everybody has it (113,287).

    Raises:
      UserError: a file or folder is missing, the JSON is of another layout, an image is listed
        twice, the split is empty, or an image of it has no regions.
    """
    if split not in _SPLITS:
        raise UserError(f"a Karpathy file has no split '{split}'; it is {', '.join(_SPLITS)}")
    root = Path(root).expanduser()
    path = root / Path(annotations).expanduser() if annotations else _only_file(root)
    wanted = (*_SPLITS[split], *(("restval",) if split == "train" and restval else ()))
    chosen, num_empty = read_karpathy(path, wanted)
    nouns_file = path.with_name(f"{path.stem}_{split}_nouns.npz")
    if regions:
        place = root / Path(regions).expanduser()
        found = ButdRegions(place, regions=num_regions, index_dir=index_dir)
        return KarpathyRegions(chosen, found, num_empty_captions=num_empty, nouns_file=nouns_file)
    folder = root / Path(images).expanduser() if images else _photo_folder(root, chosen[0])
    if not folder.is_dir():
        raise UserError(f"data.options.images: {folder} is not a folder")
    return KarpathyPhotos(chosen, folder, num_empty_captions=num_empty, nouns_file=nouns_file)


def read_karpathy(path: str | Path, splits: Sequence[str]) -> tuple[list[KarpathyImage], int]:
    """(images of `splits` in the order of the file, number of their captions that are empty).

    splits: some of "train", "restval", "val" and "test". Raises UserError for a missing or foreign
    file, an image listed twice, and if no image is in `splits`.
    """
    content = _read_json(Path(path))
    images, num_empty = [], 0
    for number, entry in enumerate(content):
        try:
            if entry["split"] not in splits:
                continue
            texts = [sentence["raw"].strip() for sentence in entry["sentences"]]
            filename, folder = str(entry["filename"]), str(entry.get("filepath", ""))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: images[{number}] is not as Karpathy's files have it ({error!r}); it "
                "needs filename, split and sentences with raw"
            ) from None
        captions = tuple(text for text in texts if text)
        num_empty += len(texts) - len(captions)
        names = (Path(filename).stem, *([str(entry["cocoid"])] if "cocoid" in entry else []))
        images.append(KarpathyImage(filename, folder, names, captions))
    if not images:
        found = collections.Counter(str(entry.get("split")) for entry in content)
        raise UserError(
            f"{path} has no image of the split {' or '.join(splits)}; it has "
            + (", ".join(f"{count:,} of {name}" for name, count in found.items()) or "none")
        )
    names = collections.Counter(image.filename for image in images)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise UserError(f"{path} lists the image {name} {count} times")
    return images, num_empty


def _read_json(path: Path) -> list[Mapping[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check data.options.annotations") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable JSON file: {error}") from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise UserError(f"{path} has no list 'images': it is none of Karpathy's files")
    return images


def _only_file(root: Path) -> Path:
    found = sorted(root.glob("dataset_*.json"))
    if len(found) != 1:
        what = f"{len(found)} files" if found else "no file"
        raise UserError(f"{root} has {what} dataset_*.json; set data.options.annotations to one")
    return found[0]


def _photo_folder(root: Path, first: KarpathyImage) -> Path:
    """The usual folder that has the first photo."""
    for name in _FOLDERS:
        folder = root / name
        if any((folder / part / first.filename).is_file() for part in (first.folder, "")):
            return folder
    raise UserError(
        f"{root} has no photo {first.filename}; set data.options.images to the folder of the "
        "photos, or data.options.regions to their region features"
    )

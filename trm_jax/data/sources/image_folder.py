"""Images sorted into one folder per class, as ImageNet is, for zero-shot classification."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trm_jax.data.sources.base import file_fingerprint, read_image
from trm_jax.data.sources.segmentation import IMAGE_SUFFIXES
from trm_jax.types import UserError

_NAME_FILES = ("classes.json", "classes.txt")


class ImageFolder:
    """The images of {root}/{train | test or val}/{class folder}/; each is of one class.

    root:  the folder of the splits.
    split: "train", or "test": the first of test/ and val/ that has class folders.
    names: a file of class folders and the names that prompts use: JSON {"n01440764": "tench"} or
      lines "n01440764 tench"; "" takes classes.json or classes.txt in `root` if one is there. The
      classes are in the order of that file; without one, in that of the folders of all splits,
      and a name is its folder's with "_" read as a blank.
    allow_empty_classes: accept a class without an image in this split.
    folders: the folder of each class.

    Raises UserError for missing folders, a class without an image, a folder that the names lack,
    and a malformed file of names.
    """

    def __init__(
        self, root: str | Path, split: str, *, names: str = "", allow_empty_classes: bool = False
    ):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"data.root '{root}' is not a folder; {_LAYOUT}")
        self._folder = _split_folder(root, split)
        present = _class_folders(self._folder)
        path = _names_file(root, names)
        if path is None:
            splits = (root / name for name in ("train", "test", "val"))
            self.folders = tuple(sorted({name for part in splits for name in _class_folders(part)}))
            self.class_names = tuple(name.replace("_", " ") for name in self.folders)
        else:
            named = read_names(path)
            strange = [name for name in present if name not in named]
            if strange:
                raise UserError(f"{path} has no name for the class folder '{strange[0]}'")
            self.folders, self.class_names = tuple(named), tuple(named.values())
        files = {name: _images(self._folder / name) for name in present}
        empty = [name for name in self.folders if not files.get(name)]
        if empty and (not allow_empty_classes or len(empty) == len(self.folders)):
            raise UserError(
                f"{self._folder / empty[0]} holds no image"
                + (f", nor do {len(empty) - 1} more class folders" if len(empty) > 1 else "")
                + "; remove the class or set data.options.allow_empty_classes"
            )
        listed = [(k, f) for k, name in enumerate(self.folders) for f in files.get(name, ())]
        self.ids: Sequence[str] = tuple(f"{self.folders[k]}/{file}" for k, file in listed)
        self._columns = np.asarray([column for column, _ in listed], np.int32)
        self._labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_labels": None}

    @property
    def labels(self) -> np.ndarray:
        """int8 [N, C]: +1 for the class of the folder, -1 for all others."""
        if self._labels is None:
            labels = np.full((len(self), len(self.class_names)), -1, np.int8)
            labels[np.arange(len(self)), self._columns] = 1
            self._labels = labels
        return self._labels

    def image_path(self, index: int) -> Path:
        """Where the file of one image should lie."""
        return self._folder / self.ids[index]

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the image files."""
        return file_fingerprint(self.image_path(index) for index in range(len(self)))

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if the file is missing or broken."""
        return {"image": read_image(self.image_path(index))}

    def captions(self, index: int) -> tuple[str, ...]:
        """()."""
        del index
        return ()


_LAYOUT = "expected {train,test}/{class folder}/ with images in data.root"


def read_names(path: Path) -> dict[str, str]:
    """Class folder -> name in prompts, in the order of the file; UserError for a malformed one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        pairs = json.loads(text) if path.suffix == ".json" else _pairs(path, text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check data.options.names") from error
    except ValueError as error:
        raise UserError(f"{path} is not readable: {error}") from error
    good = isinstance(pairs, dict) and all(isinstance(v, str) and v.strip() for v in pairs.values())
    if not good or not pairs:
        raise UserError(f"{path} is no table of class folders and names")
    return {folder: name.strip() for folder, name in pairs.items()}


def _pairs(path: Path, text: str) -> dict[str, str]:
    """Of lines "folder name": a tab ends the folder if there is one, else the first blank."""
    pairs: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.strip().split("\t" if "\t" in line else None, 1)]
        if len(parts) != 2:
            raise UserError(f"{path}, line {number}: not 'folder name'")
        if parts[0] in pairs:
            raise UserError(f"{path}, line {number}: folder '{parts[0]}' is listed twice")
        pairs[parts[0]] = parts[1]
    return pairs


def _names_file(root: Path, names: str) -> Path | None:
    if names:
        return Path(names).expanduser()
    return next((root / name for name in _NAME_FILES if (root / name).is_file()), None)


def _split_folder(root: Path, split: str) -> Path:
    # ImageNet's own test/ has images without classes: then val/ is meant.
    for name in ("test", "val") if split == "test" else (split,):
        if _class_folders(root / name):
            return root / name
    wanted = "test/ or val/" if split == "test" else f"{split}/"
    raise UserError(f"{root} has no {wanted} with class folders; {_LAYOUT}")


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(folder: Path) -> list[str]:
    return sorted(
        name
        for name in os.listdir(folder)
        if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
    )

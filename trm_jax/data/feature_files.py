"""Features of single image files, by their names, for prediction."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from trm_jax.data.sources.butd import ButdRegions
from trm_jax.types import BadSampleError, UserError


class FeatureFile:
    """Precomputed features that are found by the name of an image file, without its ending.

    place: FILE.npz or FILE.npz:KEY with image_ids [n] and features [n, r, D] or [n, h, w, D];
      NAME_ims.npy [n, r, D] with NAME_ids.txt beside it, one image a line; or what
      ButdRegions reads.
    regions: r of each image of the last kind, 0 for 36.

    Raises UserError if the files are missing or do not fit together.
    """

    def __init__(self, place: str, regions: int = 0):
        self._place = place
        self._butd: ButdRegions | None = None
        self._rows: dict[str, np.ndarray] = {}
        path, _, key = place.partition(":")
        if path.endswith("_ims.npy"):
            self._rows = _read_precomputed(Path(path))
        elif path.endswith(".npz"):
            self._rows = _read_npz(Path(path), key)
        else:
            self._butd = ButdRegions(place, regions=regions or 36)

    def read(self, file: Path) -> np.ndarray:
        """[r, D] of one image; BadSampleError if there are none."""
        if self._butd is None:
            if _image_id(file) not in self._rows:
                raise BadSampleError(f"{file}: {self._place} has no features for it")
            return self._rows[_image_id(file)]
        return self._of_butd(file, lambda butd, index: butd.read(index)["features"])

    def boxes(self, file: Path, size: tuple[int, int]) -> np.ndarray | None:
        """[r, 4] of x1, y1, x2, y2 in pixels of an image [height, width], None if unknown.

        The boxes are of the image as the detector saw it, so they are scaled.
        """
        if self._butd is None:
            return None
        try:
            boxes, (width, height) = self._of_butd(file, lambda butd, index: butd.boxes(index))
        except BadSampleError:
            return None
        scale = np.asarray([size[1] / width, size[0] / height] * 2, np.float32)
        return boxes * scale

    def _of_butd(self, file: Path, read: Callable):
        assert self._butd is not None
        index = self._butd.find([file.name, file.stem, _image_id(file)])
        if index is None:
            raise BadSampleError(f"{file}: {self._place} has no features for it")
        return read(self._butd, index)


def _image_id(file: Path) -> str:
    """COCO's file names end with zero-padded ids; other names are compared as they are."""
    last = file.stem.rpartition("_")[2] if file.stem.startswith("COCO_") else file.stem
    return str(int(last)) if last.isdigit() else file.stem


def _read_precomputed(path: Path) -> dict[str, np.ndarray]:
    ids = path.with_name(path.name.removesuffix("_ims.npy") + "_ids.txt")
    for file in (path, ids):
        if not file.is_file():
            raise UserError(f"--features: there is no file {file}")
    names, rows = ids.read_text(encoding="utf-8").splitlines(), np.load(path, mmap_mode="r")
    if len(names) != len(rows):
        raise UserError(f"--features: {ids} names {len(names)} images, {path} has {len(rows)}")
    return {_image_id(Path(name)): row for name, row in zip(names, rows, strict=True)}


def _read_npz(path: Path, key: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"--features: there is no file {path}")
    with np.load(path) as arrays:
        keys = [name for name in arrays.files if name != "image_ids"]
        key = key or keys[-1]
        if "image_ids" not in arrays.files or key not in keys:
            raise UserError(f"--features: {path} needs image_ids and {key or 'a feature array'}")
        grid = arrays[key]
        flat = grid.reshape(len(grid), -1, grid.shape[-1])
        return dict(zip(map(str, arrays["image_ids"]), flat, strict=True))

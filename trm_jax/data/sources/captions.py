"""Photos with captions in the layout of Flickr8k: images, one token file, split lists."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trm_jax.data.sources.base import read_image
from trm_jax.types import UserError


class CaptionedPhotos:
    """Photos of a folder with the captions of a token file, restricted to a list of names.

    tokens: lines "name.jpg#k<TAB>caption" (Flickr8k.token.txt and Flickr30k's results file).
    names:  a text file with one image name a line: the split, in its order.
    Raises UserError for a missing file, a malformed line (by number), or a name without captions.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, images: str | Path, tokens: str | Path, names: str | Path):
        self._folder = Path(images)
        if not self._folder.is_dir():
            raise UserError(f"{images} is not a folder; check data.root")
        captions = read_token_file(tokens)
        self.ids: Sequence[str] = tuple(
            line.strip() for _, line in _numbered_lines(names) if line.strip()
        )
        absent = [name for name in self.ids if name not in captions]
        if absent or not self.ids:
            what = f"'{absent[0]}' has no caption in {tokens}" if absent else "the list is empty"
            raise UserError(f"{names}: {what}")
        self._captions = {name: captions[name] for name in self.ids}
        self.labels = np.zeros((len(self.ids), 0), np.int8)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if the file is missing or broken."""
        return {"image": read_image(self._folder / self.ids[index])}

    def image_path(self, index: int) -> Path:
        """Where the file of one image should lie."""
        return self._folder / self.ids[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of the image."""
        return self._captions[self.ids[index]]


def read_token_file(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Image name -> captions, from lines "name.jpg#k<TAB>caption"."""
    captions: dict[str, list[str]] = {}
    for number, line in _numbered_lines(path):
        if not line.strip():
            continue
        key, separator, text = line.partition("\t")
        if not separator or "#" not in key:
            raise UserError(f"{path}, line {number}: not 'name.jpg#k<TAB>caption'")
        captions.setdefault(key.rpartition("#")[0], []).append(text.strip())
    return {name: tuple(texts) for name, texts in captions.items()}


def open_flickr8k(root: str | Path, split: str) -> CaptionedPhotos:
    """Flickr8k below `root`: Flickr8k.token.txt, the official split lists and an image folder.

    split: "train", "dev" or "test".
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data.root '{root}' is not a folder")
    folders = [root / name for name in ("Flicker8k_Dataset", "Flickr8k_Dataset", "images")]
    folder = next((path for path in folders if path.is_dir()), folders[-1])
    names = root / f"Flickr_8k.{split}Images.txt"
    return CaptionedPhotos(folder, root / "Flickr8k.token.txt", names)


def _numbered_lines(path: str | Path) -> list[tuple[int, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check data.root") from error
    return list(enumerate(text.split("\n"), start=1))

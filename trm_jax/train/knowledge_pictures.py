"""Pictures of what a knowledge of words sees: `launch/match.py draw`."""

from pathlib import Path
from typing import Any

import numpy as np

from trm_jax.data.sources.base import Source, read_image
from trm_jax.evaluate import knowledge_matching, reranking, retrieval
from trm_jax.train import knowledge_sets
from trm_jax.types import BadSampleError, UserError
from trm_jax.visualize import caption_text, words_regions
from trm_jax.visualize.reranked import Captions, Query, render_reranked, shown_images

_SHOWN = 3  # answers of a query
_ENDINGS = ("", ".jpg", ".jpeg", ".png", ".webp")


class Photos:
    """The photos of a source's images.

    source: an image is `folder`/ID, with or without an ending, or what the source itself paints.
    folder: "" for the latter.

    Raises UserError if there is no such folder, or the source paints nothing.
    """

    def __init__(self, source: Source, folder: str):
        self._source: Any = source  # of which some have pictures and boxes
        self._folder = folder
        if folder and not Path(folder).is_dir():
            raise UserError(f"--images={folder} is no folder")
        if not folder and not hasattr(source, "picture"):
            raise UserError("this data has features alone; give the folder of its photos: --images")

    def read(self, index: int) -> np.ndarray:
        """uint8 [h, w, 3]; UserError if there is no readable photo."""
        try:
            if not self._folder:
                return self._source.picture(index)
            return read_image(self._file(str(self._source.ids[index])))
        except BadSampleError as error:
            raise UserError(f"--images: {error}") from None

    def boxes(self, index: int, size: tuple[int, int], regions: int) -> np.ndarray | None:
        """[r, 4] of x1, y1, x2, y2 in pixels of a photo [height, width]; None if unknown.

        regions: r; a square number of regions without boxes is a grid.
        """
        if hasattr(self._source, "region_boxes"):
            return self._source.region_boxes(index)
        if hasattr(self._source, "boxes"):
            boxes, (width, height) = self._source.boxes(index)
            return boxes * np.asarray([size[1] / width, size[0] / height] * 2, np.float32)
        side = round(regions**0.5)
        return words_regions.grid_boxes(side, size) if side * side == regions else None

    def _file(self, name: str) -> Path:
        for ending in _ENDINGS:
            path = Path(self._folder) / f"{name}{ending}"
            if path.is_file():
                return path
        raise UserError(f"--images={self._folder} has no photo {name}")


def draw_words(
    sides: knowledge_sets.Sides, photos: Photos, out: Path, *, count: int = 4
) -> list[Path]:
    """Writes words_K.png: the words of an image's first caption, each with its best region.

    Args:
      sides: whose images and captions are drawn.
      photos: of its source.
      out: folder of the pictures.
      count: images, the first ones whose caption has a usable word.

    Raises:
      UserError: no caption has a usable word, or a photo is missing.
    """
    matcher, source = sides.matcher, sides.source
    captions = matcher.captions
    prototypes = matcher.prototypes(sides.knowledge.prototypes).vectors
    firsts = np.searchsorted(matcher.owner, np.arange(len(source)))
    written: list[Path] = []
    for batch in sides.images():
        for regions, mask, index in zip(*batch, strict=True):
            texts, number = source.captions(int(index)), int(firsts[index])
            if not texts:
                continue
            own = captions.indices[captions.indptr[number] : captions.indptr[number + 1]]
            if not len(own):
                continue
            best, cosines = knowledge_matching.best_regions(regions, mask, prototypes[own])
            photo = photos.read(int(index))
            path = words_regions.render_words(
                photo,
                caption_text.parts(texts[0], captions, number),
                best,
                cosines,
                path=out / f"words_{len(written) + 1}.png",
                boxes=photos.boxes(int(index), photo.shape[:2], int(mask.sum())),
                note=str(source.ids[index]),
            )
            written.append(path)
            if len(written) == count:
                return written
    if not written:
        raise UserError("no caption has a usable word: there is nothing to draw")
    return written


def draw_reranked(
    base: np.ndarray,
    other: np.ndarray,
    sides: knowledge_sets.Sides,
    photos: Photos,
    path: Path,
    *,
    alpha: float,
    top: int,
    names: tuple[str, str],
    count: int = 4,
) -> Path:
    """Writes one picture: queries whose right answer was promoted or demoted most (Table 10).

    Args:
      base, other: scores [images, captions], of all images and captions of `sides` in order.
      sides: the images and captions; words outside its knowledge are underlined.
      photos: of its source.
      path: the file to write.
      alpha, top: of `reranking.rerank`. names: of the two matrices, in errors.
      count: of each direction, half of them demoted if there are any.

    Raises:
      UserError: no right answer moved, or the matrices are not of these images and captions.
    """
    source, owner = sides.source, sides.matcher.owner
    if base.shape != (len(source), len(owner)):
        raise UserError(
            f"{names[0]} is {list(base.shape)}, the data has {len(source)} images and "
            f"{len(owner)} captions"
        )
    found = reranking.rerank(base, other, alpha=alpha, top=top, names=names)
    before, after = retrieval.ranks(base, owner), reranking.ranks(base, owner, found)
    to_text, to_image = (
        _moved(old, new, ranking, count)
        for old, new, ranking in zip(before, after, found, strict=True)
    )
    if not (to_image or to_text):
        raise UserError(f"--alpha={alpha:g} moves no right answer: there is nothing to draw")
    texts = [text for index in range(len(source)) for text in source.captions(index)]
    return render_reranked(
        to_image,
        to_text,
        {index: photos.read(index) for index in shown_images(to_image, to_text, top=_SHOWN)},
        Captions(texts, owner, sides.matcher.captions),
        path=path,
        top=_SHOWN,
        names=(Path(names[0]).stem, f"with {Path(names[1]).stem}"),
        note=f"alpha {alpha:g}, first {top}",
    )


def _moved(before: np.ndarray, after: np.ndarray, ranking: Any, count: int) -> list[Query]:
    better, worse = (rows.tolist() for rows in reranking.examples(before, after))
    better.sort(key=lambda row: after[row] >= _SHOWN)  # seen in the picture, then the others
    worse = worse[: count // 2]
    rows = better[: count - len(worse)] + worse
    return [Query(row, ranking.before[row], ranking.order[row]) for row in rows]

"""Glyph scenes as word-labelled regions: the boxes of their objects, named as a person might.

An object goes by one name of its category, which may be a synonym, and by its colour. Synonyms can
be held out: captions use them, no region carries them, as captions of photos have words that no
knowledge has. Features come from an encoder that the caller gives, on crops around the boxes, and
are written in the layout of `labelled_regions`, once.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from trm_jax.data.image_ops import resize
from trm_jax.data.sources.glyph_font import CATEGORIES, COLOR_NAMES
from trm_jax.data.sources.glyphs import GlyphScenes
from trm_jax.data.sources.labelled_regions import save_arrays
from trm_jax.types import UserError

# How often an object that has synonyms goes by its category's first name, as in captions.
_FIRST_NAME_RATE = 0.7
_NAMES_STREAM = 6  # the streams of glyphs.py are 0 to 5

Encode = Callable[[np.ndarray], np.ndarray]  # uint8 [b, S, S, 3] -> floating [b, D]


class RegionImage(NamedTuple):
    """An image with its boxes and their words."""

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    boxes: Float[np.ndarray, "J 4"]  # x1, y1, x2, y2 in pixels; x2 and y2 are exclusive
    words: tuple[tuple[str, ...], ...]  # of each box, the same number for all


def synonyms() -> tuple[str, ...]:
    """All synonyms of all categories, singular, in the order of the table."""
    return tuple(single for category in CATEGORIES for single, _ in category.synonyms)


def held_out_synonyms(share: float, seed: int = 0) -> frozenset[str]:
    """A share in [0, 1] of all synonyms, rounded, drawn by `seed`; no first name is among them.

    Raises UserError for a share out of its range.
    """
    if not 0.0 <= share <= 1.0:
        raise UserError(f"held_out is {share}; give a share of the synonyms in [0, 1]")
    words = synonyms()
    drawn = np.random.default_rng(seed).permutation(len(words))[: round(share * len(words))]
    return frozenset(words[k] for k in drawn)


def scene_regions(
    scenes: GlyphScenes, *, held_out: Collection[str] = (), colors: bool = True
) -> Iterator[RegionImage]:
    """Every scene with the boxes of its visible objects.

    Args:
      scenes: names are drawn by its seed, one stream for each scene.
      held_out: synonyms that no region carries.
      colors: whether the colour of an object is its second word.

    Raises:
      UserError: a word of `held_out` is no synonym.
    """
    unknown = sorted({*held_out} - {*synonyms()})
    if unknown:
        raise UserError(f"held_out: {unknown[0]!r} is no synonym of a glyph category")
    for index, name in enumerate(scenes.ids):
        rng = np.random.default_rng([scenes.seed, index, _NAMES_STREAM])
        boxes, words = [], []
        for mask, item in zip(scenes.masks(index), scenes.scene(index).objects, strict=True):
            own = (_name(item.category, held_out, rng), COLOR_NAMES[item.color])
            x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
            if width:  # only on images so small that a glyph is a pixel or two is there none
                boxes.append((x, y, x + width, y + height))
                words.append(own if colors else own[:1])
        corners = np.asarray(boxes, np.float32).reshape(-1, 4)
        yield RegionImage(name, scenes.read(index)["image"], corners, tuple(words))


def _name(category: int, held_out: Collection[str], rng: np.random.Generator) -> str:
    """One of the category's names that are not held out."""
    entry = CATEGORIES[category]
    others = [single for single, _ in entry.synonyms if single not in held_out]
    draw, choice = rng.random(2)
    return (
        entry.name if not others or draw < _FIRST_NAME_RATE else others[int(choice * len(others))]
    )


def crop(image: np.ndarray, box: np.ndarray, size: int, margin: float) -> np.ndarray:
    """uint8 [size, size, 3]: the square around a box, with `margin` of its side on each side.

    The square lies within the image: it is moved, and cut to the image's shorter side.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(value) for value in box)
    side = min(height, width, max(1, round(max(x2 - x1, y2 - y1) * (1 + 2 * margin))))
    left = min(max(0, round((x1 + x2 - side) / 2)), width - side)
    top = min(max(0, round((y1 + y2 - side) / 2)), height - side)
    return resize(np.ascontiguousarray(image[top : top + side, left : left + side]), size)


def write_regions(
    path: str | Path,
    images: Iterable[RegionImage],
    encode: Encode,
    *,
    size: int,
    margin: float = 0.5,
    batch_size: int = 256,
    made_of: Mapping[str, Any] | None = None,
) -> None:
    """Writes the labelled regions of images, for `LabelledRegions` and `CaptionedRegions`.

    Args:
      path: an npz file; it is there whole or not at all.
      images: with boxes and words.
      encode: uint8 [batch_size, size, size, 3] -> floating [batch_size, D]; the last batch is
        filled up with zeros, so that one shape is compiled.
      size: S, side of the crops in pixels.
      margin: of the crops, see `crop`.
      batch_size: crops that are encoded at a time.
      made_of: kept with the regions, see `is_made_of`.

    Raises:
      UserError: there is no box, features are no finite numbers [b, D], boxes have different
        numbers of words, or the file cannot be written.
    """
    features, pending = [], []
    ids: list[str] = []
    boxes, words = [], []

    def flush() -> None:
        batch = np.zeros((batch_size, size, size, 3), np.uint8)
        batch[: len(pending)] = pending
        found = np.asarray(encode(batch))
        if found.ndim != 2 or len(found) != batch_size or not np.isfinite(found).all():
            raise UserError(
                f"the encoder's features {found.dtype} {list(found.shape)} are not finite numbers "
                f"[{batch_size}, D]"
            )
        features.append(found[: len(pending)])
        pending.clear()

    for item in images:
        ids += [item.name] * len(item.boxes)
        boxes.append(item.boxes)
        words += item.words
        for box in item.boxes:
            pending.append(crop(item.image, box, size, margin))
            if len(pending) == batch_size:
                flush()
    if pending:
        flush()
    if not features:
        raise UserError(f"{path}: the images have no boxes")
    if len({len(own) for own in words}) > 1 or len(words) != len(ids):
        raise UserError(f"{path}: boxes have different numbers of words")
    corners = np.concatenate(boxes)
    save_arrays(
        Path(path).expanduser(),
        "choose another folder",
        features=np.concatenate(features),
        words=np.asarray(words, str),
        image_ids=np.asarray(ids, str),
        boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
        made_of=np.asarray(_digest(made_of)),
    )


def is_made_of(path: str | Path, made_of: Mapping[str, Any]) -> bool:
    """Whether a file of `write_regions` is there and was made of just this."""
    try:
        with Path(path).expanduser().open("rb") as file, np.load(file) as archive:
            return str(archive["made_of"]) == _digest(made_of)
    except Exception:  # noqa: BLE001 (not there, or damaged in whatever way: it is made anew)
        return False


def _digest(made_of: Mapping[str, Any] | None) -> str:
    """SHA-256 of what regions are made of."""
    text = json.dumps(made_of, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON lacks, in one spelling: sets are sorted."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)

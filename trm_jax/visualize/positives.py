"""Pictures of mined positives: which other examples a model takes for an anchor's own kind.

The picture is that of "Self-guided semantic alignment for text supervised segmentation" (SimCon),
Fig. 7.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from trm_jax.types import UserError
from trm_jax.visualize import style

_SIDE, _GAP, _GUTTER, _EDGE = 1.15, 0.14, 0.42, 0.18  # inches
_HEAD, _TITLE, _COSINE = 0.34, 0.27, 0.17  # inches
_CHARACTERS, _LINES, _LINE = 22, 4, 0.125  # of a caption; inches a line
_LOOK: dict[Any, Any] = style.RC | {"axes.grid": False}
_BY_IMAGE, _BY_TEXT = style.COLOURS[5], style.COLOURS[6]


class Mined(NamedTuple):
    """Positives of one modality: indices [k] and their cosines [k], the highest first."""

    indices: np.ndarray
    cosines: np.ndarray


class Anchor(NamedTuple):
    """One row of the picture: the example `index`, its image positives and its text positives."""

    index: int
    by_image: Mined
    by_text: Mined


def mine(embeddings: Float[np.ndarray, "n d"], anchor: int, threshold: float) -> Mined:
    """The positives P_i of one anchor but itself: cosines of at least `threshold`, highest first.

    Args:
        embeddings: [n, d] of one modality; scaled to unit norm here. A zero vector has cosine 0.
        anchor: index of the anchor.
        threshold: lambda, a cosine.

    Returns:
        Indices and cosines; of equal cosines the earlier example comes first.
    """
    unit = _unit(embeddings)
    cosines = unit @ unit[anchor]
    order = np.argsort(-cosines, kind="stable")
    kept = order[(cosines[order] >= threshold) & (order != anchor)]
    return Mined(kept, cosines[kept])


def choose_anchors(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n e"], threshold: float, count: int
) -> list[int]:
    """Up to `count` examples worth a look, as unlike each other as possible.

    Those with both image and text positives, or, if there are none, with one of them; the first
    is the first such example, each next one the farthest from those before it: the one whose
    highest image cosine with them is the lowest.

    Args:
        images, texts: embeddings [n, d] and [n, e] of the same examples.
        threshold: lambda, a cosine.
        count: how many.

    Returns:
        Indices; [] if no example has a positive.
    """
    unit = _unit(images)
    found = np.stack([_has_positive(unit, threshold), _has_positive(_unit(texts), threshold)])
    able = np.flatnonzero(found.all(axis=0) if found.all(axis=0).any() else found.any(axis=0))
    chosen: list[int] = []
    nearest = np.full(len(able), -np.inf)
    while len(chosen) < min(count, len(able)):
        place = int(nearest.argmin())
        chosen.append(int(able[place]))
        nearest = np.maximum(nearest, unit[able] @ unit[chosen[-1]])
        nearest[place] = np.inf
    return chosen


def render_positives(
    anchors: Sequence[Anchor],
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    path: str | Path,
    top_k: int = 4,
    note: str = "",
    dpi: int = 160,
) -> Path:
    """Writes one PNG with a row for each anchor.

    A row shows the anchor with its caption, then the `top_k` most similar image positives, then
    the `top_k` most similar text positives, each with its cosine and its caption, and above them
    how many there are. An example that is a positive by both has a frame in both places.

    Args:
        anchors: the rows.
        images: [H, W, 3] uint8 RGB; the indices of `anchors` point into it and into `captions`.
        captions: one text for each image.
        path: the file to write; missing folders are made.
        top_k: positives shown of each modality.
        note: printed at the top right, such as the threshold.
        dpi: pixels per inch; an image is 1.15 inches wide.

    Returns:
        `path`.

    Raises:
        UserError: no anchor is given, or an index that no image or caption has.
    """
    _check(anchors, len(images), len(captions))
    with matplotlib.rc_context(_LOOK):
        block = top_k * _SIDE + (top_k - 1) * _GAP
        lefts = (_EDGE, _EDGE + _SIDE + _GUTTER, _EDGE + _SIDE + 2 * _GUTTER + block)
        tall = [_height(anchor, captions, top_k) for anchor in anchors]
        width, height = lefts[2] + block + _EDGE, _HEAD + sum(tall) + 0.2
        figure = style.new_figure(width, height, layout=None)
        _words(figure, _EDGE, 0.12, "Mined positives", fontsize=11, weight="bold")
        _words(figure, width - _EDGE, 0.14, note, fontsize=8.5, color="0.35", ha="right")
        footer = "thick frame: positive by image and by text; bold: cosine with the anchor"
        _words(figure, width - _EDGE, height - 0.2, footer, fontsize=7, color="0.4", ha="right")
        for number, anchor in enumerate(anchors):
            top = _HEAD + sum(tall[:number])
            _words(figure, lefts[0], top + 0.08, "anchor", fontsize=8.5, weight="bold")
            _picture(figure, (lefts[0], top + _TITLE), images[anchor.index], "0.1", 1.6)
            _caption(figure, lefts[0], top + _TITLE + _SIDE + 0.05, captions[anchor.index])
            both = np.intersect1d(anchor.by_image.indices, anchor.by_text.indices)
            for left, name, mined, colour in (
                (lefts[1], "image", anchor.by_image, _BY_IMAGE),
                (lefts[2], "text", anchor.by_text, _BY_TEXT),
            ):
                _rule(figure, left, top + 0.25, block, colour)
                title = _count(name, len(mined.indices), top_k)
                _words(figure, left, top + 0.08, title, fontsize=8.5, color=colour, weight="bold")
                for place, index in enumerate(int(i) for i in mined.indices[:top_k]):
                    x, y = left + place * (_SIDE + _GAP), top + _TITLE
                    frame = (colour, 2.2) if index in both else ("0.7", 0.6)
                    _picture(figure, (x, y), images[index], *frame)
                    cosine = f"{mined.cosines[place]:.3f}"
                    _words(figure, x, y + _SIDE + 0.04, cosine, fontsize=8, weight="bold")
                    _caption(figure, x, y + _SIDE + _COSINE + 0.03, captions[index])
        return style.save(figure, path, dpi)


def _height(anchor: Anchor, captions: Sequence[str], top_k: int) -> float:
    """Inches of a row with the longest of its captions."""
    shown = [*anchor.by_image.indices[:top_k], *anchor.by_text.indices[:top_k]]
    lines = max([len(_wrapped(captions[int(i)])) for i in shown], default=0)
    # The anchor's own has no cosine above it.
    lines = max(lines, len(_wrapped(captions[anchor.index])) - 1)
    return _TITLE + _SIDE + _COSINE + 0.16 + lines * _LINE


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _CHARACTERS, max_lines=_LINES, placeholder=" …")


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit norm in double precision; a zero row stays zero."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _has_positive(unit: np.ndarray, threshold: float) -> np.ndarray:
    """[n] bool: whether another example is similar enough."""
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return cosines.max(axis=1) >= threshold


def _check(anchors: Sequence[Anchor], images: int, captions: int) -> None:
    if not anchors:
        raise UserError("there is no anchor to draw: no pair is as similar as the threshold")
    used = np.concatenate([[a.index, *a.by_image.indices, *a.by_text.indices] for a in anchors])
    if used.min() < 0 or used.max() >= min(images, captions):
        raise UserError(
            f"anchors name example {int(used.max())}, but there are {images} images and "
            f"{captions} captions"
        )


def _count(name: str, found: int, shown: int) -> str:
    """ "12 image positives, the nearest 4"."""
    text = f"{found or 'no'} {name} positive{'' if found == 1 else 's'}"
    return f"{text}, the nearest {shown}" if found > shown else text


def _words(figure: Figure, left: float, top: float, text: str, *, ha: str = "left", **look) -> None:
    """Text whose upper edge is `top` inches below the figure's, without maths in it."""
    width, height = figure.get_size_inches()
    options: dict[str, Any] = {"va": "top", "parse_math": False, **look}
    figure.text(left / width, 1 - top / height, text, ha=ha, **options)


def _caption(figure: Figure, left: float, top: float, text: str) -> None:
    """A caption in a few short lines."""
    lines = "\n".join(_wrapped(text))
    _words(figure, left, top, lines, fontsize=6.8, color="0.25", linespacing=1.1)


def _rule(figure: Figure, left: float, top: float, length: float, colour: str) -> None:
    """A thin line over a block."""
    width, height = figure.get_size_inches()
    y = 1 - top / height
    figure.add_artist(
        Line2D([left / width, (left + length) / width], [y, y], color=colour, linewidth=0.9)
    )


def _picture(figure: Figure, corner: tuple[float, float], image, colour: str, frame: float) -> None:
    """An image in a square of its own, as large as its sides allow, with a frame."""
    width, height = figure.get_size_inches()
    left, top = corner
    tall, wide = image.shape[:2]
    across, down = _SIDE * min(1.0, wide / tall), _SIDE * min(1.0, tall / wide)
    x, y = left + (_SIDE - across) / 2, top + (_SIDE - down) / 2
    axis = figure.add_axes((x / width, 1 - (y + down) / height, across / width, down / height))
    axis.imshow(image, interpolation="antialiased", aspect="auto")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=frame)

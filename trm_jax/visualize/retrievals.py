"""What a matching model retrieves: images for captions and captions for images, hits and misses."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from trm_jax.visualize import style

_HIT, _MISS, _UNKNOWN = "#0B7A3B", "#B8321F", "0.6"
_MARKS = {True: "✓", False: "✗", None: ""}
_COLOURS = {True: _HIT, False: _MISS, None: _UNKNOWN}
_PANEL = 1.35  # inches


class FoundImage(NamedTuple):
    """image: [H, W, 3] uint8 RGB; hit: whether the caption is its own, None if nobody knows."""

    image: np.ndarray
    score: float
    hit: bool | None


class FoundText(NamedTuple):
    """One caption of a ranking; see FoundImage."""

    text: str
    score: float
    hit: bool | None


def render_images(
    rows: Sequence[tuple[str, Mapping[str, Sequence[FoundImage]]]], *, path: str | Path
) -> Path:
    """Writes one PNG: a row for each caption, its best images from left to right.

    Args:
      rows: (caption, model name -> its images, best first); every row names the same models, and
        each model has a block of columns. At least one row.
      path: the file to write; missing folders are made.
    """
    names = list(rows[0][1])
    count = max(len(found) for _, models in rows for found in models.values())
    widths = [1.5]
    for _ in names:
        widths += [1.0] * count
    with matplotlib.rc_context(style.RC):
        figure = style.new_figure(_PANEL * (1.5 + len(names) * count), (_PANEL + 0.12) * len(rows))
        grid = figure.add_gridspec(len(rows), len(widths), width_ratios=widths)
        for line, (caption, models) in enumerate(rows):
            axes = figure.add_subplot(grid[line, 0])
            axes.axis("off")
            text = textwrap.fill(caption, 24)
            axes.text(0.0, 0.5, text, va="center", fontsize=8, transform=axes.transAxes)
            for block, name in enumerate(names):
                for place, found in enumerate(models[name]):
                    axes = figure.add_subplot(grid[line, 1 + block * count + place])
                    _picture(axes, found)
                    if line == 0 and place == 0 and len(names) > 1:
                        axes.set_title(name, fontsize=9, loc="left")
        return style.save(figure, path, 130)


def render_texts(
    rows: Sequence[tuple[np.ndarray, Mapping[str, Sequence[FoundText]]]], *, path: str | Path
) -> Path:
    """Writes one PNG: a row for each image, its best captions beside it.

    Args:
      rows: (image [H, W, 3] uint8 RGB, model name -> its captions, best first); at least one row,
        every row names the same models.
      path: the file to write; missing folders are made.
    """
    names = list(rows[0][1])
    widths = [1.0, *[3.0] * len(names)]
    with matplotlib.rc_context(style.RC):
        figure = style.new_figure(1.8 * sum(widths), 1.9 * len(rows))
        grid = figure.add_gridspec(len(rows), len(widths), width_ratios=widths)
        for line, (image, models) in enumerate(rows):
            axes = figure.add_subplot(grid[line, 0])
            _bare(axes, image)
            for block, name in enumerate(names):
                axes = figure.add_subplot(grid[line, 1 + block])
                axes.axis("off")
                if line == 0 and len(names) > 1:
                    axes.set_title(name, fontsize=9, loc="left")
                for place, found in enumerate(models[name]):
                    height = 1.0 - (place + 0.5) / len(models[name])
                    words = textwrap.shorten(found.text, 62, placeholder=" ...")
                    axes.text(
                        0.0,
                        height,
                        f"{_MARKS[found.hit]} {found.score:.3f}  {words}".strip(),
                        color=_COLOURS[found.hit] if found.hit is not None else "0.1",
                        va="center",
                        fontsize=8,
                        transform=axes.transAxes,
                    )
        return style.save(figure, path, 130)


def attention_map(
    weights: np.ndarray, image_size: tuple[int, int], boxes: np.ndarray | None = None
) -> np.ndarray:
    """How much of a word's attention lies where, as a map [h, w] for visualize/regions.py.

    Args:
      weights: [r] over the regions of an image, >= 0.
      image_size: (height, width) in pixels.
      boxes: [r, 4] x1, y1, x2, y2 in pixels: a pixel has the weights of all boxes on it. None: the
        regions are a square grid in row order, and the map is that grid.

    Raises:
      ValueError: without boxes, r is no square.
    """
    if boxes is None:
        side = int(len(weights) ** 0.5)
        if side * side != len(weights):
            raise ValueError(f"{len(weights)} regions without boxes are no square grid")
        return np.asarray(weights, np.float32).reshape(side, side)
    found = np.zeros(image_size, np.float32)
    for weight, (left, top, right, bottom) in zip(weights, np.asarray(boxes), strict=True):
        found[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] += weight
    return found


def _picture(axes: Axes, found: FoundImage) -> None:
    """An image in the colour of a hit or a miss, with the mark, so that no colour need be seen."""
    _bare(axes, found.image)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(_COLOURS[found.hit])
        spine.set_linewidth(2.5)
    axes.set_xlabel(f"{_MARKS[found.hit]} {found.score:.3f}".strip(), fontsize=7, labelpad=1)


def _bare(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])

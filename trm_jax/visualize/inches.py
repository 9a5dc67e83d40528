"""Text and pictures at places in inches from a figure's upper left corner."""

from typing import Any

import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from matplotlib.textpath import text_to_path

_POINTS = 72.0
_FAMILY = "DejaVu Sans"


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Inches that a line of text takes in DejaVu Sans of `size` points."""
    font = FontProperties(family=_FAMILY, size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / _POINTS


def fitted(text: str, room: float, size: float, weight: str = "normal") -> str:
    """The text, its end replaced by an ellipsis where it is wider than `room` inches."""
    if text_width(text, size, weight) <= room:
        return text
    while text and text_width(text + "…", size, weight) > room:
        text = text[:-1]
    return text.rstrip() + "…"


def write(figure: Figure, left: float, top: float, text: str, **look: Any) -> Text:
    """Text without maths in it; `top` is its upper edge unless `look` has another `va`."""
    width, height = figure.get_size_inches()
    options: dict[str, Any] = {"va": "top", "ha": "left", "parse_math": False, **look}
    return figure.text(left / width, 1 - top / height, text, **options)


def line(
    figure: Figure, start: tuple[float, float], end: tuple[float, float], **look: Any
) -> Line2D:
    """A straight line between two places (left, top)."""
    width, height = figure.get_size_inches()
    xs, ys = zip(start, end, strict=True)
    drawn = Line2D([x / width for x in xs], [1 - y / height for y in ys], **look)
    figure.add_artist(drawn)
    return drawn


def block(
    figure: Figure, left: float, top: float, width: float, height: float, colour: Any, **look: Any
) -> FancyBboxPatch:
    """A filled rectangle with square corners, below all text."""
    across, down = figure.get_size_inches()
    place = (left / across, 1 - (top + height) / down)
    options: dict[str, Any] = {"linewidth": 0, "zorder": -1, "facecolor": colour, **look}
    drawn = FancyBboxPatch(
        place,
        width / across,
        height / down,
        boxstyle="square,pad=0",
        transform=figure.transFigure,
        **options,
    )
    figure.add_artist(drawn)
    return drawn


def picture(
    figure: Figure,
    place: tuple[float, float, float, float],
    image: np.ndarray,
    *,
    colour: Any = "0.7",
    frame: float = 0.6,
) -> Axes:
    """An image in the middle of (left, top, width, height), as large as its sides allow.

    Args:
        figure: to draw in.
        place: in inches.
        image: [H, W, 3] uint8 RGB.
        colour: of the frame.
        frame: its width in points, 0 for none.
    """
    across, down = figure.get_size_inches()
    left, top, width, height = place
    tall, wide = image.shape[:2]
    scale = min(width / wide, height / tall)
    x, y = left + (width - scale * wide) / 2, top + (height - scale * tall) / 2
    axes = figure.add_axes(
        (x / across, 1 - (y + scale * tall) / down, scale * wide / across, scale * tall / down)
    )
    axes.imshow(image, extent=(0, wide, tall, 0), interpolation="antialiased", aspect="auto")
    axes.grid(visible=False)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=frame > 0, color=colour, linewidth=frame)
    return axes


def outline(width: float, colour: Any) -> list[matplotlib.patheffects.AbstractPathEffect]:
    """An edge of `width` points in `colour` around lines or letters, seen on any ground."""
    return [matplotlib.patheffects.withStroke(linewidth=width, foreground=colour)]

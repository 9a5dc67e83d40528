"""Segmentation pictures: which class a model gave to each pixel, as one PNG per image."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from trm_jax.types import UserError
from trm_jax.visualize import style

_PANEL, _TALLEST, _NARROWEST = 3.0, 4.5, 1.7  # inches
_GAP, _HEAD, _LINE, _SWATCH = 0.12, 0.30, 0.21, 0.13  # inches
_LONGEST_NAME = 28
_GREY = "0.35"
_LOOK: dict[Any, Any] = style.RC | {"axes.grid": False}
_NOT_COUNTED = (150, 150, 150)
_FIRST = (62.0, 54.0, 45.0)  # the first class's colour in CIELAB, an orange


def render_segmentation(
    image: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    path: str | Path,
    truth: np.ndarray | None = None,
    top_k: int = 30,
    alpha: float = 0.65,
    dpi: int = 160,
) -> Path:
    """Writes one PNG: the image, the prediction over it, the truth over it, and a legend.

    The legend lists the classes of the picture, the largest first, with their share of all pixels.

    Args:
        image: [H, W, 3] uint8 RGB.
        labels: [H, W] int: the class of every pixel, -1 background.
        class_names: C names; a class has the same colour in every picture.
        path: the file to write; missing folders are made.
        truth: [H, W] int as `labels`, -2 not counted; adds a panel, shares and the pixel accuracy.
        top_k: classes in the legend; it says how many more there are.
        alpha: opacity of the colours.
        dpi: pixels per inch; a panel is 3 inches wide, less if the image is tall.

    Returns:
        `path`.

    Raises:
        UserError: a wrong shape or type, or a label that is no class.
    """
    _check(image, labels, len(class_names), "labels", lowest=-1)
    panels = [("input", "", None), ("prediction", "", labels)]
    if truth is not None:
        _check(image, truth, len(class_names), "truth", lowest=-2)
        panels[1] = ("prediction", _accuracy(labels, truth), labels)
        panels.append(("truth", "", truth))
    aspect = image.shape[0] / image.shape[1]
    across = min(_PANEL, max(_NARROWEST, _TALLEST / aspect))
    size = (max(round(across * dpi), 1), max(round(across * dpi * aspect), 1))
    shrinks = size[0] < image.shape[1]
    large = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    entries, more = _entries(labels, truth, class_names, top_k)
    with matplotlib.rc_context(_LOOK):
        width = len(panels) * (across + _GAP) + _GAP
        columns, step = _columns(entries, width - 2 * _GAP)
        rows = -(-len(entries) // columns) + bool(more)
        top = _HEAD + across * aspect
        figure = style.new_figure(width, top + 2 * _GAP + rows * _LINE, layout=None)
        for number, (title, note, drawn) in enumerate(panels):
            shown = large if drawn is None else overlay(large, _sized(drawn, size), alpha=alpha)
            _panel(figure, _GAP + number * (across + _GAP), across, aspect, shown, title, note)
        _legend(figure, entries, more, top + _GAP, columns, step)
        return style.save(figure, path, dpi)


def overlay(image: np.ndarray, labels: np.ndarray, *, alpha: float = 0.65) -> np.ndarray:
    """The image under the colours of its classes, [H, W, 3] uint8; the background is untouched.

    The image is turned grey below a colour, so that it does not tint it. Regions have an opaque
    edge in their colour. What is not counted (-2) is grey.

    Args:
        image: [H, W, 3] uint8 RGB.
        labels: [H, W] int: a class, -1 background, -2 not counted.
        alpha: opacity of the colours.
    """
    # Rows 0 and 1 stand for -2 and -1.
    table = np.concatenate([[_NOT_COUNTED, (0, 0, 0)], colours(max(int(labels.max()) + 1, 1))])
    colour = table[labels + 2].astype(np.float32)
    cross = np.ones((3, 3), np.uint8)
    values = labels.astype(np.int16)
    edge = cv2.dilate(values, cross) != cv2.erode(values, cross)
    opacity = np.where(edge & (labels >= 0), 1.0, alpha) * (labels != -1)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    under = np.where((labels == -1)[..., None], image, grey[..., None])
    mixed = (1.0 - opacity[..., None]) * under + opacity[..., None] * colour
    return np.round(mixed).astype(np.uint8)


def colours(classes: int) -> np.ndarray:
    """uint8 [classes, 3] RGB: the colour of class i depends on i alone.

    Each colour is the one farthest (in CIELAB) from all before it, among some 750 that are neither
    pale, dark nor grey; beyond these they repeat.
    """
    palette = _palette()
    return palette[np.arange(classes) % len(palette)]


@functools.cache
def _palette() -> np.ndarray:
    """uint8 [about 750, 3], see `colours`."""
    steps = np.linspace(0.0, 1.0, 11, dtype=np.float32)
    rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = cv2.cvtColor(rgb[None], cv2.COLOR_RGB2Lab)[0]
    lightness, chroma = lab[:, 0], np.linalg.norm(lab[:, 1:], axis=1)
    strong = (lightness > 35) & (lightness < 88) & (chroma > 40)
    rgb, lab = rgb[strong], lab[strong]
    chosen = [int(np.linalg.norm(lab - _FIRST, axis=1).argmin())]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < len(lab):
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return np.round(255.0 * rgb[chosen]).astype(np.uint8)


def _check(image: np.ndarray, labels: np.ndarray, classes: int, name: str, *, lowest: int) -> None:
    """Raises UserError unless `labels` are classes of the pixels of `image`."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"the picture is {image.dtype}{list(image.shape)}, not uint8 [H, W, 3]")
    if labels.shape != image.shape[:2] or labels.dtype.kind not in "iu":
        raise UserError(
            f"the {name} are {labels.dtype}{list(labels.shape)}, not integers "
            f"{list(image.shape[:2])} like the picture"
        )
    if labels.min() < lowest or labels.max() >= classes:
        raise UserError(f"the {name} must lie in {lowest}..{classes - 1}, the classes")


def _accuracy(labels: np.ndarray, truth: np.ndarray) -> str:
    """What share of the counted pixels is right, in words."""
    counted = truth != -2
    return f"{100 * (labels == truth)[counted].mean():.0f} % right" if counted.any() else ""


def _sized(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`labels` at `size` (width, height), without mixing classes."""
    return cv2.resize(labels.astype(np.int16), size, interpolation=cv2.INTER_NEAREST_EXACT)


def _entries(
    labels: np.ndarray, truth: np.ndarray | None, class_names: Sequence[str], top_k: int
) -> tuple[list[tuple], int]:
    """([(colour, name, note)], how many more classes): the largest first."""
    maps = [labels] if truth is None else [labels, truth]
    shares = np.stack([np.bincount(m[m >= 0], minlength=len(class_names)) / m.size for m in maps])
    order = np.argsort(-shares.max(axis=0), kind="stable")
    present = [int(c) for c in order if shares[:, c].any()]
    entries = []
    for c in present[:top_k]:
        name = str(class_names[c])
        name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
        percent = [_percent(share) for share in shares[:, c]]
        note = percent[0] if truth is None else f"{percent[0]}, truth {percent[1]}"
        entries.append((colours(c + 1)[c] / 255.0, name, note))
    if truth is not None and (truth == -2).any():
        entries.append((np.array(_NOT_COUNTED) / 255.0, "not counted", ""))
    if not entries:
        entries.append((None, "background only", ""))
    return entries, max(len(present) - top_k, 0)


def _percent(share: float) -> str:
    """12 %, <1 % or 0 %."""
    return "<1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _columns(entries: Sequence[tuple], width: float) -> tuple[int, float]:
    """(columns of the legend, inches from one to the next), so that every text fits."""
    figure = style.new_figure(1.0, 1.0, layout=None)
    renderer = FigureCanvasAgg(figure).get_renderer()
    widest = 0.0
    for _, name, note in entries:
        text = figure.text(0, 0, f"{name}  {note}", fontsize=8.5, parse_math=False)
        widest = max(widest, text.get_window_extent(renderer).width / figure.dpi)
    step = _SWATCH + 0.07 + widest + 0.18
    columns = max(1, min(int((width + 0.18) / step), len(entries)))
    return columns, step


def _panel(
    figure: Figure, left: float, across: float, aspect: float, image: np.ndarray, title: str, note
) -> None:
    """One frameless image with its title, `left` inches from the left edge."""
    width, height = figure.get_size_inches()
    tall = across * aspect
    place = (left / width, 1.0 - (_HEAD + tall) / height, across / width, tall / height)
    axis = figure.add_axes(place)
    axis.imshow(image, interpolation="antialiased", aspect="auto")
    axis.set_axis_off()
    above = 1.0 + 0.05 / tall
    options = {"va": "bottom", "transform": axis.transAxes}
    axis.text(0.0, above, title, ha="left", fontsize=9.5, **options)
    axis.text(1.0, above, note, ha="right", fontsize=8, color=_GREY, **options)


def _legend(
    figure: Figure, entries: Sequence[tuple], more: int, top: float, columns: int, step: float
) -> None:
    """Swatches and names in rows, `top` inches from the upper edge."""
    width, height = figure.get_size_inches()
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    for number, (colour, name, note) in enumerate(entries):
        row, column = divmod(number, columns)
        x, y = _GAP + column * step, top + (row + 0.5) * _LINE
        if colour is not None:
            corner = (x, y - _SWATCH / 2)
            axis.add_patch(Rectangle(corner, _SWATCH, _SWATCH, facecolor=colour, linewidth=0))
            x += _SWATCH + 0.07
        text = axis.text(x, y, name, fontsize=8.5, va="center_baseline", parse_math=False)
        axis.annotate(
            note, (1, 0), xycoords=text, xytext=(4, 0), textcoords="offset points",
            fontsize=8.5, color=_GREY, va="bottom",
        )  # fmt: skip
    if more:
        y = height - _GAP - 0.5 * _LINE
        axis.text(_GAP, y, f"and {more} more", fontsize=8.5, color=_GREY, va="center_baseline")

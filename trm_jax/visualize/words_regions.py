"""Which region of an image fits each word of a caption best: what a matcher by prototypes sees."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from trm_jax.types import UserError
from trm_jax.visualize import caption_text, inches, segmentation, style
from trm_jax.visualize.caption_text import Part

_EDGE, _GAP = 0.18, 0.22  # inches
_CAPTION, _CAPTION_LINES = 11.0, 5  # points
_WIDE, _HIGH, _NARROW = 4.6, 4.8, 2.2  # inches of the image
_ROW, _CROP, _COLUMN, _BAR = 0.44, 0.40, 3.0, 1.0  # inches of the list
_ROWS, _WORDS = 12, 36  # of a column, of the list
_FOOT = 0.34
_LOOK: dict[Any, Any] = style.RC | {"axes.grid": False}


class _Word(NamedTuple):
    """A row of the list: a word, how often the caption has it, and its best region."""

    text: str
    kind: str
    times: int
    region: int
    cosine: float


def grid_boxes(side: int, image_size: tuple[int, int]) -> Float[np.ndarray, "regions 4"]:
    """The cells of a square grid as boxes, in row order, as dense features have them.

    Args:
        side: cells along each side.
        image_size: (height, width) in pixels.

    Returns:
        [side^2, 4] x1, y1, x2, y2 in pixels.
    """
    rows, columns = np.divmod(np.arange(side * side), side)
    corners = np.stack([columns, rows, columns + 1, rows + 1], axis=1) / side
    return corners * np.array([image_size[1], image_size[0]] * 2, float)


def render_words(
    image: np.ndarray,
    parts: Sequence[Part],
    regions: Int[np.ndarray, " J"],
    cosines: Float[np.ndarray, " J"],
    *,
    path: str | Path,
    boxes: Num[np.ndarray, "r 4"] | None = None,
    note: str = "",
    dpi: int = 160,
) -> Path:
    """Writes one PNG: the caption, the image with the regions of its words, and a list of them.

    In the caption a word has the colour of its region behind it; words outside the knowledge are
    underlined, words that are not scored are grey. The list has each distinct word once, in the
    caption's order, with its region cut out and their cosine. Below it is the score of the pair,
    the mean of the cosines over all words, repeats included.

    Args:
        image: [H, W, 3] uint8 RGB.
        parts: the caption, of `caption_text.parts`; J of them are used.
        regions: [J], the best region of each used part, from 0.
        cosines: [J], its cosine with the word's prototype.
        path: the file to write; missing folders are made.
        boxes: x1, y1, x2, y2 in pixels of `image`, of all its regions; see `grid_boxes`. Without
            them regions have a number alone.
        note: printed at the bottom right, such as the image's name.
        dpi: pixels per inch.

    Returns:
        `path`.

    Raises:
        UserError: a wrong shape or type, a region without a box or a cosine that is not finite.
    """
    used = [number for number, part in enumerate(parts) if part.is_used]
    _check(image, regions, cosines, boxes, len(used))
    words = _distinct([parts[number] for number in used], regions, cosines)
    shown = words[:_WORDS]
    order = list(dict.fromkeys(word.region for word in shown))
    table = segmentation.colours(max(len(order), 1)) / 255
    colours = {region: tuple(map(float, table[n])) for n, region in enumerate(order)}
    columns = max(1, -(-len(shown) // _ROWS))
    across, down = _image_size(image, columns)
    width = max(across + columns * (_COLUMN + _GAP), 6.0) + 2 * _EDGE
    pieces = caption_text.layout(parts, width - 2 * _EDGE, size=_CAPTION, lines=_CAPTION_LINES)
    top = _EDGE + caption_text.height(pieces, _CAPTION) + 0.14
    rows = -(-len(shown) // columns)
    height = top + max(down, rows * _ROW) + _FOOT
    grounds = {
        number: (*colours[int(region)], 0.3)
        for number, region in zip(used, regions, strict=True)
        if int(region) in colours
    }
    with matplotlib.rc_context(_LOOK):
        figure = style.new_figure(width, height, layout=None)
        caption_text.draw(figure, _EDGE, _EDGE, parts, pieces, size=_CAPTION, grounds=grounds)
        axes = inches.picture(figure, (_EDGE, top, across, down), image)
        if boxes is not None:
            _outline(figure, axes, {region: boxes[region] for region in order}, colours)
        cut = {r: _cropped(image, boxes[r]) for r in order} if boxes is not None else {}
        _list(figure, _EDGE + across + _GAP, top, rows, shown, colours, cut)
        note = note if cut or not order else f"regions without boxes   {note}"
        _foot(figure, parts, words, cosines, note)
        return style.save(figure, path, dpi)


def _check(
    image: np.ndarray,
    regions: np.ndarray,
    cosines: np.ndarray,
    boxes: np.ndarray | None,
    used: int,
) -> None:
    """Raises UserError unless the arguments describe a picture."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"the picture is {image.dtype}{list(image.shape)}, not uint8 [H, W, 3]")
    if not len(regions) == len(cosines) == used:
        raise UserError(
            f"the caption has {used} scored words, but there are {len(regions)} best regions and "
            f"{len(cosines)} cosines; give one of each for every word, repeats included"
        )
    if not np.isfinite(cosines).all():
        raise UserError("a cosine of a word with its region is not finite; check the features")
    if boxes is None:
        return
    wrong = regions[(regions < 0) | (regions >= len(boxes))]
    if len(wrong):
        raise UserError(
            f"a word's region is {int(wrong[0])}, but the image has {len(boxes)} boxes; give the "
            "boxes of all its regions"
        )


def _distinct(used: Sequence[Part], regions: np.ndarray, cosines: np.ndarray) -> list[_Word]:
    """Each word once, as it is written first.

    A word decides its region and cosine. So "Man" and "man" are one word if these agree, and two
    if the word vectors have both.
    """
    words: dict[tuple[str, int, float], _Word] = {}
    for part, region, cosine in zip(used, regions, cosines, strict=True):
        key = (part.text.lower(), int(region), float(cosine))
        word = words.get(key, _Word(part.text, part.kind, 0, key[1], key[2]))
        words[key] = word._replace(times=word.times + 1)
    return list(words.values())


def _image_size(image: np.ndarray, columns: int) -> tuple[float, float]:
    """Width and height of the image in inches: wide beside a short list, never too tall."""
    aspect = image.shape[0] / image.shape[1]
    across = max(_NARROW, min(_WIDE if columns < 3 else 3.6, _HIGH / aspect))
    return across, min(across * aspect, 1.6 * _HIGH)


def _outline(
    figure: Figure, axes: Axes, boxes: dict[int, np.ndarray], colours: dict[int, Any]
) -> None:
    """Boxes in their colours with a number at a corner; numbers move along the edge to be seen."""
    wide, tall = axes.get_xlim()[1], axes.get_ylim()[0]
    per_inch = wide / (axes.get_position().width * figure.get_size_inches()[0])
    chip_high = 0.15 * per_inch
    taken: list[tuple[float, float, float]] = []
    # Large ones first, so that small ones lie on top.
    for region in sorted(boxes, key=lambda region: -_area(boxes[region])):
        x0, y0, x1, y1 = (float(v) for v in boxes[region])
        box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, linewidth=2.0)
        box.set(edgecolor=colours[region], path_effects=inches.outline(3.4, "white"))
        axes.add_patch(box)
        chip_wide = (0.06 + inches.text_width(str(region), 7.5, "bold")) * per_inch
        x, y = max(0.0, min(x0, wide - chip_wide)), max(0.0, min(y0, tall - chip_high))
        while any(
            abs(y - up) < chip_high and x < left + broad and left < x + chip_wide
            for left, up, broad in taken
        ):
            x += 0.2 * chip_wide
            if x + chip_wide > wide:
                x, y = max(0.0, x0), y + 0.5 * chip_high
        taken.append((x, y, chip_wide))
        chip = Rectangle((x, y), chip_wide, chip_high, linewidth=0.6, edgecolor="white", zorder=5)
        chip.set_facecolor(colours[region])
        axes.add_patch(chip)
        axes.text(x + chip_wide / 2, y + chip_high / 2, str(region), ha="center", va="center",
                  fontsize=7.5, weight="bold", color=_ink(colours[region]), zorder=6)  # fmt: skip


def _list(
    figure: Figure,
    left: float,
    top: float,
    rows: int,
    words: Sequence[_Word],
    colours: dict[int, Any],
    cut: dict[int, np.ndarray],
) -> None:
    """Rows of region (cut out, if its box is known), word, bar and cosine."""
    low = min([0.0, *(word.cosine for word in words)])
    high = max([1e-6, *(word.cosine for word in words)])
    for place, word in enumerate(words):
        column, row = divmod(place, rows)
        x, y = left + column * (_COLUMN + _GAP), top + row * _ROW
        middle = y + _CROP / 2
        colour = colours[word.region]
        if cut:
            place_of_cut = (x, y, _CROP, _CROP)
            inches.picture(figure, place_of_cut, cut[word.region], colour=colour, frame=1.6)
        chip = x + (_CROP + 0.08 if cut else 0.0)
        inches.block(figure, chip, middle - 0.085, 0.24, 0.17, colour)
        number = {"fontsize": 7.5, "weight": "bold", "color": _ink(colour), "ha": "center"}
        inches.write(figure, chip + 0.12, middle, str(word.region), va="center_baseline", **number)
        _name(figure, chip + 0.32, middle, word)
        # From the common zero, so that lengths can be compared.
        bar = x + _COLUMN - _BAR - 0.36
        zero = bar + _BAR * -low / (high - low)
        length = _BAR * word.cosine / (high - low)
        inches.block(figure, min(zero, zero + length), middle - 0.06, abs(length), 0.12, colour)
        inches.write(figure, x + _COLUMN, middle, f"{word.cosine:.2f}", ha="right",
                     va="center_baseline", fontsize=8.5)  # fmt: skip


def _name(figure: Figure, left: float, middle: float, word: _Word) -> None:
    """The word, shortened to its room, underlined if it is outside the knowledge."""
    size, room = 9.0, _COLUMN - _BAR - 0.44 - _CROP - 0.40
    times = f" ×{word.times}" if word.times > 1 else ""
    text = inches.fitted(word.text, room - inches.text_width(times, size), size)
    inches.write(figure, left, middle, text + times, va="center_baseline", fontsize=size)
    if word.kind == caption_text.ESTIMATED:
        y, right = middle + 0.075, left + inches.text_width(text, size)
        inches.line(figure, (left, y), (right, y), color="0.1", linewidth=0.08 * size)


def _foot(
    figure: Figure, parts: Sequence[Part], words: Sequence[_Word], cosines: np.ndarray, note: str
) -> None:
    """The score of the pair and what the marks mean."""
    width, height = figure.get_size_inches()
    unused = sum(part.kind == caption_text.UNUSED for part in parts)
    if len(cosines):
        score = f"score {cosines.mean():.3f}: mean of {_counted(len(cosines), 'word')}"
    else:
        score = "no word can be scored: score 0"
    more = (
        f"; {len(words) - _WORDS} distinct words more than the list has" if words[_WORDS:] else ""
    )
    inches.write(figure, _EDGE, height - 0.25, score + more, fontsize=9, weight="bold")
    marks = []
    if any(part.kind == caption_text.ESTIMATED for part in parts):
        marks.append("underlined: outside the knowledge")
    if unused:
        marks.append(f"grey: {_counted(unused, 'word')} not scored")
    legend = "   ".join([*marks, note]).strip()
    inches.write(figure, width - _EDGE, height - 0.24, legend, ha="right", fontsize=7.5,
                 color="0.4")  # fmt: skip


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _ink(colour: Any) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = colour[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def _cropped(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The image in a box, at least one pixel of it, and at least 64 wide so that it is smooth."""
    tall, wide = image.shape[:2]
    x0, y0 = (
        int(np.clip(np.floor(v), 0, m - 1)) for v, m in zip(box[:2], (wide, tall), strict=True)
    )
    x1, y1 = (int(np.clip(np.ceil(v), low + 1, m)) for v, low, m in
              zip(box[2:], (x0, y0), (wide, tall), strict=True))  # fmt: skip
    cut = np.ascontiguousarray(image[y0:y1, x0:x1])
    if cut.shape[1] >= 64:
        return cut
    size = (64, max(1, round(cut.shape[0] * 64 / cut.shape[1])))
    return cv2.resize(cut, size, interpolation=cv2.INTER_CUBIC)

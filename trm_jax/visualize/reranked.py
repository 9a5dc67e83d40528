"""The best answers before and after re-ranking, in both directions (MASK, Table 10).

Captions ask for images and images for captions. A right answer is green with a check mark, a wrong
one red with a cross; arrows say how many places an answer gained or lost.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from trm_jax.data.caption_words import CaptionWords
from trm_jax.types import UserError
from trm_jax.visualize import caption_text, inches, style
from trm_jax.visualize.caption_text import Part, Piece

_RIGHT, _WRONG, _STAYS = "#0B7A3B", "#B8321F", "0.45"
_EDGE, _GAP, _SIDE, _BETWEEN = 0.18, 0.12, 1.15, 1.05  # inches
_HEAD, _SECTION, _UNDER, _FOOT, _PAD = 0.36, 0.5, 0.24, 0.26, 0.16  # inches
_QUERY = 1.9  # inches of a query's caption
_SIZE, _LINES, _QUERY_LINES = 8.0, 3, 8  # points, of captions
_TEXT_GAP = 0.1  # inches between captions
_LOOK: dict[Any, Any] = style.RC | {"axes.grid": False}


class Query(NamedTuple):
    """A row of the picture.

    index: of the caption that asks for images, or of the image that asks for captions.
    before, after: the same [k] candidates, best first: a row of a ranking's `before` and `order`.
    """

    index: int
    before: np.ndarray
    after: np.ndarray


class Captions(NamedTuple):
    """All captions that queries and candidates point into.

    texts: m of them.
    image_of_text: [m] int, the image that each describes.
    words: what a matcher made of them, to underline words outside the knowledge; None: no marks.
    """

    texts: Sequence[str]
    image_of_text: Int[np.ndarray, " m"]
    words: CaptionWords | None = None

    def parts(self, index: int) -> list[Part]:
        """A caption for drawing; unused words are not set apart."""
        if self.words is None:
            return caption_text.plain(self.texts[index])
        found = caption_text.parts(self.texts[index], self.words, index)
        estimated = caption_text.ESTIMATED
        return [p if p.kind == estimated else Part(p.text, caption_text.KNOWN) for p in found]


class _Answer(NamedTuple):
    """A candidate at a place: its index, whether it is right, and the places that it gained."""

    index: int
    right: bool
    gained: int | None  # None in the ranking before


class _Row(NamedTuple):
    """A query with its two lists of answers, and the best right place in each (from 1)."""

    query: int
    lists: tuple[list[_Answer], list[_Answer]]
    places: tuple[int, int] | None  # None: no right answer among the candidates


def shown_images(to_image: Sequence[Query], to_text: Sequence[Query], *, top: int = 3) -> list[int]:
    """The images that `render_reranked` will ask for, ascending."""
    found = {int(query.index) for query in to_text}
    for query in to_image:
        found |= {int(image) for image in (*query.before[:top], *query.after[:top])}
    return sorted(found)


def render_reranked(
    to_image: Sequence[Query],
    to_text: Sequence[Query],
    images: Mapping[int, np.ndarray] | Sequence[np.ndarray],
    captions: Captions,
    *,
    path: str | Path,
    names: tuple[str, str] = ("base", "re-ranked"),
    top: int = 3,
    note: str = "",
    dpi: int = 160,
) -> Path:
    """Writes one PNG with a row for each query: its best answers before and after.

    Between the two lists is the place of the right answer (of several, the best) in each.

    Args:
        to_image: captions that ask for images; may be empty if `to_text` is not.
        to_text: images that ask for captions; may be empty if `to_image` is not.
        images: image -> [H, W, 3] uint8 RGB, at least `shown_images`.
        captions: the texts, and which image each describes.
        path: the file to write; missing folders are made.
        names: of the two rankings, such as ("CLIP", "CLIP + MASK").
        top: answers shown, fewer if a query has no more candidates.
        note: printed at the top right, such as alpha and k.
        dpi: pixels per inch; an image is 1.15 inches wide.

    Returns:
        `path`.

    Raises:
        UserError: no query, candidates that differ before and after, a caption or image that is
            not there, or a picture of a wrong shape.
    """
    _check(to_image, to_text, images, captions, top)
    owner = np.asarray(captions.image_of_text)
    by_text = [_row(q, owner[q.index] == np.asarray(q.after), top) for q in to_image]
    by_image = [_row(q, owner[np.asarray(q.after)] == q.index, top) for q in to_text]
    block = top * _SIDE + (top - 1) * _GAP
    width = 2 * _EDGE + _QUERY + 2 * _GAP + 2 * block + _BETWEEN
    columns = (_EDGE + _QUERY + 2 * _GAP, _EDGE + _QUERY + 2 * _GAP + block + _BETWEEN)
    with matplotlib.rc_context(_LOOK):
        tall_images = [_height_of_images(row, captions) for row in by_text]
        texts = [_laid_out(row, captions, block) for row in by_image]
        tall_texts = [_height_of_texts(lists) for lists in texts]
        sections = _SECTION * (bool(by_text) + bool(by_image))
        height = _HEAD + sections + sum(tall_images) + sum(tall_texts) + _FOOT
        figure = style.new_figure(width, height, layout=None)
        inches.write(figure, _EDGE, 0.12, "Re-ranking", fontsize=11, weight="bold")
        inches.write(figure, width - _EDGE, 0.14, note, ha="right", fontsize=8.5, color="0.35")
        top_edge = _HEAD
        if by_text:
            top_edge = _section(figure, "images for a caption", names, columns, block, top_edge)
        for row, tall in zip(by_text, tall_images, strict=True):
            _query_text(figure, top_edge, captions.parts(row.query))
            _image_lists(figure, top_edge, columns, row, images)
            _change(figure, columns[0] + block, top_edge + _SIDE / 2, row)
            top_edge += tall
        if by_image:
            top_edge = _section(figure, "captions for an image", names, columns, block, top_edge)
        for row, lists, tall in zip(by_image, texts, tall_texts, strict=True):
            place = (_EDGE, top_edge, _QUERY, max(tall - _PAD, _SIDE))
            inches.picture(figure, (*place[:3], min(place[3], 1.6)), images[row.query])
            for left, answers, laid in zip(columns, row.lists, lists, strict=True):
                _text_list(figure, left, top_edge, answers, laid)
            _change(figure, columns[0] + block, top_edge + (tall - _PAD) / 2, row)
            top_edge += tall
        _foot(figure, captions.words is not None)
        return style.save(figure, path, dpi)


def _check(
    to_image: Sequence[Query],
    to_text: Sequence[Query],
    images: Mapping[int, np.ndarray] | Sequence[np.ndarray],
    captions: Captions,
    top: int,
) -> None:
    """Raises UserError unless the arguments describe a picture."""
    if not (to_image or to_text):
        raise UserError("there is no query to draw: give captions or images whose answers moved")
    if top < 1:
        raise UserError(f"the best {top} answers cannot be drawn; take 1 or more")
    if len(captions.texts) != len(captions.image_of_text):
        raise UserError(
            f"there are {len(captions.texts)} captions, but {len(captions.image_of_text)} say "
            "which image is theirs; give one image for each caption"
        )
    asked = [int(query.index) for query in to_image]
    asked += [int(text) for query in to_text for text in (*query.before, *query.after)]
    if asked and not 0 <= min(asked) <= max(asked) < len(captions.texts):
        raise UserError(
            f"the rankings name caption {max(asked)}, but there are {len(captions.texts)}: "
            "give the rankings of these"
        )
    for query in (*to_image, *to_text):
        if not len(query.before) or sorted(query.before) != sorted(query.after):
            raise UserError(
                f"query {query.index} has other candidates after re-ranking than before; give rows "
                "of one ranking's `before` and `order`"
            )
    for number in shown_images(to_image, to_text, top=top):
        present = number in images if isinstance(images, Mapping) else 0 <= number < len(images)
        if not present:
            raise UserError(f"image {number} is to be drawn, but is not given; see shown_images")
        image = images[number]
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            kind = f"{image.dtype}{list(image.shape)}"
            raise UserError(f"image {number} is {kind}, not uint8 [H, W, 3]")


def _row(query: Query, right_after: np.ndarray, top: int) -> _Row:
    """What a row shows; `right_after` says which of `after` are right."""
    right = {int(c) for c in np.asarray(query.after)[right_after]}
    before = [int(c) for c in query.before]
    after = [int(c) for c in query.after]
    lists = (
        [_Answer(c, c in right, None) for c in before[:top]],
        [_Answer(c, c in right, before.index(c) - n) for n, c in enumerate(after[:top])],
    )
    if not right:
        return _Row(int(query.index), lists, None)
    best = tuple(min(order.index(c) for c in right) + 1 for order in (before, after))
    return _Row(int(query.index), lists, (best[0], best[1]))


def _height_of_images(row: _Row, captions: Captions) -> float:
    pieces = _query_pieces(captions.parts(row.query))
    return max(_SIDE + _UNDER, caption_text.height(pieces, _SIZE)) + _PAD


def _query_pieces(parts: Sequence[Part]) -> list[Piece]:
    return caption_text.layout(parts, _QUERY, size=_SIZE, lines=_QUERY_LINES)


def _query_text(figure: Figure, top: float, parts: Sequence[Part]) -> None:
    caption_text.draw(figure, _EDGE, top, parts, _query_pieces(parts), size=_SIZE)


def _laid_out(
    row: _Row, captions: Captions, block: float
) -> list[list[tuple[list[Part], list[Piece]]]]:
    """The captions of both lists, in lines."""
    lists = []
    for answers in row.lists:
        laid = []
        for answer in answers:
            parts = captions.parts(answer.index)
            pieces = caption_text.layout(parts, block - 0.55, size=_SIZE, lines=_LINES)
            laid.append((parts, pieces))
        lists.append(laid)
    return lists


def _height_of_texts(lists: Sequence[Sequence[tuple[list[Part], list[Piece]]]]) -> float:
    """Inches of a row with an image at its left."""
    tall = max(sum(_step(pieces) for _, pieces in laid) for laid in lists)
    return max(tall, _SIDE) + _PAD


def _step(pieces: Sequence[Piece]) -> float:
    """Inches from a caption to the next; its mark and its arrow need two lines."""
    return max(caption_text.height(pieces, _SIZE), 0.27) + _TEXT_GAP


def _section(
    figure: Figure,
    title: str,
    names: tuple[str, str],
    columns: tuple[float, float],
    block: float,
    top: float,
) -> float:
    """The heads of a direction; returns where its rows begin."""
    inches.write(figure, _EDGE, top + 0.1, title, fontsize=9.5, weight="bold")
    middle = columns[0] + block + _BETWEEN / 2
    inches.write(figure, middle, top + 0.12, "right answer", ha="center", fontsize=7.5, color="0.4")
    for left, name in zip(columns, names, strict=True):
        head = inches.fitted(name, block, 9.5, "bold")
        inches.write(figure, left, top + 0.1, head, fontsize=9.5, weight="bold")
        inches.line(
            figure, (left, top + 0.3), (left + block, top + 0.3), color="0.6", linewidth=0.8
        )
    inches.line(figure, (_EDGE, top + 0.3), (_EDGE + _QUERY, top + 0.3), color="0.6", linewidth=0.8)
    return top + _SECTION - 0.1


def _image_lists(
    figure: Figure,
    top: float,
    columns: tuple[float, float],
    row: _Row,
    images: Mapping[int, np.ndarray] | Sequence[np.ndarray],
) -> None:
    """Both lists of images, each in a frame of its colour with its mark and arrow below."""
    for left, answers in zip(columns, row.lists, strict=True):
        for place, answer in enumerate(answers):
            x = left + place * (_SIDE + _GAP)
            colour = _RIGHT if answer.right else _WRONG
            frame = 3.0 if answer.right else 1.2
            inches.picture(
                figure, (x, top, _SIDE, _SIDE), images[answer.index], colour=colour, frame=frame
            )
            y = top + _SIDE + 0.06
            inches.write(figure, x, y, f"{_mark(answer)} {place + 1}", fontsize=8, color=colour,
                         weight="bold")  # fmt: skip
            _arrow(figure, x + 0.34, y, answer)


def _text_list(
    figure: Figure,
    left: float,
    top: float,
    answers: Sequence[_Answer],
    laid: Sequence[tuple[list[Part], list[Piece]]],
) -> None:
    """A list of captions, each with a stripe of its colour, its mark and its arrow at its left."""
    for place, (answer, (parts, pieces)) in enumerate(zip(answers, laid, strict=True)):
        tall = _step(pieces) - _TEXT_GAP
        colour = _RIGHT if answer.right else _WRONG
        inches.block(figure, left, top, 0.05 if answer.right else 0.03, tall, colour)
        mark = f"{_mark(answer)} {place + 1}"
        inches.write(figure, left + 0.1, top + 0.005, mark, fontsize=8, color=colour, weight="bold")
        _arrow(figure, left + 0.1, top + 0.145, answer)
        caption_text.draw(figure, left + 0.5, top, parts, pieces, size=_SIZE)
        top += _step(pieces)


def _mark(answer: _Answer) -> str:
    return "✓" if answer.right else "✗"


def _arrow(figure: Figure, x: float, y: float, answer: _Answer) -> None:
    """How many places an answer gained or lost, in the colour that this is good or bad news in."""
    if answer.gained is None:
        return
    text = f"{'▲' if answer.gained > 0 else '▼'}{abs(answer.gained)}" if answer.gained else "="
    colour = _STAYS if not answer.right else _news(answer.gained)
    inches.write(figure, x, y, text, fontsize=8, color=colour)


def _news(gained: int) -> str:
    """The colour of a right answer that gained places, lost some or stayed."""
    return _STAYS if not gained else _RIGHT if gained > 0 else _WRONG


def _change(figure: Figure, left: float, middle: float, row: _Row) -> None:
    """Between the lists: where the right answer was and is."""
    x = left + _BETWEEN / 2
    if row.places is None:
        text = "not among the\nre-ranked ones"
        inches.write(figure, x, middle, text, ha="center", va="center", fontsize=7.5, color=_STAYS)
        return
    before, after = row.places
    word = "unchanged" if before == after else "promoted" if after < before else "demoted"
    colour = _news(before - after)
    inches.write(figure, x, middle - 0.17, word, ha="center", va="center", fontsize=8, color=colour,
                 weight="bold")  # fmt: skip
    inches.write(figure, x, middle + 0.05, f"{before} → {after}", ha="center", va="center",
                 fontsize=13, color=colour, weight="bold")  # fmt: skip


def _foot(figure: Figure, marks_words: bool) -> None:
    width, height = figure.get_size_inches()
    text = "✓ green: right   ✗ red: wrong   ▲▼ places gained or lost"
    text += "   underlined: words outside the knowledge" if marks_words else ""
    inches.write(figure, width - _EDGE, height - 0.22, text, ha="right", fontsize=7.5, color="0.4")

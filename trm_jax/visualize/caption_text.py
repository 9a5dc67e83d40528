"""Captions as text whose words are marked by what a matcher by prototypes makes of them.

Words outside the knowledge (OOD: their prototype is estimated) are underlined, as in Table 10 of
the MASK paper; words that are not scored are grey.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from trm_jax.data.caption_words import CaptionWords, tokens
from trm_jax.types import UserError
from trm_jax.visualize import inches

KNOWN, ESTIMATED, UNUSED, OTHER = "known", "estimated", "unused", "other"
_COLOURS = {KNOWN: "0.1", ESTIMATED: "0.1", UNUSED: "0.6", OTHER: "0.45"}
_LETTER = re.compile(r"[^\W\d_]")
_CUT = "…"
_LINE_HEIGHT = 1.28  # of the font size
_ASCENT = 0.93


class Part(NamedTuple):
    """A stretch of a caption.

    text: as it stands in the caption.
    kind: KNOWN, a word of the knowledge; ESTIMATED, a scored word outside it; UNUSED, a word that
        is not scored (it has no vector or is not of the chosen tags); OTHER, spaces and marks.
    """

    text: str
    kind: str

    @property
    def is_used(self) -> bool:
        """Whether the word is scored."""
        return self.kind in (KNOWN, ESTIMATED)


class Piece(NamedTuple):
    """A part, or some of it, in a line: its left edge and width in inches."""

    text: str
    part: int
    line: int
    left: float
    width: float


def parts(text: str, words: CaptionWords, caption: int) -> list[Part]:
    """Divides a caption into its words and what is between them.

    Args:
        text: the caption.
        words: of the captions that it is one of.
        caption: its number there.

    Returns:
        Parts that, put together, are `text` again. The used ones are `words.of(caption)`, one for
        one; a concept of several tokens is one part.

    Raises:
        UserError: the words are those of another caption.
    """
    rows = words.indices[words.indptr[caption] : words.indptr[caption + 1]]
    pending = [(words.words[row], bool(words.known[row])) for row in rows][::-1]
    places = _places(text)
    found, at, end = [], 0, 0
    while at < len(places):
        start, stop, token = places[at]
        length = _length(places[at:], pending[-1][0]) if pending else 0
        if length:
            kind = KNOWN if pending.pop()[1] else ESTIMATED
            stop = places[at + length - 1][1]
        else:
            kind = UNUSED if _LETTER.search(token) else OTHER
        found += [Part(text[end:start], OTHER), Part(text[start:stop], kind)]
        at, end = at + max(length, 1), stop
    if pending:
        raise UserError(
            f"the word '{pending[-1][0]}' is not in caption {caption}, '{text}': the words are "
            "those of other captions"
        )
    return [part for part in (*found, Part(text[end:], OTHER)) if part.text]


def plain(text: str) -> list[Part]:
    """A caption whose words nobody knows: one part, drawn as it is."""
    return [Part(text, KNOWN)]


def layout(parts: Sequence[Part], width: float, *, size: float, lines: int) -> list[Piece]:
    """Breaks a caption into lines between words; what does not fit is cut off with an ellipsis.

    Args:
        parts: of the caption.
        width: of a line in inches.
        size: of the font in points.
        lines: how many there may be.
    """
    space = inches.text_width("a a", size) - inches.text_width("aa", size)
    pieces: list[Piece] = []
    line, right = 0, 0.0
    for spaced, unit in _units(parts, width, size):
        total = sum(wide for _, _, wide in unit)
        gap = space if right and spaced else 0.0
        if right and right + gap + total > width:
            line, right, gap = line + 1, 0.0, 0.0
        if line >= lines:
            return _cut_off(pieces, width, size)
        left = right + gap
        for text, part, wide in unit:
            pieces.append(Piece(text, part, line, left, wide))
            left += wide
        right = left
    return pieces


def height(pieces: Sequence[Piece], size: float) -> float:
    """Inches from the top of the first line to the bottom of the last."""
    return (max((piece.line for piece in pieces), default=-1) + 1) * size * _LINE_HEIGHT / 72


def draw(
    figure: Figure,
    left: float,
    top: float,
    parts: Sequence[Part],
    pieces: Sequence[Piece],
    *,
    size: float,
    grounds: Mapping[int, Any] | None = None,
) -> None:
    """Draws what `layout` made, its upper left corner at (left, top) inches.

    Args:
        figure: to draw in.
        left, top: in inches.
        parts, pieces, size: of `layout`.
        grounds: part -> colour behind it.
    """
    for piece in pieces:
        kind = parts[piece.part].kind
        x = left + piece.left
        upper = top + piece.line * size * _LINE_HEIGHT / 72
        base = upper + _ASCENT * size / 72
        inches.write(
            figure, x, base, piece.text, va="baseline", fontsize=size, color=_COLOURS[kind]
        )
        if kind == ESTIMATED:
            y = base + 0.16 * size / 72
            inches.line(figure, (x, y), (x + piece.width, y), color="0.1", linewidth=0.08 * size)
        if grounds and piece.part in grounds:
            tall = size * _LINE_HEIGHT / 72
            inches.block(
                figure, x - 0.015, upper, piece.width + 0.03, tall * 0.98, grounds[piece.part]
            )


def _places(text: str) -> list[tuple[int, int, str]]:
    """(start, end, token) of each token; quotes, which the tokenizer rewrites, are left out."""
    places, end = [], 0
    for token in tokens(text):
        if token not in ("``", "''"):
            start = text.index(token, end)
            end = start + len(token)
            places.append((start, end, token))
    return places


def _length(places: Sequence[tuple[int, int, str]], word: str) -> int:
    """How many of the next tokens are `word`, 0 if it does not begin here."""
    word = word.lower()
    if places[0][2].lower() == word:
        return 1
    wanted = tokens(word)
    here = [token.lower() for _, _, token in places[: len(wanted)]]
    return len(wanted) if here == wanted else 0


def _units(
    parts: Sequence[Part], width: float, size: float
) -> list[tuple[bool, list[tuple[str, int, float]]]]:
    """(whether a space comes before it, its [(text, part, width)]) of all that stays on one line.

    That is what has no space in it; a unit wider than a line falls into single letters.
    """
    units: list[list[tuple[str, int]]] = [[]]
    for number, part in enumerate(parts):
        for place, text in enumerate(re.split(r"\s+", part.text)):
            if place:
                units.append([])
            if text:
                units[-1].append((text, number))
    fitting = []
    for unit in units:
        sized = [(text, part, inches.text_width(text, size)) for text, part in unit]
        if sum(wide for _, _, wide in sized) <= width:
            fitting.append((True, sized))
        else:
            letters = [(letter, part) for text, part in unit for letter in text]
            for place, (letter, part) in enumerate(letters):
                fitting.append((not place, [(letter, part, inches.text_width(letter, size))]))
    return [(spaced, unit) for spaced, unit in fitting if unit]


def _cut_off(pieces: list[Piece], width: float, size: float) -> list[Piece]:
    """The lines that fit, the last one shortened until an ellipsis fits too."""
    room = width - inches.text_width(_CUT, size)
    last = pieces[-1].line
    while (
        len(pieces) > 1 and pieces[-1].line == last and (pieces[-1].left + pieces[-1].width > room)
    ):
        pieces = pieces[:-1]
    end = pieces[-1]
    wide = inches.text_width(end.text + _CUT, size)
    return [*pieces[:-1], end._replace(text=end.text + _CUT, width=wide)]

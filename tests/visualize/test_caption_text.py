"""Captions divided into marked words, against hand-worked ones, and their lines."""

import numpy as np
import pytest
from matplotlib.lines import Line2D

from trm_jax.data.caption_words import usable
from trm_jax.types import UserError
from trm_jax.visualize import caption_text, inches, style
from trm_jax.visualize.caption_text import ESTIMATED, KNOWN, OTHER, UNUSED, Part

_KNOWN = {"man", "dog", "traffic light", "light", "women's hat"}
_TEXTS = [
    'Man, a "big" dog and two men-at-work: the Traffic  light can\'t see 7 lights.',
    "A light light dog's traffic light (light)",
    "?",
    "She has a women's hat",
]


def _words(texts=_TEXTS):
    return usable(texts, _KNOWN, lambda token: token in {"big", "two", "a", "A", "see", "hat"})


def test_parts_are_the_words_between_the_rest():
    words = _words()
    assert caption_text.parts(_TEXTS[0], words, 0) == [
        Part("Man", KNOWN),
        *(Part(text, OTHER) for text in (",", " ")),
        Part("a", ESTIMATED),
        Part(' "', OTHER),
        Part("big", ESTIMATED),
        Part('" ', OTHER),
        Part("dog", KNOWN),
        Part(" ", OTHER),
        Part("and", UNUSED),
        Part(" ", OTHER),
        Part("two", ESTIMATED),
        Part(" ", OTHER),
        Part("men-at-work", UNUSED),
        *(Part(text, OTHER) for text in (":", " ")),
        Part("the", UNUSED),
        Part(" ", OTHER),
        Part("Traffic  light", KNOWN),
        Part(" ", OTHER),
        Part("ca", UNUSED),
        Part("n't", UNUSED),
        Part(" ", OTHER),
        Part("see", ESTIMATED),
        *(Part(text, OTHER) for text in (" ", "7", " ")),
        Part("lights", UNUSED),
        Part(".", OTHER),
    ]


@pytest.mark.parametrize("caption", range(len(_TEXTS)))
def test_parts_keep_the_caption_and_are_its_words(caption):
    words = _words()
    parts = caption_text.parts(_TEXTS[caption], words, caption)
    assert "".join(part.text for part in parts) == _TEXTS[caption]
    used = [part for part in parts if part.is_used]
    assert [" ".join(p.text.lower().split()) for p in used] == [
        word.lower() for word in words.of(caption)
    ]
    known = dict(zip(words.words, words.known.tolist(), strict=True))
    assert [p.kind == KNOWN for p in used] == [known[word] for word in words.of(caption)]


def test_words_of_another_caption_are_refused():
    with pytest.raises(UserError, match="the word 'man' is not in caption 0, 'a bird'"):
        caption_text.parts("a bird", _words(), 0)


def _lines(pieces):
    """The text of each line, with a space where pieces do not touch."""
    lines = {}
    for piece in pieces:
        text, right = lines.get(piece.line, ("", piece.left))
        gap = " " if piece.left > right + 1e-9 else ""
        lines[piece.line] = (text + gap + piece.text, piece.left + piece.width)
    return [text for text, _ in lines.values()], [right for _, right in lines.values()]


def test_lines_break_between_words_and_keep_all_of_them():
    text = "A dog , a (dog) and so on, " * 6
    parts = caption_text.parts(text, _words([text]), 0)
    lines, rights = _lines(caption_text.layout(parts, 1.5, size=8.0, lines=50))
    assert " ".join(lines) == text.strip()
    assert min(rights[:-1]) > 1.0 and max(rights) <= 1.5
    for line, right in zip(lines, rights, strict=True):
        assert right == pytest.approx(inches.text_width(line, 8.0), rel=0.02)
    height = caption_text.height(caption_text.layout(parts, 1.5, size=8.0, lines=50), 8.0)
    assert height == pytest.approx(len(lines) * 1.28 * 8 / 72)


def test_what_does_not_fit_is_cut_off():
    parts = caption_text.plain("many words " * 30)
    lines, rights = _lines(caption_text.layout(parts, 1.5, size=8.0, lines=2))
    assert len(lines) == 2 and lines[1].endswith("…") and max(rights) <= 1.5
    letters, rights = _lines(
        caption_text.layout(caption_text.plain("oh " + "x" * 60), 1.0, size=8.0, lines=9)
    )
    assert "".join(letters) == "oh " + "x" * 60
    assert max(rights) <= 1.0
    assert caption_text.layout([], 1.0, size=8.0, lines=3) == []
    assert inches.fitted("a long name", 0.5, 8.0).endswith("…")
    assert inches.text_width(inches.fitted("a long name", 0.5, 8.0), 8.0) <= 0.5


def test_marks_lie_where_the_words_are():
    text = "A big dog barks"
    parts = caption_text.parts(text, _words([text]), 0)
    pieces = caption_text.layout(parts, 3.0, size=9.0, lines=1)
    figure = style.new_figure(3.4, 1.0, layout=None)
    caption_text.draw(figure, 0.2, 0.3, parts, pieces, size=9.0, grounds={4: (1.0, 0.0, 0.0)})
    drawn = {t.get_text(): t for t in figure.texts}
    assert [drawn[word].get_color() for word in ("big", "dog", "barks")] == ["0.1", "0.1", "0.6"]
    renderer = figure.canvas.get_renderer()
    boxes = {word: t.get_window_extent(renderer) for word, t in drawn.items()}
    under = [
        line.get_window_extent(renderer) for line in figure.artists if isinstance(line, Line2D)
    ]
    for box, line in zip((boxes["A"], boxes["big"]), under, strict=True):
        assert line.x0 == pytest.approx(box.x0, abs=3) and line.x1 == pytest.approx(box.x1, abs=3)
        assert box.y0 - 3 <= line.y0 <= box.y0 + 0.35 * box.height
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    red = np.argwhere((picture == (255, 0, 0)).all(axis=-1))
    box = boxes["dog"]
    assert abs(red[:, 1].min() - box.x0) < 4 and abs(red[:, 1].max() - box.x1) < 4
    assert len(red) > 0.5 * box.width * box.height

"""A caption's words and their regions: boxes, cuts, bars and marks of the picture."""

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle

from trm_jax.data.caption_words import usable
from trm_jax.types import UserError
from trm_jax.visualize import caption_text, style, words_regions

_QUARTERS = ((250, 10, 10), (10, 200, 10), (10, 10, 250), (240, 240, 10))
_TEXT = "The man, a $man$ with 2 big dogs and spaghetti"
# Of the, man, a, man, with, big, dogs, and; "spaghetti" has no vector.
_REGIONS = np.array([3, 0, 3, 0, 1, 3, 0, 1])
_COSINES = np.array([0.1, 0.8, 0.2, 0.8, 0.3, 0.4, 0.6, -0.2])


def _image(side=40):
    image = np.zeros((side, side, 3), np.uint8)
    for number, colour in enumerate(_QUARTERS):
        row, column = divmod(number, 2)
        image[row * side // 2 :][: side // 2, column * side // 2 :][:, : side // 2] = colour
    return image


def _parts(text=_TEXT):
    known = {"man", "dogs", "a"}
    words = usable([text], known, lambda token: token.islower() and token != "spaghetti")
    return caption_text.parts(text, words, 0)


@pytest.fixture
def figures(monkeypatch):
    made = []
    save = style.save
    monkeypatch.setattr(style, "save", lambda f, *rest: made.append(f) or save(f, *rest))
    return made


def _texts(figure):
    return [text.get_text() for text in figure.texts]


def _bars(figure):
    """(left, width) in inches and colour of the bars, which are 0.12 inches high."""
    wide, tall = figure.get_size_inches()
    blocks = [a for a in figure.artists if isinstance(a, FancyBboxPatch)]
    bars = [b for b in blocks if b.get_height() * tall == pytest.approx(0.12)]
    return [(b.get_x() * wide, b.get_width() * wide, b.get_facecolor()[:3]) for b in bars]


def test_cells_of_a_grid_cover_the_image_in_row_order():
    cells = words_regions.grid_boxes(3, (30, 60))
    np.testing.assert_allclose(cells[5], [40, 10, 60, 20])
    count = np.zeros((30, 60), int)
    for x0, y0, x1, y1 in cells.astype(int):
        count[y0:y1, x0:x1] += 1
    assert (count == 1).all()


def test_picture_shows_each_word_with_its_region(tmp_path, figures):
    image, boxes = _image(), words_regions.grid_boxes(2, (40, 40))
    path = words_regions.render_words(
        image, _parts(), _REGIONS, _COSINES, boxes=boxes, note="x.jpg", dpi=80,
        path=tmp_path / "a" / "p.png",
    )  # fmt: skip
    figure = figures[0]
    assert cv2.imread(str(path)).shape[1] == int(80 * figure.get_size_inches()[0])

    large, *cuts = figure.axes
    drawn = [p for p in large.patches if isinstance(p, Rectangle) and not p.get_fill()]
    colours = {}
    for box in drawn:
        region = int(np.argmin([abs(b - [*box.get_xy(), *box.get_bbox().p1]).sum() for b in boxes]))
        x0, y0, x1, y1 = boxes[region]
        np.testing.assert_allclose(box.get_bbox().extents, [x0, y0, x1, y1])
        colours[region] = to_rgb(box.get_edgecolor())
    assert sorted(colours) == [0, 1, 3] and len(set(colours.values())) == 3  # 2 is no word's
    assert [t.get_text() for t in large.texts] == ["3", "0", "1"]

    # The list: each distinct word once, in the caption's order.
    texts = _texts(figure)
    names = ["The", "man ×2", "a", "with", "big", "dogs", "and"]
    assert [
        t for t in texts if t in names and figure.texts[texts.index(t)].get_fontsize() != 11
    ] or 1
    in_list = [t.get_text() for t in figure.texts if t.get_fontsize() == 9.0][:-1]
    assert in_list == names
    regions, cosines = [3, 0, 3, 1, 3, 0, 1], [0.1, 0.8, 0.2, 0.3, 0.4, 0.6, -0.2]
    assert [t for t in texts if t[-3:-2] == "."][: len(names)] == [f"{c:.2f}" for c in cosines]
    assert [t.get_text() for t in figure.texts if t.get_fontsize() == 7.5][: len(names)] == [
        str(region) for region in regions
    ]
    for axes, region in zip(cuts, regions, strict=True):
        picture = axes.images[0].get_array()
        assert (picture == _QUARTERS[region]).all()
        assert to_rgb(axes.spines["left"].get_edgecolor()) == colours[region]

    bars = _bars(figure)
    lengths = np.array([width for _, width, _ in bars])
    np.testing.assert_allclose(lengths / lengths[1], np.abs(cosines) / 0.8)
    assert [colour for *_, colour in bars] == [colours[region] for region in regions]
    zeros = [left for (left, *_), cosine in zip(bars, cosines, strict=True) if cosine > 0]
    assert np.ptp(zeros) < 1e-9 and bars[-1][0] + bars[-1][1] == pytest.approx(zeros[0])


def test_caption_has_marks_and_the_score_of_all_words(tmp_path, figures):
    words_regions.render_words(
        _image(), _parts(), _REGIONS, _COSINES, path=tmp_path / "p.png", note="x.jpg", dpi=60
    )
    figure = figures[0]
    # (0.1 + 0.8 + 0.2 + 0.8 + 0.3 + 0.4 + 0.6 - 0.2) / 8
    assert "score 0.375: mean of 8 words" in _texts(figure)
    assert _texts(figure)[-1].split("   ") == [
        "underlined: outside the knowledge",
        "grey: 1 word not scored",
        "regions without boxes",
        "x.jpg",
    ]
    caption = {t.get_text(): t for t in figure.texts if t.get_fontsize() == 11.0}
    assert caption["spaghetti"].get_color() == "0.6" and caption["man"].get_color() == "0.1"
    # the, with, big, and: in the caption and in the list.
    lines = [a for a in figure.artists if isinstance(a, Line2D)]
    assert len(lines) == 8
    height = figure.get_size_inches()[1]
    tops = [(1 - line.get_ydata()[0]) * height for line in lines]
    lefts = [line.get_xdata()[0] for line in lines[:4]]
    assert lefts == [caption[word].get_position()[0] for word in ("The", "with", "big", "and")]
    assert max(tops[:4]) < 0.5 < min(tops[4:])
    # A used word has its region's colour behind it, the same as its bar's, and no other word has.
    grounds = [a for a in figure.artists if isinstance(a, FancyBboxPatch)][:8]
    bars = dict(zip(["The", "man", "a", "with", "big", "dogs", "and"], _bars(figure), strict=True))
    used = ["The", "man", "a", "man", "with", "big", "dogs", "and"]
    for ground, word in zip(grounds, used, strict=True):
        assert ground.get_facecolor() == (*bars[word][2], 0.3)
    assert len(figure.axes) == 1 and not figure.axes[0].patches  # no boxes


def test_numbers_of_boxes_on_one_corner_stay_apart(tmp_path, figures):
    text = "a b c d e f"
    words = usable([text], set(text.split()), lambda _: False)
    boxes = np.array([[0, 0, 40 - n, 40 - n] for n in range(6)])
    words_regions.render_words(
        _image(), caption_text.parts(text, words, 0), np.arange(6), np.full(6, 0.5), boxes=boxes,
        path=tmp_path / "p.png", dpi=60,
    )  # fmt: skip
    chips = [p for p in figures[0].axes[0].patches if p.get_fill()]
    left = np.sort([chip.get_x() for chip in chips])
    assert len(chips) == 6 and (np.diff(left) >= chips[0].get_width() - 1e-9).all()


@pytest.mark.parametrize("text", ["spaghetti!", "?"])
def test_a_caption_without_usable_words_is_drawn(tmp_path, figures, text):
    none = np.array([], int), np.array([])
    words_regions.render_words(_image(), _parts(text), *none, path=tmp_path / "p.png", dpi=60)
    assert "no word can be scored: score 0" in _texts(figures[0])


def test_a_long_list_is_cut_and_says_so(tmp_path, figures):
    text = " ".join(f"word{n}" for n in range(40))
    parts = _parts(text)
    words_regions.render_words(
        _image(), parts, np.arange(40), np.linspace(0.1, 0.9, 40), path=tmp_path / "p.png", dpi=50
    )
    texts = _texts(figures[0])
    assert "score 0.500: mean of 40 words; 4 distinct words more than the list has" in texts
    assert len(_bars(figures[0])) == 36


def test_refusals(tmp_path):
    boxes = words_regions.grid_boxes(2, (40, 40))
    image, parts = _image(), _parts()
    cases = [
        (image / 255, _REGIONS, _COSINES, boxes, "not uint8"),
        (image, _REGIONS[1:], _COSINES[1:], boxes, "8 scored words, but there are 7 best regions"),
        (image, _REGIONS, _COSINES * np.nan, boxes, "not finite"),
        (image, _REGIONS, _COSINES, boxes[:3], "region is 3, but the image has 3 boxes"),
        (image, _REGIONS - 1, _COSINES, boxes, "region is -1, but the image has 4 boxes"),
    ]
    for picture, regions, cosines, drawn, message in cases:
        with pytest.raises(UserError, match=message):
            words_regions.render_words(
                picture, parts, regions, cosines, boxes=drawn, path=tmp_path / "x.png"
            )

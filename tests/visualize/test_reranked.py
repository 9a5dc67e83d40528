"""Answers before and after re-ranking: what is shown where, in which colour, and what moved."""

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

from trm_jax.data.caption_words import usable
from trm_jax.evaluate import reranking
from trm_jax.types import UserError
from trm_jax.visualize import reranked, style
from trm_jax.visualize.reranked import Captions, Query

_GREEN, _RED, _GREY = "#0b7a3b", "#b8321f", "0.45"
_IMAGES = [np.full((8, 8 + 4 * n, 3), 40 * n, np.uint8) for n in range(5)]
_TEXTS = [
    "a dog runs",
    "$two$ cats {sit}",
    "the big dog",
    "a " + "very long caption " * 40,
    "birds",
]
_CAPTIONS = Captions(_TEXTS, np.arange(5))


@pytest.fixture
def figures(monkeypatch):
    made = []
    save = style.save
    monkeypatch.setattr(style, "save", lambda f, *rest: made.append(f) or save(f, *rest))
    return made


def _query(index, before, after):
    return Query(index, np.array(before), np.array(after))


def _texts(figure, size):
    return [(t.get_text(), t.get_color()) for t in figure.texts if t.get_fontsize() == size]


def test_images_stand_in_their_order_and_colours(tmp_path, figures):
    queries = [
        _query(0, [1, 2, 3, 0, 4], [1, 0, 2, 3, 4]),  # promoted from 4 to 2
        _query(4, [4, 3, 2, 1], [3, 2, 1, 4]),  # demoted from 1 to 4
        _query(3, [3, 1, 2], [3, 2, 1]),  # unchanged
        _query(2, [3, 4, 1], [3, 1, 4]),  # not among them
    ]
    path = reranked.render_reranked(
        queries, [], _IMAGES, _CAPTIONS, path=tmp_path / "made" / "r.png", names=("CLIP", "both"),
        note="alpha 0.15", dpi=80,
    )  # fmt: skip
    figure = figures[0]
    assert cv2.imread(str(path)).shape[1] == int(80 * figure.get_size_inches()[0])
    shown = [int(axes.images[0].get_array()[0, 0, 0]) // 40 for axes in figure.axes]
    expected = [[*q.before[:3], *q.after[:3]] for q in queries]
    assert shown == np.ravel(expected).tolist()
    owner = np.repeat([q.index for q in queries], 6)
    edges = [to_hex(axes.spines["top"].get_edgecolor()) for axes in figure.axes]
    assert edges == [_GREEN if i == o else _RED for i, o in zip(shown, owner, strict=True)]
    # Before stands left of after, and ranks go to the right.
    lefts = np.array([axes.get_position().x0 for axes in figure.axes]).reshape(4, 6)
    assert (np.diff(lefts) > 0).all()
    for axes, image in zip(figure.axes, shown, strict=True):  # its shape is kept
        extent = axes.get_window_extent()
        assert extent.width / extent.height == pytest.approx((8 + 4 * image) / 8, rel=0.01)
    titles = ("promoted", "demoted", "unchanged")
    found = [(text, colour) for text, colour in _texts(figure, 8.0) if text in titles]
    assert found == [("promoted", _GREEN.upper()), ("demoted", _RED.upper()), ("unchanged", _GREY)]
    assert [text for text, _ in _texts(figure, 13.0)] == ["4 → 2", "1 → 4", "1 → 1"]
    texts = [text.get_text() for text in figure.texts]
    assert "not among the\nre-ranked ones" in texts
    assert {"CLIP", "both", "alpha 0.15", "images for a caption"} <= set(texts)
    assert "captions for an image" not in texts
    assert texts.count("✓ 1") == 3 and texts.count("✓ 2") == 1  # 4: before; 3: both; 0: after


def _moves(figure):
    """The arrows of the picture as places gained."""
    signs = {"▲": 1, "▼": -1}
    return [
        signs[t[0]] * int(t[1:]) if t[0] in signs else 0
        for t, _ in _texts(figure, 8.0)
        if t == "=" or t[0] in signs
    ]


def test_arrows_are_the_moves_of_the_ranking(tmp_path, figures):
    rng = np.random.default_rng(0)
    base, other = rng.normal(size=(2, 5, 10)).astype(np.float32)
    owner = np.arange(10) % 5
    found = reranking.rerank(base, other, alpha=1.0, top=5)
    captions = Captions([f"caption {n}" for n in range(10)], owner)

    def queries(ranking):
        return [Query(n, ranking.before[n], ranking.order[n]) for n in range(len(ranking.order))]

    to_image, to_text = queries(found.to_image), queries(found.to_text)
    reranked.render_reranked(to_image, to_text, _IMAGES, captions, path=tmp_path / "r.png", dpi=40)
    moves = [*found.to_image.moves[:, :3].ravel(), *found.to_text.moves[:, :3].ravel()]
    assert np.ptp(moves) > 2 and _moves(figures[0]) == moves
    # Between the lists: the places of the best right answer, as ranks of the evaluator.
    after, before = reranking.ranks(base, owner, found), reranking.ranks(
        base, owner, reranking.rerank(base, other, alpha=0.0, top=5)
    )  # fmt: skip
    places = [
        f"{b + 1} → {a + 1}"
        for b, a, right in zip(
            [*before[1], *before[0]],
            [*after[1], *after[0]],
            [
                *(found.to_image.order == owner[:, None]).any(axis=1),
                *(owner[found.to_text.order] == np.arange(5)[:, None]).any(axis=1),
            ],
            strict=True,
        )
        if right
    ]
    assert [text for text, _ in _texts(figures[0], 13.0)] == places


def test_captions_are_marked_and_words_outside_the_knowledge_underlined(tmp_path, figures):
    words = usable(_TEXTS, {"a", "dog", "cats", "birds"}, lambda token: token in {"big", "runs"})
    captions = Captions(_TEXTS, np.array([0, 1, 0, 2, 3]), words)
    query = _query(0, [1, 0, 4, 2, 3], [0, 2, 3, 1, 4])
    reranked.render_reranked(
        [], [query], {0: _IMAGES[0]}, captions, path=tmp_path / "r.png", dpi=60
    )
    figure = figures[0]
    marks = [(t, c) for t, c in _texts(figure, 8.0) if t[0] in "✓✗"]
    right, wrong = _GREEN.upper(), _RED.upper()
    assert marks == [("✗ 1", wrong), ("✓ 2", right), ("✗ 3", wrong), ("✓ 1", right), ("✓ 2", right),
                     ("✗ 3", wrong)]  # fmt: skip
    stripes = [a for a in figure.artists if isinstance(a, FancyBboxPatch)]
    assert [to_hex(s.get_facecolor()) for s in stripes] == [c.lower() for _, c in marks]
    assert [t for t, _ in _texts(figure, 13.0)] == ["2 → 1"]
    # "runs" before and after, "big" after; the caption's other words and no grey ones.
    underlined = [a for a in figure.artists if isinstance(a, Line2D) and a.get_color() == "0.1"]
    places = {text.get_text(): [] for text in figure.texts}
    for text in figure.texts:
        places[text.get_text()].append(text.get_position()[0])
    starts = [line.get_xdata()[0] for line in underlined]
    assert starts == [places["runs"][0], places["runs"][1], places["big"][0]]
    assert all(colour != "0.6" for _, colour in _texts(figure, 8.0))
    assert any(text.endswith("…") for text, _ in _texts(figure, 8.0))  # the long one
    assert figure.texts[-1].get_text().endswith("underlined: words outside the knowledge")
    # Nothing runs out of the picture.
    renderer, (wide, tall) = figure.canvas.get_renderer(), figure.canvas.get_width_height()
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= wide and box.y1 <= tall, text


def test_the_images_to_load_are_those_shown():
    to_image = [_query(0, [9, 4, 2, 7], [4, 9, 7, 2]), _query(1, [3], [3])]
    to_text = [_query(5, [100, 200], [200, 100])]
    assert reranked.shown_images(to_image, to_text) == [2, 3, 4, 5, 7, 9]
    assert reranked.shown_images(to_image, [], top=1) == [3, 4, 9]


def test_refusals(tmp_path):
    good, pictures = _query(0, [0, 1], [1, 0]), dict(enumerate(_IMAGES))
    cases = [
        ([], [], pictures, _CAPTIONS, {}, "no query to draw"),
        ([good], [], pictures, _CAPTIONS, {"top": 0}, "best 0 answers"),
        ([_query(0, [0, 1], [0, 2])], [], pictures, _CAPTIONS, {}, "query 0 has other candidates"),
        ([_query(0, [], [])], [], pictures, _CAPTIONS, {}, "query 0 has other candidates"),
        ([_query(9, [0], [0])], [], pictures, _CAPTIONS, {}, "name caption 9, but there are 5"),
        ([], [_query(0, [7], [7])], pictures, _CAPTIONS, {}, "name caption 7, but there are 5"),
        ([], [_query(8, [0], [0])], pictures, _CAPTIONS, {}, "image 8 is to be drawn"),
        ([_query(0, [5], [5])], [], _IMAGES, _CAPTIONS, {}, "image 5 is to be drawn"),
        ([good], [], [i / 255 for i in _IMAGES], _CAPTIONS, {}, "image 0 is float64.*not uint8"),
        ([good], [], pictures, Captions(_TEXTS, np.arange(4)), {}, "5 captions, but 4 say"),
    ]
    for to_image, to_text, images, captions, options, message in cases:
        with pytest.raises(UserError, match=message):
            reranked.render_reranked(
                to_image, to_text, images, captions, path=tmp_path / "x.png", **options
            )

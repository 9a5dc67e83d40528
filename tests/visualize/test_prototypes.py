"""Prototypes in the plane: their neighbours, and what the picture shows of which words."""

import sys

import cv2
import numpy as np
import pytest
from scipy.spatial.distance import pdist

from trm_jax.memory.knowledge_file import Knowledge
from trm_jax.types import UserError
from trm_jax.visualize import prototypes, style

_GROUPS = {
    "animals": ["dog", "cat", "polar bear", "cow", "sheep"],
    "$transports$": ["car", "bus", "train", "boat", "truck"],
    "faces": ["nose", "mouth", "chin"],
}
_WORDS = [word for words in _GROUPS.values() for word in words]


def _vectors(spread, seed=0, width=16):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(_GROUPS), width))
    group = np.repeat(np.arange(len(_GROUPS)), [len(words) for words in _GROUPS.values()])
    return centres[group] + spread * rng.normal(size=(len(group), width)), group


def _knowledge(vectors, words):
    vectors = np.asarray(vectors, np.float32)
    counts = np.ones(len(words), np.int64)
    return Knowledge(
        tuple(words), np.zeros((len(words), 2), np.float32), vectors, counts, vectors, {}
    )


@pytest.fixture
def figures(monkeypatch):
    made = []
    save = style.save
    monkeypatch.setattr(
        style, "save", lambda figure, *rest: made.append(figure) or save(figure, *rest)
    )
    return made


def test_words_lie_by_their_group_and_the_same_each_time():
    vectors, group = _vectors(0.2)
    places = prototypes.embed(vectors)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    same = group[:, None] == group[None]
    assert distances[same].max() < distances[~same].min()
    # By cosines: scale does not matter.
    scales = 2.0 ** np.arange(-6, 7)[:, None]
    np.testing.assert_array_equal(prototypes.embed(vectors * scales), places)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_words_keep_their_distances(count):
    vectors = _vectors(1.0)[0][:count]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(pdist(prototypes.embed(vectors)), pdist(unit), atol=1e-12)


def test_equal_words_and_a_zero_vector_are_placed():
    np.testing.assert_allclose(prototypes.embed(np.ones((8, 3))), 0.0, atol=1e-7)
    vectors = _vectors(0.2)[0]
    vectors[3] = 0.0
    assert np.isfinite(prototypes.embed(vectors)).all()


def test_nearest_words_are_counted_by_cosine():
    # Directions in degrees; the nearest of each: 10 -> 0, 0 -> 10, 95 -> 90, 90 -> 95, 60 -> 90.
    degrees, scales = np.radians([0, 10, 90, 95, 60]), np.array([1, 9, 1, 3, 5])
    vectors = scales[:, None] * np.stack([np.cos(degrees), np.sin(degrees)], axis=1)
    assert prototypes.own_group_nearest(vectors, np.array([0, 0, 1, 1, 1])) == 5
    assert prototypes.own_group_nearest(vectors, np.array([0, 0, 1, 0, 0])) == 2


def test_a_panel_is_turned_onto_the_first():
    rng = np.random.default_rng(1)
    like = rng.normal(size=(9, 2))
    turn = np.array([[np.cos(2), np.sin(2)], [np.sin(2), -np.cos(2)]])  # with a reflection
    found = prototypes._turned(like @ turn + 5.0, like)
    np.testing.assert_allclose(found, like - like.mean(axis=0), atol=1e-12)


def test_panels_have_the_words_of_every_set(tmp_path, figures):
    vectors = _vectors(0.3)[0]
    first = _knowledge(vectors[::-1], _WORDS[::-1])  # another order, all words
    second = _knowledge(_vectors(2.0, 1)[0][1:], _WORDS[1:])  # without "dog"
    groups = {**_GROUPS, "faces": [*_GROUPS["faces"], "a moustache", "chin"], "none": ["x"]}
    path = prototypes.render_prototypes(
        {"MACK": first, "MASK": second}, groups, path=tmp_path / "made" / "p.png", dpi=80
    )
    figure = figures[0]
    picture = cv2.imread(str(path))
    assert picture.shape[1::-1] == tuple(int(80 * s) for s in figure.get_size_inches())
    texts = [text.get_text() for text in figure.texts]
    legend = ["animals (4 of 5)", "$transports$ (5)", "faces (3 of 4)", "none (0 of 1)"]
    assert [text for text in texts if "(" in text] == legend
    assert "3 of 15 words are not in every set: dog, a moustache, x" in texts
    near = prototypes.own_group_nearest(vectors[1:], np.repeat([0, 1, 2], [4, 5, 3]))
    assert (
        f"12 words, perplexity 3.7\nnearest word by cosine is of the same group: {near} of 12"
        in (texts)
    )
    assert near == 12
    for axes in figure.axes:
        assert sorted(text.get_text() for text in axes.texts) == sorted(_WORDS[1:])
        markers = [line for line in axes.lines if line.get_marker() != "None"]
        assert [len(line.get_xdata()) for line in markers] == [4, 5, 3]
        assert len({line.get_color() for line in markers}) == 3
        assert len({line.get_marker() for line in markers}) == 3
        assert len(axes.patches) == 3  # a dashed line around each group
    # One scale for both directions: distances are those of the embedding.
    points = np.concatenate(
        [line.get_xydata() for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    )
    ratio = pdist(points) / pdist(prototypes.embed(np.float32(vectors[1:])))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_labels_lie_beside_their_markers_and_on_no_other(tmp_path, figures):
    rng = np.random.default_rng(0)
    words = [f"word {'i' * (n % 9)}{n}" for n in range(60)]
    knowledge = _knowledge(rng.normal(size=(60, 4)), words)
    groups = {"a": words[:30], "b": words[30:]}
    prototypes.render_prototypes({"one": knowledge}, groups, path=tmp_path / "p.png")
    figure, axes = figures[0], figures[0].axes[0]
    renderer = figure.canvas.get_renderer()
    assert len(axes.texts) == 60
    boxes = np.array([t.get_window_extent(renderer).extents for t in axes.texts])
    panel = axes.get_window_extent(renderer).extents
    assert (boxes[:, :2] >= panel[:2] - 1).all() and (boxes[:, 2:] <= panel[2:] + 1).all()
    points = axes.transData.transform(
        np.concatenate([line.get_xydata() for line in axes.lines if len(line.get_xdata()) == 30])
    )
    place = {word: n for n, word in enumerate(words)}
    for number, (text, box) in enumerate(zip(axes.texts, boxes, strict=True)):
        others = np.delete(boxes, number, axis=0)
        shared = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
        assert not (shared > 1.5).all(axis=1).any(), text.get_text()
        inside = (points > box[:2] + 1) & (points < box[2:] - 1)
        assert not inside.all(axis=1).any()
        point = points[place[text.get_text()]]
        gap = np.linalg.norm(np.clip(point, box[:2], box[2:]) - point)
        assert gap < 40 / 72 * figure.dpi


def test_words_without_room_are_counted(tmp_path, figures):
    words = [f"the same place {n}" for n in range(60)]
    prototypes.render_prototypes(
        {"one": _knowledge(np.ones((60, 4)), words)}, {"a": words}, path=tmp_path / "p.png", dpi=60
    )
    labels = len(figures[0].axes[0].texts)
    assert 0 < labels < 60
    note = f"60 words, perplexity 20, {60 - labels} without a label\n"
    assert any(text.get_text().startswith(note) for text in figures[0].texts)


def test_one_word_is_drawn(tmp_path, figures):
    knowledge = _knowledge([[1.0, 2.0]], ["dog"])
    prototypes.render_prototypes({"one": knowledge}, {"a": ["dog", "x"]}, path=tmp_path / "p.png")
    texts = [text.get_text() for text in figures[0].texts]
    assert "1 word, principal components" in texts
    assert "1 of 2 words are not in the knowledge: x" in texts
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["dog"]


def test_refusals(tmp_path, monkeypatch):
    vectors = _vectors(0.3)[0]
    knowledge = _knowledge(vectors, _WORDS)
    path = tmp_path / "x.png"
    cases = [
        ({}, _GROUPS, "no knowledge to draw"),
        ({"a": knowledge}, {"none": []}, "no word to draw"),
        ({"a": knowledge}, {**_GROUPS, "pets": ["cat"]}, "'cat' is in the groups 'animals' and 'p"),
        ({"a": knowledge}, {"g": ["x", "y"]}, "none of the 2 words of the groups, 'x' the first"),
        ({"b": _knowledge(vectors * np.nan, _WORDS)}, _GROUPS, "knowledge 'b'.* not finite"),
    ]
    for sets, groups, message in cases:
        with pytest.raises(UserError, match=message):
            prototypes.render_prototypes(sets, groups, path=path)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        prototypes.render_prototypes({"a": knowledge}, _GROUPS, path=path)
    assert not path.exists()

"""Mining of positives against hand-worked cosines, and what its picture shows."""

import cv2
import numpy as np
import pytest

from trm_jax.types import UserError
from trm_jax.visualize import positives

# Cosines with row 0: 1, 0.8, 0, 0.96, 0.8, 0 (a zero vector).
_ROWS = np.array([[2, 0], [4, 3], [0, 1], [24, 7], [0.8, -0.6], [0, 0]])
_RED, _GREEN, _BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_positives_are_sorted_and_the_anchor_is_none_of_them():
    found = positives.mine(_ROWS, 0, 0.79)
    np.testing.assert_array_equal(found.indices, [3, 1, 4])  # of equals the earlier first
    np.testing.assert_allclose(found.cosines, [0.96, 0.8, 0.8])
    np.testing.assert_array_equal(positives.mine(_ROWS, 0, 0.9).indices, [3])
    assert positives.mine(_ROWS, 2, 0.99).indices.size == 0


def test_positives_are_those_of_the_loss():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 3))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for anchor in range(40):
        found = positives.mine(rows, anchor, 0.85)
        expected = {j for j in range(40) if unit[anchor] @ unit[j] >= 0.85} - {anchor}
        assert set(found.indices.tolist()) == expected
        assert (np.diff(found.cosines) <= 0).all()


def test_anchors_have_positives_of_both_kinds_and_lie_apart():
    # Images in three directions, two of each, and one alone; texts 5 and 6 are like no other.
    images = np.array([[1, 0, 0], [1, 0.1, 0], [0.2, 1, 0], [0.2, 1, 0.1], [0, 0.1, 1], [0, 0, 1],
                       [-1, -1, -1]])  # fmt: skip
    texts = np.array([[1.0, 0]] * 5 + [[-1, 0], [0, -1]])
    # The first; the farthest from it, 4 (cosine 0); of 2 (0.1961 with 0) and 3 (0.1952), 3.
    assert positives.choose_anchors(images, texts, 0.9, 2) == [0, 4]
    assert positives.choose_anchors(images, texts, 0.9, 3) == [0, 4, 3]
    assert sorted(positives.choose_anchors(images, texts, 0.9, 99)) == [0, 1, 2, 3, 4]
    # Without a text that is like another, those with an image are left; 6 has none.
    alone = np.eye(7)
    assert sorted(positives.choose_anchors(images, alone, 0.9, 99)) == [0, 1, 2, 3, 4, 5]
    assert positives.choose_anchors(alone, alone, 0.9, 4) == []


def _draw(path, **options):
    images = [np.full((8, 8, 3), colour, np.uint8) for colour in (_RED, _GREEN, _BLUE)]
    images[2] = images[2][:4]  # a wide one
    captions = ["an anchor", "$a_b$ {c} " * 30, ""]
    anchor = positives.Anchor(
        0,
        positives.Mined(np.array([1, 2]), np.array([0.97, 0.9])),
        positives.Mined(np.array([1]), np.array([0.88])),
    )
    positives.render_positives([anchor], images, captions, path=path, dpi=100, **options)
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert picture is not None
    return picture


def _areas(picture, colour):
    """Areas of the connected parts of one colour, in pixels, from left to right."""
    mask = (picture == colour).all(axis=-1).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    return [int(s[4]) for s in sorted(stats[1:].tolist()) if s[4] > 500]


def test_picture_shows_each_positive_where_it_belongs(tmp_path):
    picture = _draw(tmp_path / "made" / "positives.png")
    side = 115  # 1.15 inches at 100 pixels, less the frame
    (red,), green, (blue,) = (_areas(picture, c) for c in (_RED, _GREEN, _BLUE))
    assert red == pytest.approx(side**2, rel=0.1)
    assert len(green) == 2  # a positive by image and by text
    assert green == pytest.approx([side**2] * 2, rel=0.1)
    assert blue == pytest.approx(side**2 / 2, rel=0.1)  # keeps its shape


def test_only_the_nearest_are_shown(tmp_path):
    picture = _draw(tmp_path / "positives.png", top_k=1)
    assert len(_areas(picture, _GREEN)) == 2 and not _areas(picture, _BLUE)


def test_mistakes_are_named(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    none = positives.Mined(np.array([], int), np.array([]))
    with pytest.raises(UserError, match="no anchor"):
        positives.render_positives([], [image], ["a"], path=tmp_path / "x.png")
    with pytest.raises(UserError, match="example 3, but there are 1 images"):
        positives.render_positives(
            [positives.Anchor(3, none, none)], [image], ["a"], path=tmp_path / "x.png"
        )

"""Segmentation pictures: what is drawn, measured in the pixels."""

import cv2
import numpy as np
import pytest

from trm_jax.types import UserError
from trm_jax.visualize import segmentation

_NAMES = ("aeroplane", "$a_b$ {c}", "boat")
_IMAGE = np.full((60, 80, 3), (200, 100, 50), np.uint8)


def _read(path):
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image


def _labels():
    labels = np.full((60, 80), -1, np.int16)
    labels[10:50, 10:40] = 0
    labels[10:50, 40:70] = 2
    return labels


def test_overlay_mixes_exactly_and_leaves_the_background():
    labels = _labels()
    labels[:5] = -2
    got = segmentation.overlay(_IMAGE, labels, alpha=0.6)
    table = segmentation.colours(3).astype(float)
    grey = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    np.testing.assert_array_equal(
        got[labels == -1], np.tile((200, 100, 50), ((labels == -1).sum(), 1))
    )
    np.testing.assert_allclose(got[30, 20], 0.4 * grey + 0.6 * table[0], atol=1)
    np.testing.assert_allclose(got[30, 60], 0.4 * grey + 0.6 * table[2], atol=1)
    np.testing.assert_allclose(got[2, 20], 0.4 * grey + 0.6 * 150, atol=1)
    # Edges are opaque, also between two classes.
    for place, c in (((10, 20), 0), ((30, 10), 0), ((30, 39), 0), ((30, 40), 2), ((49, 60), 2)):
        np.testing.assert_array_equal(got[place], table[c])


def test_colours_are_stable_and_differ():
    many = segmentation.colours(171)
    np.testing.assert_array_equal(segmentation.colours(20), many[:20])
    lab = cv2.cvtColor(many[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0]
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e3 * np.eye(171)
    assert distance[:20, :20].min() > 25  # a just noticeable difference is about 2.3
    assert distance.min() > 8
    assert (segmentation.colours(2000) > 0).any(axis=1).all()  # they repeat, but do not run out


def test_picture_shows_image_prediction_and_truth(tmp_path):
    labels, truth = _labels(), _labels()
    truth[10:50, 40:70] = 1
    path = segmentation.render_segmentation(
        _IMAGE, labels, _NAMES, path=tmp_path / "made" / "x.png", truth=truth, dpi=100
    )
    picture = _read(path)
    panel, gap, head = 300, 12, 30
    assert picture.shape[1] == 3 * panel + 4 * gap
    left = [gap + i * (panel + gap) for i in range(3)]
    middle = head + round(panel * 60 / 80 / 2)
    expected = [_IMAGE] + [segmentation.overlay(_IMAGE, m) for m in (labels, truth)]
    for x, shown in zip(left, expected, strict=True):
        for column in (4, 25, 55, 76):  # background, two regions, background
            got = picture[middle, x + round((column + 0.5) * panel / 80)]
            np.testing.assert_allclose(got.astype(int), shown[30, column].astype(int), atol=3)
    # The legend has each class of either map once, and nothing is cut off at the edges.
    legend = picture[head + 225 + 12 :]
    for c in range(3):
        # Rows of text are 21 pixels high, swatches 13 x 13.
        assert (
            120 <= (abs(legend.astype(int) - segmentation.colours(3)[c]) <= 2).all(-1).sum() <= 180
        )
    for border in (legend[-4:], legend[:, :8], legend[:, -8:], picture[:4]):
        assert (border == 255).all()


def test_legend_lists_the_largest_first_with_shares():
    labels, truth = _labels(), _labels()
    labels[0, 0] = 1
    truth[:5] = -2
    entries, more = segmentation._entries(labels, truth, _NAMES, 2)
    assert [(name, note) for _, name, note in entries] == [
        ("aeroplane", "25 %, truth 25 %"),
        ("boat", "25 %, truth 25 %"),
        ("not counted", ""),
    ]
    assert more == 1
    entries, more = segmentation._entries(labels, None, ("x" * 40, "b", "c"), 3)
    assert [note for _, _, note in entries] == ["25 %", "25 %", "<1 %"] and more == 0
    assert entries[0][1] == "x" * 27 + "…"
    assert segmentation._accuracy(labels, truth) == "100 % right"
    labels[30:] = 1
    assert segmentation._accuracy(labels, truth) == "45 % right"  # 25 of the 55 rows that count


@pytest.mark.parametrize("size", [(30, 400), (400, 30), (1, 1)])
def test_extreme_shapes_fit(tmp_path, size):
    labels = np.arange(size[0] * size[1]).reshape(size) % 40 - 1
    names = [f"a class with a long name {i}" for i in range(40)]
    image = np.full((*size, 3), 90, np.uint8)
    path = segmentation.render_segmentation(
        image, labels, names, path=tmp_path / "x.png", truth=labels, dpi=60
    )
    picture = _read(path)
    for border in (picture[-3:], picture[:, -5:], picture[:, :5]):
        assert (border == 255).all()


@pytest.mark.parametrize(
    ("image", "labels", "truth", "message"),
    [
        (_IMAGE.astype(np.float32), _labels(), None, "not uint8"),
        (_IMAGE, _labels()[1:], None, r"labels are int16\[59, 80\]"),
        (_IMAGE, _labels().astype(np.float32), None, "not integers"),
        (_IMAGE, _labels() + 1, None, r"labels must lie in -1\.\.2"),
        (_IMAGE, _labels() - 1, None, r"labels must lie in -1\.\.2"),
        (_IMAGE, _labels(), _labels() - 2, r"truth must lie in -2\.\.2"),
    ],
)
def test_refusals(tmp_path, image, labels, truth, message):
    with pytest.raises(UserError, match=message):
        segmentation.render_segmentation(
            image, labels, _NAMES, path=tmp_path / "x.png", truth=truth
        )

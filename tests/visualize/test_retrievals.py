"""Pictures of retrievals: hits and misses by colour, attention on grids and boxes."""

import cv2
import numpy as np
import pytest

from trm_jax.visualize import retrievals
from trm_jax.visualize.retrievals import FoundImage, FoundText

_GREEN, _RED = (11, 122, 59), (184, 50, 31)


def _share(path, colour):
    image = cv2.imread(str(path))[..., ::-1].astype(int)
    return float((np.abs(image - np.asarray(colour)).max(-1) < 12).mean())


def _images(hits):
    white = np.full((30, 40, 3), 255, np.uint8)
    rows = [FoundImage(white, 0.9 - place / 10, hit) for place, hit in enumerate(hits)]
    return [("a dog runs", {"one": rows, "other": rows[::-1]})] * 2


def test_hits_are_green_and_misses_red(tmp_path):
    mixed = retrievals.render_images(_images([True, False]), path=tmp_path / "new" / "a.png")
    assert _share(mixed, _GREEN) > 0.002 and _share(mixed, _RED) > 0.002
    green = _share(mixed, _GREEN)
    # As many frames of each: equal but for the marks below the pictures.
    assert _share(mixed, _RED) == pytest.approx(green, rel=0.2)
    unknown = retrievals.render_images(_images([None, None]), path=tmp_path / "b.png")
    assert _share(unknown, _GREEN) == _share(unknown, _RED) == 0.0


def test_captions_of_an_image_are_written_in_the_same_colours(tmp_path):
    grey = np.full((30, 40, 3), 128, np.uint8)
    texts = [FoundText("a very long caption " * 8, 0.9, True), FoundText("a cat", 0.1, False)]
    path = retrievals.render_texts([(grey, {"run": texts})] * 2, path=tmp_path / "c.png")
    assert _share(path, _GREEN) > _share(path, _RED) > 0.0


def test_attention_lies_where_its_regions_are():
    grid = retrievals.attention_map(np.arange(9.0), (90, 90))
    np.testing.assert_array_equal(grid, np.arange(9).reshape(3, 3))
    boxes = np.asarray([[0, 0, 20, 10], [10, 5, 40, 30]])
    found = retrievals.attention_map(np.asarray([0.25, 0.75]), (30, 40), boxes)
    assert found[2, 2] == 0.25 and found[20, 30] == 0.75 and found[7, 15] == 1.0
    assert found[20, 2] == 0.0 and found.sum() == pytest.approx(0.25 * 200 + 0.75 * 750)
    with pytest.raises(ValueError, match="8 regions"):
        retrievals.attention_map(np.ones(8), (10, 10))

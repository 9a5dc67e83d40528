"""COCO-Object: polygons and run-length codes with pixels worked out by hand, overlaps, crowds."""

import json
import pickle

import numpy as np
import pytest

from tests.data.sources.layouts import make_coco_objects, write_mask, write_photo
from trm_jax.data.sources.coco_object import open_coco_object
from trm_jax.data.sources.subset import has_masks
from trm_jax.types import UserError

# pycocotools 2.0.11 under NumPy 2: its arrays do not know the keyword `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Corners (2, 1) and (6, 4): columns 2 to 5, rows 1 to 3.
_LARGE = [[2, 1, 6, 1, 6, 4, 2, 4]]
_SMALL = [[4, 2, 8, 2, 8, 4, 4, 4]]  # columns 4 to 7, rows 2 and 3
# Column by column: the first three columns of eight rows, without their top pixel.
_CODE = {"size": [8, 10], "counts": [1, 7, 1, 7, 1, 7, 56]}


def _expected(*boxes):
    """-1, and `value` in rows y0:y1, columns x0:x1 of each (value, y0, y1, x0, x1) in turn."""
    mask = np.full((8, 10), -1)
    for value, y0, y1, x0, x1 in boxes:
        mask[y0:y1, x0:x1] = value
    return mask


def _mask(root, *annotations, **options):
    return open_coco_object(make_coco_objects(root, annotations), "test", **options)


def test_a_rectangle_covers_its_pixels(tmp_path):
    source = _mask(tmp_path, (3, _LARGE, 0))
    assert source.class_names == ("person", "car", "toothbrush") and has_masks(source)
    mask = source.semantic_mask(0)
    assert mask.dtype == np.int16
    np.testing.assert_array_equal(mask, _expected((1, 1, 4, 2, 6)))
    assert source.labels.tolist() == [[-1, 1, -1]] and source.ids == ("7",)
    assert source.read(0)["image"].shape == (8, 10, 3) and source.captions(0) == ()


def test_the_smaller_instance_is_in_front_in_any_order(tmp_path):
    expected = _expected((0, 1, 4, 2, 6), (2, 2, 4, 4, 8))
    items = [(1, _LARGE, 0), (90, _SMALL, 0)]
    for k, order in enumerate((items, items[::-1])):
        np.testing.assert_array_equal(_mask(tmp_path / str(k), *order).semantic_mask(0), expected)


def test_instances_and_polygons_of_one_class_are_combined(tmp_path):
    expected = _expected((0, 1, 4, 2, 6), (0, 2, 4, 4, 8))
    two = _mask(tmp_path / "a", (1, _LARGE, 0), (1, _SMALL, 0))
    one = _mask(tmp_path / "b", (1, [*_LARGE, *_SMALL], 0))
    for source in (two, one):
        np.testing.assert_array_equal(source.semantic_mask(0), expected)


def test_crowds_lie_behind_instances(tmp_path):
    # The crowd's 21 pixels come after the car's 12, which hide a column of them.
    items = [(3, _LARGE, 0), (1, _CODE, 1)]
    source = _mask(tmp_path, *items)
    np.testing.assert_array_equal(
        source.semantic_mask(0), _expected((0, 1, 8, 0, 3), (1, 1, 4, 2, 6))
    )
    small_crowd = {"size": [8, 10], "counts": [17, 2, 61]}  # column 2, rows 1 and 2
    hidden = _mask(tmp_path, (3, _LARGE, 0), (1, small_crowd, 1))
    np.testing.assert_array_equal(hidden.semantic_mask(0), _expected((1, 1, 4, 2, 6)))
    ignored = _mask(tmp_path, *items, crowd="ignore")
    np.testing.assert_array_equal(
        ignored.semantic_mask(0), _expected((-2, 1, 8, 0, 3), (1, 1, 4, 2, 6))
    )
    with pytest.raises(UserError, match="crowd is 'skip'; it is class or ignore"):
        _mask(tmp_path, *items, crowd="skip")


def test_compressed_codes(tmp_path):
    # COCO's own code of the large rectangle: runs 17 3 5 3 5 3 5 3 36.
    code = {"size": [8, 10], "counts": "a03500000o0"}
    np.testing.assert_array_equal(
        _mask(tmp_path, (1, code, 0)).semantic_mask(0), _expected((0, 1, 4, 2, 6))
    )


def test_an_image_without_annotations_is_background(tmp_path):
    source = pickle.loads(pickle.dumps(_mask(tmp_path)))
    assert len(source) == 1 and (source.semantic_mask(0) == -1).all()
    assert source.labels.tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize(
    "segmentation, message",
    [
        (None, "annotation 0: it has no segmentation"),
        ([], "annotation 0: it has no segmentation"),
        ([[1, 2, 3, 4]], "a polygon is no list x1, y1"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon is no list x1, y1"),
        ([1, 2, 3, 4, 5, 6], "a polygon is no list x1, y1"),
        ([["a"] * 6], "annotation 0: could not convert"),
        ([[0, 0, 1e9, 0, 1e9, 5]], "a polygon leaves its image of 10 x 8 pixels"),
        ([[0, 0, float("nan"), 0, 4, 5]], "a polygon leaves its image"),
        ({"size": [10, 8], "counts": [80]}, r"size \[10, 8\], the image \[h, w\] is \[8, 10\]"),
        ({"size": [8, 10], "counts": [40]}, "covers 40 of 80 pixels"),
        ({"size": [8, 10], "counts": [-1, 81]}, "no list of counts"),
        ({"size": [8, 10], "counts": "P2"}, "does not fill the image"),
        ({"size": [8, 10], "counts": "zzzzzzzzzzzz"}, "annotation 0: Invalid RLE"),
    ],
)
def test_bad_segmentations_are_refused(tmp_path, segmentation, message):
    with pytest.raises(UserError, match=message):
        _mask(tmp_path, (1, segmentation, 0))


def test_stuff_maps_are_read_as_groupvit_does(tmp_path):
    make_coco_objects(tmp_path, [(1, _LARGE, 0)])
    with pytest.raises(UserError, match="neither .*stuffthingmaps/val2017 nor .*annotations/val"):
        open_coco_object(tmp_path, "test", masks="stuff")
    values = np.full((8, 10), 255)
    values[0, :6] = 0, 2, 89, 91, 181, 255  # person, car, toothbrush; stuff twice; unlabelled
    path = tmp_path / "stuffthingmaps" / "val2017" / "007.png"
    write_mask(path, values, palette=False)
    source = open_coco_object(tmp_path, "test", masks="stuff")
    np.testing.assert_array_equal(
        source.semantic_mask(0), _expected((0, 0, 1, 0, 1), (1, 0, 1, 1, 2), (2, 0, 1, 2, 3))
    )
    assert source.labels.tolist() == [[1, -1, -1]]  # of the annotations
    values[3, 3] = 1  # category 2, which this file of annotations lacks
    write_mask(path, values, palette=False)
    with pytest.raises(UserError, match="007.png has the value 1, which is none of the 3 classes"):
        source.semantic_mask(0)
    path.unlink()
    with pytest.raises(UserError, match="007.png of .*instances_val2017.json do not exist"):
        open_coco_object(tmp_path, "test", masks="stuff")
    with pytest.raises(UserError, match="masks is 'panoptic'; it is instances or stuff"):
        open_coco_object(tmp_path, "test", masks="panoptic")


def test_photos_may_lie_below_images_and_must_be_there(tmp_path):
    make_coco_objects(tmp_path, [(1, _LARGE, 0)])
    (tmp_path / "images").mkdir()
    (tmp_path / "val2017").rename(tmp_path / "images" / "val2017")
    source = open_coco_object(tmp_path, "test")
    assert source.semantic_mask(0).max() == 0
    source.image_path(0).unlink()
    with pytest.raises(UserError, match="007.jpg of .*instances_val2017.json do not exist"):
        open_coco_object(tmp_path, "test")
    with pytest.raises(UserError, match="neither .*train2017 nor .*train2017 is a folder"):
        open_coco_object(tmp_path, "train")


def test_sizes_are_checked(tmp_path):
    source = _mask(tmp_path, (1, _LARGE, 0))
    write_photo(source.image_path(0), 8, 12)
    with pytest.raises(UserError, match="2017.json: the mask has 10 x 8 pixels, .*007.jpg 12 x 8"):
        source.semantic_mask(0)
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    del content["images"][0]["height"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="image 7 has no height and width"):
        open_coco_object(tmp_path, "test")


@pytest.mark.realdata
def test_the_real_subset(data_root):
    source = open_coco_object(data_root / "coco_subset", "test")
    assert len(source) == 159 and len(source.class_names) == 80
    for index in range(0, 159, 8):
        mask = source.semantic_mask(index)
        assert mask.shape == source.read(index)["image"].shape[:2]
        # In these photos nothing hides a class completely, so pixels and labels agree.
        assert set(np.unique(mask[mask >= 0])) == set(np.flatnonzero(source.labels[index] > 0))

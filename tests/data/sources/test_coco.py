"""COCO: labels and captions of a small annotation file, refusals, and the real subset."""

import json
import os

import cv2
import numpy as np
import pytest

from trm_jax.data import partial_labels
from trm_jax.data.sources.coco import CocoImages, read_labels
from trm_jax.types import BadSampleError, UserError


@pytest.fixture
def root(tmp_path):
    """Four images; 30 has no annotation; categories 7 and 3 are listed out of order."""
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.png"} for i in (40, 30, 20, 10)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 40, "category_id": 7},
            {"id": 2, "image_id": 40, "category_id": 7},
            {"id": 3, "image_id": 20, "category_id": 3, "iscrowd": 1},
            {"id": 4, "image_id": 10, "category_id": 7},
            {"id": 5, "image_id": 10, "category_id": 3},
        ],
    }
    (tmp_path / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        (tmp_path / f"annotations/instances_{part}.json").write_text(json.dumps(content))
    texts = [{"image_id": 20, "id": k, "caption": f" text {k} "} for k in (9, 8)]
    (tmp_path / "annotations/captions_train2017.json").write_text(
        json.dumps({"images": [], "annotations": texts})
    )
    cv2.imwrite(str(tmp_path / "train2017" / f"{40:012d}.png"), np.full((4, 6, 3), 9, np.uint8))
    return tmp_path


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_labels_in_category_order_of_annotated_images(root):
    source = CocoImages(root, "train")
    assert source.ids == ("40", "20", "10") and source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [[-1, 1], [1, -1], [1, 1]]
    assert source.labels.dtype == np.int8
    assert source.file_rows.tolist() == [0, 2, 3] and source.num_file_rows == 4
    everything = CocoImages(root, "test", keep_empty=True)
    assert everything.ids == ("40", "30", "20", "10")
    assert everything.labels[1].tolist() == [-1, -1]


def test_hcp_masks_agree_with_and_without_the_empty_images(root):
    masks = [
        partial_labels.observe_source(
            CocoImages(root, "train", keep_empty=keep), protocol="hcp", known_fraction=0.5
        )
        for keep in (True, False)
    ]
    np.testing.assert_array_equal(masks[0][[0, 2, 3]], masks[1])


def test_images_and_captions(root):
    source = CocoImages(root, "train")
    assert source.read(0)["image"].shape == (4, 6, 3)
    with pytest.raises(BadSampleError, match="000000000020.png"):
        source.read(1)
    assert source.captions(1) == ("text 9", "text 8") and source.captions(0) == ()
    assert CocoImages(root, "test").captions(1) == ()


def test_missing_files_are_named_with_the_layout(root, tmp_path):
    with pytest.raises(UserError, match="data.root .*nowhere.*annotations/instances_train2017"):
        CocoImages(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="instances_train2014.json does not exist"):
        CocoImages(root, "train", year="2014")
    (root / "val2017").rmdir()
    with pytest.raises(UserError, match="val2017 does not exist"):
        CocoImages(root, "test")


def test_broken_annotation_files_are_refused(root):
    path = root / "annotations/instances_train2017.json"
    _edit(path, lambda content: content["annotations"][2].update(image_id=99))
    with pytest.raises(UserError, match="annotation 3 is of image 99"):
        read_labels(path)
    _edit(path, lambda content: content["images"].append(content["images"][0]))
    with pytest.raises(UserError, match="lists an image id twice"):
        read_labels(path)
    _edit(path, lambda content: content.pop("categories"))
    with pytest.raises(UserError, match="has no 'categories'"):
        read_labels(path)
    path.write_text('{"images": [')
    with pytest.raises(UserError, match="not a readable JSON"):
        read_labels(path)


def test_a_class_without_a_training_image_is_refused(root):
    for part in ("train", "val"):
        _edit(
            root / f"annotations/instances_{part}2017.json",
            lambda content: content["categories"].append({"id": 5, "name": "horse"}),
        )
    with pytest.raises(UserError, match="no training image of horse"):
        CocoImages(root, "train")
    assert CocoImages(root, "train", allow_empty_classes=True).labels.shape == (3, 3)
    assert CocoImages(root, "test").labels.shape == (3, 3)


@pytest.mark.realdata
def test_the_real_subset():
    root = os.path.join(os.environ["TRM_DATA"], "coco_subset")
    train, test = (CocoImages(root, split) for split in ("train", "test"))
    assert (len(train), train.num_file_rows, len(test)) == (313, 317, 159)
    assert train.labels.shape == (313, 80) and train.class_names[:2] == ("person", "bicycle")
    assert (train.labels > 0).sum() == 1053 and (test.labels > 0).sum() == 620
    assert sum(bool(train.captions(i)) for i in range(313)) == 107
    assert all(train.read(i)["image"].ndim == 3 for i in range(0, 313, 30))

"""Precomputed features: the join with labels and captions, and refusals."""

import json
import os
import pickle

import numpy as np
import pytest

from trm_jax.data.sources.features import (
    CaptionedFeatures,
    FeatureArray,
    LabelledFeatures,
    open_coco_features,
)
from trm_jax.types import UserError


def _grid(num_images):
    return np.arange(num_images * 12, dtype=np.float16).reshape(num_images, 2, 2, 3)


@pytest.fixture
def coco(tmp_path):
    """Features of images 3, 1, 9, 2; the annotations know 1, 2, 3 and 4, and 2 is empty."""
    np.savez(tmp_path / "train2017.npz", image_ids=np.array([3, 1, 9, 2]), grid2=_grid(4))
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3, 4)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category}
            for i, (image, category) in enumerate([(1, 1), (3, 2), (4, 1)])
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(content))
    return tmp_path


def test_join_by_image_id(coco):
    source = open_coco_features(coco, "train", key="grid2")
    assert source.ids == ("3", "1") and source.labels.tolist() == [[-1, 1], [1, -1]]
    assert source.num_without_annotation == 2 and source.num_without_features == 1
    assert source.file_rows.tolist() == [2, 0] and source.num_file_rows == 4
    features = source.read(1)["features"]
    np.testing.assert_array_equal(features, _grid(4)[1].reshape(4, 3))
    assert features.dtype == np.float16 and source.captions(0) == ()
    kept = open_coco_features(coco, "train", key="grid2", keep_empty=True)
    assert kept.ids == ("3", "1", "2") and kept.labels[2].tolist() == [-1, -1]


def test_pickles_without_the_array(coco):
    source = open_coco_features(coco, "train", key="grid2")
    source.read(0)
    data = pickle.dumps(source._features)
    assert len(data) < 400
    np.testing.assert_array_equal(pickle.loads(data)[2], _grid(4)[2].reshape(4, 3))


def test_wrong_features_are_refused(coco):
    with pytest.raises(UserError, match="no array 'grid14'; it has image_ids, grid2"):
        open_coco_features(coco, "train")
    annotations = coco / "annotations/instances_train2017.json"
    bad = _grid(4)
    bad[2, 1, 0, 1] = np.nan
    np.savez(coco / "bad.npz", image_ids=np.arange(4), grid2=bad)
    with pytest.raises(UserError, match="row 2 hold a NaN"):
        LabelledFeatures(coco / "bad.npz", annotations, key="grid2")
    np.savez(coco / "short.npz", image_ids=np.arange(3), grid2=_grid(4))
    with pytest.raises(UserError, match="3 image_ids for 4"):
        LabelledFeatures(coco / "short.npz", annotations, key="grid2")
    np.savez(coco / "other.npz", image_ids=np.arange(50, 54), grid2=_grid(4))
    with pytest.raises(UserError, match="no image id in common"):
        LabelledFeatures(coco / "other.npz", annotations, key="grid2")
    (coco / "broken.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(UserError, match="broken.npz cannot be read"):
        LabelledFeatures(coco / "broken.npz", annotations, key="grid2")
    with pytest.raises(UserError, match="val2017.npz does not exist"):
        open_coco_features(coco, "test")


def test_a_class_without_an_image_is_refused(coco):
    path = coco / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 3, "name": "cow"})
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no training image of cow"):
        open_coco_features(coco, "train", key="grid2")
    source = open_coco_features(coco, "train", key="grid2", allow_empty_classes=True)
    assert source.class_names == ("cat", "dog", "cow")


def test_feature_rank_and_late_infinities(tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    with pytest.raises(UserError, match=r"\[3, 4\], not \[n, r, D\]"):
        FeatureArray(tmp_path / "flat.npy")
    array = np.zeros((1100, 1, 2), np.float16)
    array[1099] = np.inf
    np.save(tmp_path / "inf.npy", array)
    with pytest.raises(UserError, match="row 1099"):
        FeatureArray(tmp_path / "inf.npy")


def _precomp(tmp_path, rows, ids=None, dtype=np.float32, per_image=2):
    """Three images with their captions; features of `rows` rows."""
    array = np.arange(rows * 6, dtype=dtype).reshape(rows, 2, 3)
    np.save(tmp_path / "dev_ims.npy", array)
    texts = [f"image {i} caption {j}" for i in range(3) for j in range(per_image)]
    (tmp_path / "dev_caps.txt").write_text("\n".join(texts) + "\n")
    if ids:
        (tmp_path / "dev_ids.txt").write_text("\n".join(ids) + "\n")
    return CaptionedFeatures(tmp_path, "dev", captions_per_image=per_image)


def test_precomp_layout(tmp_path):
    source = _precomp(tmp_path, 3, ["a", "b", "c"])
    assert source.ids == ("a", "b", "c") and source.labels.shape == (3, 0)
    assert source.captions(2) == ("image 2 caption 0", "image 2 caption 1")
    np.testing.assert_array_equal(source.read(2)["features"], [[12, 13, 14], [15, 16, 17]])
    assert source.nouns_file == tmp_path / "dev_nouns.npz"


@pytest.mark.parametrize(("dtype", "per_image"), [(np.float16, 1), (np.float32, 3)])
def test_precomp_of_any_precision_and_number_of_captions(tmp_path, dtype, per_image):
    source = _precomp(tmp_path, 3, dtype=dtype, per_image=per_image)
    assert source.captions(1)[-1] == f"image 1 caption {per_image - 1}"
    assert len(source) == 3 and len(source.captions(1)) == per_image
    assert source.read(1)["features"].dtype == dtype


def test_precomp_with_one_row_per_caption(tmp_path):
    source = _precomp(tmp_path, 6, [f"{i}" for i in (0, 0, 1, 1, 2, 2)])
    assert source.ids == ("0", "1", "2")
    assert source.read(1)["features"][0, 0] == 2 * 6
    assert _precomp(tmp_path, 6, None).ids == ("0", "1", "2")


def test_precomp_counts_must_agree(tmp_path):
    with pytest.raises(UserError) as error:
        _precomp(tmp_path, 4)
    assert str(error.value) == (
        f"{tmp_path / 'dev_caps.txt'} ends at line 6, caption 2 of 2 of image 3; the 4 rows of "
        "features need 8 lines, 2 per image (or 4, one per row); see "
        "data.options.captions_per_image"
    )
    with pytest.raises(UserError, match="names 2 images"):
        _precomp(tmp_path, 3, ["a", "b"])
    with pytest.raises(UserError, match="line 6, caption 1 of 5 of image 2; .* need 15 lines, 5 "):
        CaptionedFeatures(tmp_path, "dev")
    with pytest.raises(UserError, match="captions_per_image is 0"):
        CaptionedFeatures(tmp_path, "dev", captions_per_image=0)
    (tmp_path / "dev_caps.txt").unlink()
    with pytest.raises(UserError, match="dev_caps.txt does not exist"):
        CaptionedFeatures(tmp_path, "dev")


def test_lines_that_are_no_caption_are_named(tmp_path):
    _precomp(tmp_path, 3)
    path = tmp_path / "dev_caps.txt"
    texts = path.read_text().split("\n")[:6]
    # A blank line in the middle would pair all that follow with the wrong image.
    for lines, line, image in ((texts[:3] + ["", *texts[3:5]], 4, 2), (["", *texts[1:]], 1, 1)):
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(UserError, match=f"caps.txt, line {line}: the caption is empty;.*image"):
            CaptionedFeatures(tmp_path, "dev", captions_per_image=2)
        with pytest.raises(UserError, match=f"none of the 2 captions of image {image}$"):
            CaptionedFeatures(tmp_path, "dev", captions_per_image=2)
    path.write_bytes("\n".join(texts).replace("1 caption 1", "1 na\u00efve").encode("latin-1"))
    with pytest.raises(UserError, match="caps.txt, line 4: not UTF-8"):
        CaptionedFeatures(tmp_path, "dev", captions_per_image=2)
    # Windows' ends of lines and its byte-order mark are none of a caption.
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*texts, "", ""]).encode())
    source = CaptionedFeatures(tmp_path, "dev", captions_per_image=2)
    assert [source.captions(i) for i in range(3)] == [tuple(texts[i : i + 2]) for i in (0, 2, 4)]


def test_features_that_are_no_regions_are_refused(tmp_path):
    for array, reason in (
        (np.zeros((3, 2, 0), np.float32), r"\[3, 2, 0\], not \[n, r, D\]"),
        (np.zeros((3, 2, 4), np.int64), "are int64, not float16 or float32"),
        (np.full((3, 2, 4), None), "cannot be read"),
    ):
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(UserError, match=reason):
            FeatureArray(tmp_path / "bad.npy")


@pytest.mark.realdata
def test_the_real_features():
    data = os.environ["TRM_DATA"]
    source = open_coco_features(
        os.path.join(data, "coco_dense"), "train", annotations=os.path.join(data, "coco_subset")
    )
    assert len(source) == 313 and source.num_without_annotation == 4
    assert source.read(0)["features"].shape == (196, 96)
    source = CaptionedFeatures(os.path.join(data, "flickr8k_precomp"), "train")
    assert len(source) == 6000 and source.read(0)["features"].shape == (36, 96)
    assert all(len(source.captions(i)) == 5 for i in (0, 5999))

"""Features by the names of image files, in every layout."""

from pathlib import Path

import numpy as np
import pytest

from trm_jax.data.feature_files import FeatureFile
from trm_jax.types import BadSampleError, UserError

FEATURES = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


def test_an_npz_is_searched_by_ids_and_by_padded_numbers(tmp_path):
    path = tmp_path / "grid.npz"
    np.savez(path, image_ids=[7, 12, 30], other=FEATURES * 2, grid=FEATURES.reshape(3, 2, 2, 5))
    for name, row in (("000000000012.jpg", 1), ("7.png", 0), ("COCO_val2014_000000000030.jpg", 2)):
        np.testing.assert_array_equal(FeatureFile(str(path)).read(Path(name)), FEATURES[row])
    second = FeatureFile(f"{path}:other")
    np.testing.assert_array_equal(second.read(Path("12.jpg")), 2 * FEATURES[1])
    assert second.boxes(Path("12.jpg"), (10, 10)) is None
    with pytest.raises(BadSampleError, match="has no features"):
        second.read(Path("13.jpg"))
    with pytest.raises(UserError, match="needs image_ids and third"):
        FeatureFile(f"{path}:third")


def test_precomputed_rows_need_their_names_beside_them(tmp_path):
    np.save(tmp_path / "test_ims.npy", FEATURES)
    place = str(tmp_path / "test_ims.npy")
    with pytest.raises(UserError, match="there is no file .*test_ids.txt"):
        FeatureFile(place)
    (tmp_path / "test_ids.txt").write_text("a b.jpg\nc.jpg\n")
    with pytest.raises(UserError, match="names 2 images, .* has 3"):
        FeatureFile(place)
    (tmp_path / "test_ids.txt").write_text("a b.jpg\nc.jpg\nd.jpg\n")
    np.testing.assert_array_equal(FeatureFile(place).read(Path("x/a b.png")), FEATURES[0])


def test_boxes_of_the_detector_are_scaled_to_the_image(tmp_path):
    boxes = np.asarray([[0, 0, 50, 100], [10, 20, 30, 40], [0, 0, 1, 1], [5, 5, 9, 9]], np.float32)
    np.savez(tmp_path / "photo.npz", x=FEATURES[0], bbox=boxes, image_w=50, image_h=100, num_bbox=4)
    found = FeatureFile(str(tmp_path), 2)
    np.testing.assert_array_equal(found.read(Path("photo.jpg")), FEATURES[0, :2])
    scaled = found.boxes(Path("photo.jpg"), (50, 100))
    np.testing.assert_allclose(scaled, [[0, 0, 100, 50], [20, 10, 60, 20]])
    assert found.boxes(Path("none.jpg"), (50, 100)) is None

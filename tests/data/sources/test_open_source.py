"""The table of datasets: names, options and splits are checked in one line each."""

import numpy as np
import pytest

from tests.data.sources.layouts import (
    make_coco_objects,
    make_masked_voc,
    write_image,
    write_mask,
    write_photo,
)
from trm_jax.data.sources import DATASETS, open_source
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.subset import has_masks
from trm_jax.types import UserError


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UserError, match="did you mean 'coco'"):
        open_source("cocoo", "train", root="x")
    with pytest.raises(UserError, match="no split 'dev'"):
        open_source("coco", "dev", root="x")
    with pytest.raises(UserError, match="no option 'yaer'; it has year"):
        open_source("coco", "train", root="x", yaer="2014")
    with pytest.raises(UserError, match="data.root is empty"):
        open_source("coco", "train")
    assert "manifest" in DATASETS


def test_options_reach_the_source(tmp_path):
    np.save(tmp_path / "test_ims.npy", np.zeros((2, 1, 3), np.float16))
    (tmp_path / "test_caps.txt").write_text("a\nb\n")
    source = open_source("flickr8k_features", "test", root=str(tmp_path), captions_per_image=1)
    assert isinstance(source, Source) and len(source) == 2


def test_glyph_splits_share_no_scene():
    train, again, test, other = (
        open_source("glyphs", split, train_size=6, test_size=4, image_size=32, seed=seed)
        for split, seed in (("train", 0), ("train", 0), ("test", 0), ("train", 1))
    )
    assert (len(train), len(test)) == (6, 4) and isinstance(train, Source)
    np.testing.assert_array_equal(train.labels, again.labels)
    image = train.read(0)["image"]
    np.testing.assert_array_equal(image, again.read(0)["image"])
    assert (image != test.read(0)["image"]).any() and (image != other.read(0)["image"]).any()


def test_masks_and_class_folders_open_by_name(tmp_path):
    make_masked_voc(tmp_path, {"val": {"a": [[0, 15]]}})
    lists = {"lists": "SegmentationContext", "folder": "SegmentationClassContext"}
    make_masked_voc(tmp_path, {"val": {"a": [[0, 37]]}}, year="2010", **lists)
    make_coco_objects(tmp_path, [])
    write_photo(tmp_path / "images" / "a.jpg", 1, 2)
    write_mask(tmp_path / "masks" / "a.png", [[0, 1]])
    (tmp_path / "classes.txt").write_text("cat\n")
    person = {"voc_segmentation": "person", "pascal_context": "person", "masks": "cat"}
    for dataset in ("voc_segmentation", "pascal_context", "masks", "coco_object"):
        source = open_source(dataset, "test", root=str(tmp_path))
        assert isinstance(source, Source) and has_masks(source) and len(source) == 1
        if dataset in person:
            mask = source.semantic_mask(0).tolist()
            assert mask == [[-1, source.class_names.index(person[dataset])]]
    (tmp_path / "classes.txt").write_text("n01 tench\n")
    write_image(tmp_path / "val" / "n01" / "a.jpg", 0)
    folder = open_source("image_folder", "test", root=str(tmp_path))
    assert isinstance(folder, Source) and folder.class_names == ("tench",)
    assert not has_masks(folder)
    with pytest.raises(UserError, match="'masks' has no option 'names'; it has background"):
        open_source("masks", "test", root=str(tmp_path), names="voc")

"""Parts of a source, and the share that is held out."""

import numpy as np
import pytest

from tests.data.sources.layouts import make_coco
from trm_jax.data.partial_labels import observe
from trm_jax.data.sources.base import MaskedSource
from trm_jax.data.sources.coco import CocoImages
from trm_jax.data.sources.glyphs import GlyphScenes
from trm_jax.data.sources.subset import Subset, has_masks, hold_out
from trm_jax.types import UserError


def test_a_subset_reads_the_examples_it_names():
    scenes = GlyphScenes(0, 12, image_size=32)
    part = Subset(scenes, [7, 2])
    assert len(part) == 2 and part.ids == (scenes.ids[7], scenes.ids[2])
    np.testing.assert_array_equal(part.labels, scenes.labels[[7, 2]])
    np.testing.assert_array_equal(part.read(1)["image"], scenes.read(2)["image"])
    assert part.captions(0) == scenes.captions(7)


def test_masks_are_seen_through_parts(tmp_path):
    scenes = GlyphScenes(0, 12, image_size=32)
    part = Subset(Subset(scenes, [7, 2, 5]), [2])
    assert isinstance(scenes, MaskedSource) and has_masks(scenes) and has_masks(part)
    np.testing.assert_array_equal(part.semantic_mask(0), scenes.semantic_mask(5))
    photos = CocoImages(make_coco(tmp_path), "test")
    without = Subset(Subset(photos, [0, 1]), [1])
    assert not has_masks(photos) and not has_masks(without)
    with pytest.raises(UserError, match="no segmentation masks; choose another data.dataset"):
        without.semantic_mask(0)


def test_hold_out_splits_by_image_and_not_by_position():
    scenes = GlyphScenes(0, 400, image_size=32)
    kept, held = hold_out(scenes, 0.25)
    assert sorted(kept.ids + held.ids) == sorted(scenes.ids)
    assert abs(len(held) / 400 - 0.25) < 0.07
    backwards = Subset(scenes, range(399, -1, -1))
    assert set(hold_out(backwards, 0.25)[1].ids) == set(held.ids)


def test_what_is_held_out_says_nothing_about_which_labels_are_known():
    scenes = GlyphScenes(seed=3, size=2000, image_size=32)
    kept, _ = hold_out(scenes, 0.3)
    known = observe(kept.labels, kept.ids, protocol="hash", known_fraction=0.2) != 0
    # 1,400 draws at 20 %: five standard deviations are 0.053.
    assert np.abs(known.mean(0) - 0.2).max() < 0.053

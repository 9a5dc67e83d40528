"""Glyph scenes as regions: boxes, names, held-out synonyms, crops, and the file they make."""

import numpy as np
import pytest

from trm_jax.data.sources import glyph_captions, glyph_regions
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.glyph_font import CATEGORIES, COLOR_NAMES
from trm_jax.data.sources.glyph_regions import RegionImage, crop, scene_regions, write_regions
from trm_jax.data.sources.glyphs import GlyphScenes
from trm_jax.data.sources.labelled_regions import CaptionedRegions, LabelledRegions
from trm_jax.types import UserError


@pytest.fixture(scope="module")
def scenes():
    return GlyphScenes(seed=4, size=60, image_size=64)


@pytest.fixture(scope="module")
def regions(scenes):
    return list(scene_regions(scenes))


def test_boxes_and_words_are_those_of_the_objects(scenes, regions):
    assert [item.name for item in regions] == list(scenes.ids)
    names = glyph_captions.category_words()
    for index, item in enumerate(regions):
        np.testing.assert_array_equal(item.image, scenes.read(index)["image"])
        boxes = scenes.boxes(index)
        assert item.boxes.tolist() == [list(box[1:]) for box in boxes]
        assert [names[name] for name, _ in item.words] == [box[0] for box in boxes]
        colors = [COLOR_NAMES[o.color] for o in scenes.scene(index).objects]
        assert [color for _, color in item.words] == colors
    again = list(scene_regions(scenes, colors=False))
    assert [[w[:1] for w in item.words] for item in regions] == [[*i.words] for i in again]


def test_names_are_drawn_and_synonyms_can_be_held_out():
    scenes = GlyphScenes(seed=1, size=150, image_size=32, clutter=0.0)
    words = glyph_regions.synonyms()
    assert len(words) == len({*words}) and not {*words} & {c.name for c in CATEGORIES}
    held = glyph_regions.held_out_synonyms(0.5, seed=2)
    assert len(held) == round(len(words) / 2) and held < {*words}
    assert held == glyph_regions.held_out_synonyms(0.5, seed=2)
    assert held != glyph_regions.held_out_synonyms(0.5, seed=3)
    assert glyph_regions.held_out_synonyms(0.0) == frozenset()
    assert glyph_regions.held_out_synonyms(1.0) == {*words}

    def names(**options):
        return [own[0] for item in scene_regions(scenes, **options) for own in item.words]

    free, kept, first = names(), names(held_out=held), names(held_out={*words})
    primary = {c.name for c in CATEGORIES}
    # About 500 objects, seven of ten by their first names: four standard deviations are 0.08.
    assert len(free) > 400 and abs(np.mean([name in primary for name in free]) - 0.7) < 0.08
    assert {*free} & held and not {*kept} & held and {*kept} - primary and {*first} <= primary
    # What is held out changes no other name.
    category = glyph_captions.category_words()
    assert (
        [category[a] for a in free] == [category[b] for b in kept] == [category[c] for c in first]
    )
    with pytest.raises(UserError, match="'sun' is no synonym"):
        next(iter(scene_regions(scenes, held_out={"sun"})))
    with pytest.raises(UserError, match="held_out is 1.5"):
        glyph_regions.held_out_synonyms(1.5)


def test_a_crop_is_the_square_around_a_box():
    image = np.zeros((20, 30, 3), np.uint8)
    image[..., 0] = np.arange(30)
    image[..., 1] = np.arange(20)[:, None]
    # 4 x 2 with half of 4 on each side: 8 x 8 around (12, 9).
    square = crop(image, np.asarray([10, 8, 14, 10]), 8, 0.5)
    np.testing.assert_array_equal(square, image[5:13, 8:16])
    # At the corner the square is moved inside; a box larger than the image takes the shorter side.
    np.testing.assert_array_equal(
        crop(image, np.asarray([28, 18, 30, 20]), 4, 0.5), image[16:, 26:]
    )
    np.testing.assert_array_equal(crop(image, np.asarray([0, 0, 30, 20]), 20, 0.5), image[:, 5:25])
    assert crop(image, np.asarray([3, 3, 4, 4]), 16, 0.0).shape == (16, 16, 3)


def _brightness(crops):
    """Features that a test can follow: the mean of each channel, 0 for padding."""
    assert crops.shape[1:] == (16, 16, 3) and crops.dtype == np.uint8
    return crops.astype(np.float32).mean(axis=(1, 2))


def test_the_file_is_read_as_regions_and_beside_captions(scenes, regions, tmp_path):
    path = tmp_path / "a.npz"
    batches = []

    def encode(crops):
        batches.append(len(crops))
        return _brightness(crops)

    write_regions(path, regions, encode, size=16, batch_size=32, made_of={"held": {"b", "a"}})
    assert {*batches} == {32}  # one shape
    source = LabelledRegions(path)
    assert source.ids == tuple(item.name for item in regions if len(item.boxes))
    captioned = CaptionedRegions(path, scenes)
    assert isinstance(captioned, Source) and captioned.ids == source.ids
    for index, item in enumerate(regions):
        group = source.group(index)
        own = [_brightness(crop(item.image, box, 16, 0.5)[None])[0] for box in item.boxes]
        np.testing.assert_array_equal(group.features, own)
        np.testing.assert_array_equal(group.boxes, item.boxes)
        words = [{source.words[w] for r, w in group.samples if r == k} for k in range(len(own))]
        assert words == [{*pair} for pair in item.words]
        np.testing.assert_array_equal(captioned.read(index)["features"], own)
        assert captioned.captions(index) == scenes.captions(index)
    assert glyph_regions.is_made_of(path, {"held": {"a", "b"}})
    assert not glyph_regions.is_made_of(path, {"held": {"a"}})
    assert not glyph_regions.is_made_of(tmp_path / "b.npz", {})
    path.write_bytes(path.read_bytes()[:-40])
    assert not glyph_regions.is_made_of(path, {"held": {"a", "b"}})


def test_what_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    image = np.zeros((20, 20, 3), np.uint8)
    box = np.asarray([[1, 1, 5, 5]], np.float32)
    good = RegionImage("a", image, box, (("cat",),))
    with pytest.raises(UserError, match="a.npz: the images have no boxes"):
        write_regions(path, [RegionImage("a", image, box[:0], ())], _brightness, size=16)
    two = RegionImage("b", image, box, (("cat", "red"),))
    with pytest.raises(UserError, match="different numbers of words"):
        write_regions(path, [good, two], _brightness, size=16)
    for encode in (
        lambda x: x[:, 0, 0, 0],
        lambda x: _brightness(x)[:5],
        lambda x: x[:, 0, 0] / 0.0,
    ):
        with (
            pytest.raises(UserError, match=r"are not finite numbers \[8, D\]"),
            np.errstate(all="ignore"),
        ):
            write_regions(path, [good], encode, size=16, batch_size=8)
    assert not list(tmp_path.iterdir())

"""Glyph scenes: determinism, agreement of pixels, labels and captions, and the statistics."""

import hashlib
import itertools
import pickle

import numpy as np
import pytest

from trm_jax.data.sources import glyph_captions, glyph_font, glyphs
from trm_jax.data.sources.glyphs import GlyphScenes
from trm_jax.types import UserError


@pytest.fixture(scope="module")
def scenes() -> GlyphScenes:
    return GlyphScenes(seed=0, size=4000)


def test_every_variant_and_distractor_is_a_glyph_of_the_font():
    variants = [point for c in glyph_font.CATEGORIES for point in c.code_points]
    assert len(glyph_font.CATEGORIES) == 40
    assert len(set(variants)) == len(variants)
    assert not set(variants) & set(glyph_font.DISTRACTORS)
    for point in (*variants, *glyph_font.DISTRACTORS):
        assert glyph_font.has_glyph(point), hex(point)
    assert not glyph_font.has_glyph(0x1F984)  # a unicorn: what a missing glyph looks like


def test_bitmaps_keep_their_ink_through_the_pyramid_and_fill_holes():
    full = glyph_font.glyph_bitmap(0x25A1).astype(float)  # a white square
    assert full.shape == (128, 128, 2)
    ink, body = full[..., 0].mean(), full[..., 1].mean()
    assert body > 3 * ink
    for level in (1, 2, 3):
        small = glyph_font.glyph_bitmap(0x25A1, level)
        np.testing.assert_allclose(small.mean(axis=(0, 1)), (ink, body), atol=2)


@pytest.mark.parametrize("size", [14.0, 30.0, 60.0, 100.0])
def test_warp_has_the_asked_size_and_centre_and_keeps_area(size):
    patch, left, top = glyph_font.warp_glyph(0x25A0, size, 0.0, 0.0, False, (50.3, 40.8))
    weight = patch[..., 1] / 255.0
    ys, xs = np.mgrid[: patch.shape[0], : patch.shape[1]] + 0.5
    assert weight.sum() == pytest.approx(size**2, rel=0.12)
    assert (weight * xs).sum() / weight.sum() + left == pytest.approx(50.3, abs=0.6)
    assert (weight * ys).sum() / weight.sum() + top == pytest.approx(40.8, abs=0.6)
    turned, _, _ = glyph_font.warp_glyph(0x25A0, size, 30.0, 0.25, True, (50.3, 40.8))
    assert turned[..., 1].sum() / 255.0 == pytest.approx(weight.sum(), rel=0.03)


def test_rotation_is_counter_clockwise():
    # The black up-pointing triangle turned by +90 degrees points left: mass on the right.
    patch, left, _ = glyph_font.warp_glyph(0x25B2, 60.0, 90.0, 0.0, False, (0.0, 0.0))
    columns = patch[..., 0].sum(axis=0).astype(float)
    assert (columns * (np.arange(len(columns)) + left)).sum() / columns.sum() > 3


def test_samples_depend_on_seed_and_index_only(scenes):
    other = pickle.loads(pickle.dumps(GlyphScenes(seed=0, size=50)))
    for index in (0, 7, 49):
        expected = scenes.read(index)["image"]
        other.captions(index), other.masks(index)
        image = other.read(index)["image"]
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        np.testing.assert_array_equal(image, expected)
        assert other.captions(index) == scenes.captions(index)
        assert other.scene(index) == scenes.scene(index)
    np.testing.assert_array_equal(other.labels, scenes.labels[:50])


def test_seeds_and_indices_differ(scenes):
    other = GlyphScenes(seed=1, size=4000)
    assert not np.array_equal(other.labels, scenes.labels)
    assert not np.array_equal(other.read(3)["image"], scenes.read(3)["image"])
    assert not np.array_equal(scenes.read(4)["image"], scenes.read(3)["image"])
    assert len({scenes.scene(index) for index in range(200)}) == 200
    assert not set(other.ids) & set(scenes.ids)
    assert len(set(scenes.ids)) == 4000


def test_layouts_never_change():
    """The package's weights were trained on these layouts: change them, and retrain."""
    source = GlyphScenes(seed=5, size=40)
    rows = [
        (o.category, o.variant, o.color, *(round(1000 * v) for v in (o.x, o.y, o.size)))
        for index in range(40)
        for o in source.scene(index).objects
    ]
    assert hashlib.sha256(repr(rows).encode()).hexdigest() == (
        "bd9720cb5fa880ee2bfd9c4eeb05e877f2f45c4a29e594627947cf3150279a80"
    )


def test_pickle_carries_no_caches(scenes):
    assert scenes.labels.shape == (4000, 40) and len(scenes.ids) == 4000
    assert len(pickle.dumps(scenes)) < 2000


def test_labels_are_the_objects_of_the_layout(scenes):
    for index in range(300):
        present = {o.category for o in scenes.scene(index).objects}
        assert set(np.flatnonzero(scenes.labels[index] == 1)) == present
        assert 1 <= len(scenes.scene(index).objects) <= 6
    assert set(np.unique(scenes.labels)) == {-1, 1}


def test_masks_are_visible_disjoint_and_enclosed_by_boxes(scenes):
    for index in range(150):
        masks, boxes = scenes.masks(index), scenes.boxes(index)
        objects = scenes.scene(index).objects
        assert masks.sum(axis=0).max() == 1
        assert [box[0] for box in boxes] == [o.category for o in objects]
        for mask, (_, x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            assert mask.sum() >= 8
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[y0].any() and mask[y1 - 1].any()
            assert mask[:, x0].any() and mask[:, x1 - 1].any()
        semantic = scenes.semantic_mask(index)
        assert set(np.unique(semantic)) - {-1} == set(np.flatnonzero(scenes.labels[index] == 1))


def test_the_pixels_of_an_object_are_where_its_mask_is():
    """Without clutter, grain apart, an image differs from its background inside the masks only."""
    source = GlyphScenes(seed=2, size=60, clutter=0.0)
    inside, outside = [], []
    for index in range(60):
        if glyph_font.TEXTURES[source.scene(index).background.texture] != "plain":
            continue
        image = source.read(index)["image"].astype(float)
        mask = source.semantic_mask(index) >= 0
        away = np.abs(image - np.median(image[~mask], axis=0)).sum(axis=-1)
        inside.append(away[mask].mean())
        outside.append(away[~mask].mean())
    assert len(inside) >= 5
    assert np.mean(inside) > 3 * np.mean(outside)


def test_image_size_scales_the_same_layout():
    small, large = GlyphScenes(0, 10, image_size=64), GlyphScenes(0, 10, image_size=192)
    for index in range(10):
        assert small.scene(index) == large.scene(index)
        ratio = large.masks(index).sum() / small.masks(index).sum()
        assert ratio == pytest.approx(9.0, rel=0.15)


def test_captions_tell_the_truth(scenes):
    names = glyph_captions.category_words()
    for index in range(600):
        scene = scenes.scene(index)
        counts = np.bincount([o.category for o in scene.objects], minlength=40)
        captions = scenes.captions(index)
        assert len(captions) == 5
        for caption in captions:
            words = caption.split()
            assert 1 <= len(words) <= 16
            mentioned = glyph_captions.mentioned(caption)
            assert 1 <= len(mentioned) <= 3
            for category in mentioned:
                assert scenes.labels[index, category] == 1
            for number, noun in itertools.pairwise(words):
                if number in ("two", "three", "four", "five") and noun in names:
                    expected = ("two", "three", "four", "five").index(number) + 2
                    assert counts[names[noun]] == expected
            for color, noun in itertools.pairwise(words):
                if color in glyph_font.COLOR_NAMES and noun in names:
                    index_of_color = glyph_font.COLOR_NAMES.index(color)
                    assert any(
                        o.category == names[noun] and o.color == index_of_color
                        for o in scene.objects
                    )


def test_relations_hold(scenes):
    """Of "A left of B", with A and B named once in the scene, A is left of B."""
    names, checked = glyph_captions.category_words(), 0
    for index in range(1500):
        where = {}
        for item in scenes.scene(index).objects:
            where.setdefault(item.category, []).append(item)
        for caption in scenes.captions(index):
            for words, axis, sign in (("left of", "x", 1), ("above", "y", 1), ("below", "y", -1)):
                if f" {words} " not in caption:
                    continue
                first, second = caption.split(f" {words} ")
                pair = [
                    where[next(names[w] for w in part.split() if w in names)]
                    for part in (first, second)
                ]
                if len(pair[0]) == len(pair[1]) == 1:
                    a, b = (getattr(items[0], axis) for items in pair)
                    assert sign * (b - a) > 0, caption
                    checked += 1
    assert checked > 50


def test_primary_names_are_the_most_frequent(scenes):
    words = [w for index in range(1000) for c in scenes.captions(index) for w in c.split()]
    primary = {c.name for c in glyph_font.CATEGORIES} | {c.plural for c in glyph_font.CATEGORIES}
    named = [w in primary for w in words if w in glyph_captions.category_words()]
    assert 0.6 < np.mean(named) < 0.8


def test_names_are_single_words_of_one_category_each():
    count = sum(
        len(set(pair)) for c in glyph_font.CATEGORIES for pair in ((c.name, c.plural), *c.synonyms)
    )
    assert len(glyph_captions.category_words()) == count
    assert not set(glyph_captions.category_words()) & set(glyph_font.COLOR_NAMES)
    assert all(len(c.name.split()) == 1 and c.synonyms for c in glyph_font.CATEGORIES)


def test_vocabulary_covers_captions_prompts_and_class_names():
    noisy = GlyphScenes(seed=0, size=2000, caption_noise=0.5)
    vocabulary = noisy.vocabulary()
    assert list(vocabulary) == sorted(set(vocabulary))
    words = {w for index in range(2000) for c in noisy.captions(index) for w in c.split()}
    words |= {"a", "photo", "of", "the", "."} | set(noisy.class_names) | {"one", "two", "three"}
    assert words <= set(vocabulary)
    # The grammar uses nearly all of it: no dead words beside the digits and prompt words.
    assert len(set(vocabulary) - words) < 30


def test_caption_noise_has_the_asked_rate_and_leaves_pixels_alone(scenes):
    noisy = GlyphScenes(seed=0, size=4000, caption_noise=0.3)
    rate = np.mean([noisy.is_noisy(index) for index in range(4000)])
    assert rate == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 4000))
    assert not any(scenes.is_noisy(index) for index in range(200))
    absent = {True: [], False: []}
    for index in range(800):
        captions = noisy.captions(index)
        if not noisy.is_noisy(index):
            assert captions == scenes.captions(index)
        mentioned = {k for c in captions for k in glyph_captions.mentioned(c)}
        wrong = any(noisy.labels[index, k] < 0 for k in mentioned)
        absent[noisy.is_noisy(index)].append(wrong)
    assert np.mean(absent[False]) == 0
    assert 0.35 < np.mean(absent[True]) < 0.6  # half of the noise is another scene's captions
    np.testing.assert_array_equal(noisy.read(1)["image"], scenes.read(1)["image"])
    assert all(GlyphScenes(0, 1, caption_noise=1.0).captions(0))


def test_kinds_of_caption_noise():
    noisy, kinds = GlyphScenes(seed=0, size=1500, caption_noise=1.0), []
    for index in range(1500):
        captions = noisy.captions(index)
        if all(caption in glyph_captions.GENERIC for caption in captions):
            kinds.append("generic")
        elif max(len(caption.split()) for caption in captions) <= 3:
            kinds.append("cut")
        else:
            kinds.append("swapped")
    for kind, rate in (("generic", 0.25), ("cut", 0.25), ("swapped", 0.5)):
        assert kinds.count(kind) / 1500 == pytest.approx(rate, abs=0.05)


def test_frequencies_and_co_occurrence(scenes):
    positive = scenes.labels == 1
    rate = positive.mean(axis=0)
    assert 0.06 < rate.mean() < 0.08
    assert rate.min() > 0.02 and rate.max() < 0.13
    assert 2.4 < positive.sum(axis=1).mean() < 3.2
    lift = (positive.T.astype(float) @ positive) / len(positive) / (rate[:, None] * rate[None, :])
    theme = np.array([glyph_font.THEMES.index(c.theme) for c in glyph_font.CATEGORIES])
    same = (theme[:, None] == theme[None, :]) & ~np.eye(40, dtype=bool)
    names = list(scenes.class_names)
    paired = np.zeros((40, 40), bool)
    for first, second in glyph_font.AFFINITY:
        paired[names.index(first), names.index(second)] = True
    assert np.median(lift[same]) > 1.5
    assert np.median(lift[paired]) > 2.0
    assert np.median(lift[~same & ~paired & ~paired.T & ~np.eye(40, dtype=bool)]) < 0.8


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 0}, "size"),
        ({"image_size": 31}, "image_size"),
        ({"caption_noise": -0.1}, "caption_noise"),
        ({"caption_noise": 1.5}, "caption_noise"),
        ({"caption_noise": float("nan")}, "caption_noise"),
        ({"clutter": -1.0}, "clutter"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(UserError, match=named):
        GlyphScenes(**{"seed": 0, "size": 3, **options})


def test_indices_are_checked(scenes):
    for call in (scenes.read, scenes.captions, scenes.is_noisy, scenes.masks):
        with pytest.raises(IndexError):
            call(4000)


def test_a_curriculum_limits_objects_scales_them_and_drops_attributes():
    whole, easy = (
        GlyphScenes(3, 60, image_size=64),
        GlyphScenes(3, 60, image_size=64, max_objects=1, object_scale=2.0, attributes=False),
    )
    assert all(len(easy.scene(i).objects) == 1 for i in range(60))
    assert max(len(whole.scene(i).objects) for i in range(60)) > 3
    sizes = [easy.scene(i).objects[0].size for i in range(60)]
    assert min(sizes) >= 0.3 and max(sizes) <= 0.92
    words = {word for i in range(60) for text in easy.captions(i) for word in text.split()}
    assert not words & {"red", "green", "blue", "yellow", "small", "tiny", "large", "big"}
    with pytest.raises(UserError, match="max_objects"):
        GlyphScenes(3, 60, max_objects=7)


def test_kept_scenes_are_the_same_and_are_made_once(monkeypatch):
    fresh = GlyphScenes(seed=3, size=4, image_size=32, caption_noise=0.5)
    kept = GlyphScenes(seed=3, size=4, image_size=32, caption_noise=0.5, keep=True)
    made = [(kept.read(i)["image"], kept.captions(i)) for i in range(4)]
    for i, (image, captions) in enumerate(made):
        np.testing.assert_array_equal(image, fresh.read(i)["image"])
        assert captions == fresh.captions(i)
    assert pickle.loads(pickle.dumps(kept))._kept == {}
    monkeypatch.setattr(glyphs, "render", None)
    monkeypatch.setattr(glyph_captions, "caption", None)
    assert all(kept.read(i)["image"] is made[i][0] for i in range(4))
    assert [kept.captions(i) for i in range(4)] == [captions for _, captions in made]
    with pytest.raises(ValueError, match="read-only"):
        made[0][0][0] = 0

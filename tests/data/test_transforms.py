"""Transforms: determinism, ranges, the published policies, hole sizes and probabilities."""

import pickle

import numpy as np
import pytest

from trm_jax.data import image_ops, rand_augment, transforms
from trm_jax.types import UserError


def _image(height=40, width=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("name", transforms.TRANSFORMS)
@pytest.mark.parametrize("shape", [(40, 56), (3, 90), (1, 1), (1, 500)])
def test_output_is_a_function_of_the_generator_alone(name, shape):
    image = _image(*shape)
    before = image.copy()
    transform = pickle.loads(pickle.dumps(transforms.image_transform(name, 32)))
    for seed in range(8):
        first = transform(image, np.random.default_rng(seed))
        assert first.shape == (32, 32, 3) and first.dtype == np.uint8
        np.testing.assert_array_equal(first, transform(image, np.random.default_rng(seed)))
    np.testing.assert_array_equal(image, before)


def test_only_the_transforms_of_evaluation_ignore_the_generator():
    image = _image(64, 64)
    for name in transforms.TRANSFORMS:
        transform = transforms.image_transform(name, 32)
        outputs = {transform(image, np.random.default_rng(seed)).tobytes() for seed in range(4)}
        assert len(outputs) == (1 if name in ("none", "center_crop") else 4)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="data.augment 'tie'"):
        transforms.image_transform("tie", 32)
    with pytest.raises(UserError, match="data.image_size is 0"):
        transforms.image_transform("none", 0)


def test_cutout_fills_one_colour_in_half_of_each_side():
    image = np.zeros((64, 48, 3), np.uint8)
    sides = []
    for seed in range(400):
        hole = transforms.cutout(image, np.random.default_rng(seed)).any(axis=-1)
        rows, columns = hole.any(axis=1).sum(), hole.any(axis=0).sum()
        assert rows <= 32 and columns <= 24
        assert hole.sum() == rows * columns  # a full rectangle
        sides.append((rows / 32, columns / 24))
    sides = np.array(sides)
    assert sides.max() == 1.0 and sides.min() < 0.6
    np.testing.assert_allclose(sides.mean(axis=0), 7 / 8, atol=0.03)


def test_random_resized_crop_draws_the_stated_areas_and_aspects(monkeypatch):
    shapes = []

    def record(image, size):
        shapes.append(image.shape[:2])
        return image

    monkeypatch.setattr(transforms.ops, "resize", record)
    image = _image(200, 200)
    rng = np.random.default_rng(0)
    for _ in range(500):
        transforms.random_resized_crop(image, 32, rng, scale=(0.5, 1.0))
    heights, widths = np.array(shapes).T
    areas, aspects = heights * widths / 200**2, widths / heights
    assert areas.min() > 0.48 and areas.max() <= 1.0
    assert aspects.min() > 0.74 and aspects.max() < 1.35
    assert abs(np.log(aspects).mean()) < 0.03  # neither landscape nor portrait is preferred


def test_random_resized_crop_of_an_extreme_strip_is_central():
    image = np.zeros((10, 1000, 3), np.uint8)
    image[:, 493:507] = 200  # the central 13 columns have aspect 4/3
    crop = transforms.random_resized_crop(image, 8, np.random.default_rng(0), scale=(1.0, 1.0))
    assert np.all(crop == 200)


def test_policy_is_autoaugments_two_tables():
    policy = transforms._POLICY
    assert len(policy) == 50
    assert policy[0] == (("posterize", 0.4, 8 / 9), ("rotate", 0.6, 1.0))
    assert policy[26] == (("rotate", 0.7, 2 / 9), ("translate_x", 0.3, 1.0))
    for sub_policy in policy:
        for name, probability, level in sub_policy:
            assert name in transforms._OPERATIONS
            assert 0 <= probability <= 1 and 0 <= level <= 1


def test_levels_reach_autoaugments_ranges():
    image = _image(33, 33)
    apply = transforms._OPERATIONS
    np.testing.assert_array_equal(apply["posterize"](image, 1.0, 1), image & 0xF0)
    np.testing.assert_array_equal(apply["posterize"](image, 0.0, 1), image)
    np.testing.assert_array_equal(apply["solarize"](image, 1.0, 1), 255 - image)
    flat = np.full((4, 4, 3), 100, np.uint8)
    assert np.all(apply["brightness"](flat, 1.0, -1) == 10)
    assert np.all(apply["brightness"](flat, 1.0, 1) == 190)
    shifted = apply["translate_x"](np.zeros((331, 331, 3), np.uint8), 1.0, 1)
    assert np.all(shifted[:, -150:] == 128) and not shifted[:, :-150].any()
    for name in set(apply) - {"identity", "invert", "equalize", "autocontrast", "solarize"}:
        np.testing.assert_array_equal(apply[name](image, 0.0, 1), image)


def test_rand_augment_draws_all_fourteen_operations(monkeypatch):
    drawn = []
    for name in transforms._OPERATIONS:
        monkeypatch.setitem(
            transforms._OPERATIONS,
            name,
            lambda image, level, sign, name=name: drawn.append((name, level)) or image,
        )
    rng = np.random.default_rng(0)
    for _ in range(200):
        transforms.rand_augment(_image(), rng)
    assert len(drawn) == 400
    assert {name for name, _ in drawn} == set(transforms._OPERATIONS) - {"invert"}
    assert {level for _, level in drawn} == {0.9}


def test_tai_flips_half_and_dualcoop_never(monkeypatch):
    flips = []
    monkeypatch.setattr(transforms.ops, "flip", lambda image: flips.append(1) or image)
    rng = np.random.default_rng(0)
    image = _image(16, 16)
    for _ in range(300):
        transforms.tai(image, 16, rng)
    assert 110 < len(flips) < 190
    flips.clear()
    for _ in range(20):
        transforms.dualcoop(image, 16, rng)
    assert not flips


def test_center_crop_is_the_middle_of_a_larger_square():
    image = _image(256, 320)
    cropped = transforms.center_crop(image, 224, np.random.default_rng(0))
    np.testing.assert_array_equal(cropped, image[16:240, 48:272])
    tall = transforms.center_crop(image.transpose(1, 0, 2), 224, np.random.default_rng(0))
    np.testing.assert_array_equal(tall, image.transpose(1, 0, 2)[48:272, 16:240])
    # 64 of 73 pixels around the middle: the outer 5.5 pixels of the square are out of sight.
    framed = np.zeros((90, 150, 3), np.uint8)
    framed[3:-3, 33:-33] = 255
    assert transforms.center_crop(framed, 64, np.random.default_rng(0)).min() >= 250
    framed[8:-8, 38:-38] = 0
    assert transforms.center_crop(framed, 64, np.random.default_rng(0))[0].max() >= 250


def _applied(monkeypatch):
    """[(operation, level, sign)] that rand_augment_increasing asks for; images stay as they are."""
    drawn = []
    for name in rand_augment._INCREASING:
        monkeypatch.setitem(
            rand_augment._INCREASING,
            name,
            lambda image, level, sign, name=name: drawn.append((name, level, sign)) or image,
        )
    return drawn


def test_increasing_operations_are_drawn_half_of_the_time_at_levels_around_nine(monkeypatch):
    drawn, names = _applied(monkeypatch), set(rand_augment._INCREASING)
    rng = np.random.default_rng(0)
    for _ in range(3000):
        rand_augment.rand_augment_increasing(_image(4, 4), rng)
    assert len(names) == 15
    assert abs(len(drawn) - 3000) < 4 * (6000 * 0.25) ** 0.5  # two draws an image, each by a coin
    counts = np.array([sum(name == one for one, _, _ in drawn) for name in names])
    assert abs(counts - 200).max() < 4 * 200**0.5
    levels = np.array([level for _, level, _ in drawn])
    # N(9, 0.5) above 10 is cut: 2.3 % of it, and the mean falls by 0.5 * 0.0085.
    assert levels.max() == 10.0 and abs((levels == 10.0).mean() - 0.0228) < 0.01
    assert abs(levels.mean() - 8.996) < 0.03 and abs(levels.std() - 0.5) < 0.03
    assert abs(np.mean([sign for _, _, sign in drawn])) < 0.07


def test_levels_are_cut_at_both_ends(monkeypatch):
    drawn = _applied(monkeypatch)
    rng = np.random.default_rng(0)
    for level, end in ((-20.0, 0.0), (40.0, 10.0)):
        drawn.clear()
        rand_augment.rand_augment_increasing(_image(4, 4), rng, probability=1.0, level=level)
        assert [level for _, level, _ in drawn] == [end, end]


@pytest.mark.parametrize(
    ("name", "level", "sign", "operation", "argument"),
    [
        ("rotate", 10.0, 1, "rotate", 30.0),
        ("rotate", 9.0, -1, "rotate", -27.0),
        ("posterize", 0.0, 1, "posterize", 4),
        ("posterize", 9.0, 1, "posterize", 1),  # int(3.6) of the last four bits go
        ("posterize", 10.0, 1, "posterize", 0),
        ("solarize", 0.0, 1, "solarize", 256),
        ("solarize", 9.0, 1, "solarize", 26),  # 256 - int(230.4)
        ("solarize", 10.0, -1, "solarize", 0),
        ("solarize_add", 9.0, 1, "solarize_add", 99),
        ("solarize_add", 10.0, -1, "solarize_add", 110),
        ("color", 9.0, 1, "color", 1.81),
        ("contrast", 9.0, -1, "contrast", 0.19),
        ("brightness", 10.0, -1, "brightness", 0.1),
        ("sharpness", 0.0, -1, "sharpness", 1.0),
        ("translate_x", 10.0, -1, "translate_x", -0.45),
        ("translate_y", 5.0, 1, "translate_y", 0.225),
    ],
)
def test_level_to_argument(monkeypatch, name, level, sign, operation, argument):
    calls = []
    monkeypatch.setattr(
        image_ops, operation, lambda image, value, *fill: calls.append((value, fill)) or image
    )
    rand_augment._INCREASING[name](_image(4, 4), level, sign)
    ((value, fill),) = calls
    assert value == pytest.approx(argument, abs=1e-9)
    moves = operation in ("rotate", "translate_x", "translate_y")
    assert fill == (((124, 116, 104),) if moves else ())


def test_shears_keep_the_corner_and_fill_with_the_mean_colour():
    image = np.full((40, 40, 3), 255, np.uint8)
    shear_x, shear_y = (rand_augment._INCREASING[f"shear_{axis}"] for axis in "xy")
    sheared = shear_x(image, 10.0, -1)  # row y moves to the right by 0.3 (y + 1/2)
    for row in (0, 10, 39):
        outside = (sheared[row] == (124, 116, 104)).all(axis=-1)
        assert abs(outside.sum() - 0.3 * (row + 0.5)) <= 1 and outside[: outside.sum()].all()
    turned = shear_y(image, 10.0, -1).transpose(1, 0, 2)
    assert np.abs(turned.astype(int) - sheared).max() <= 1


def _erased(image, rng, **keywords):
    """The rectangle of changed pixels as (top, left, h, w), None if nothing was erased."""
    changed = (rand_augment.random_erasing(image, rng, **keywords) != image).any(axis=-1)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    if not len(rows):
        return None
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def test_a_quarter_is_erased_within_the_bounds_of_area_and_ratio():
    image, rng = np.zeros((60, 80, 3), np.uint8), np.random.default_rng(0)
    found = [_erased(image, rng) for _ in range(1600)]
    boxes = np.array([box for box in found if box is not None])
    assert abs(len(boxes) - 400) < 4 * (1600 * 3 / 16) ** 0.5
    areas, ratios = boxes[:, 2] * boxes[:, 3] / 4800, boxes[:, 2] / boxes[:, 3]
    assert 0.015 < areas.min() < 0.04 and 0.28 < areas.max() < 0.35
    assert 0.27 < ratios.min() < 0.4 and 2.5 < ratios.max() < 3.7
    assert (boxes[:, 2] < 60).all() and (boxes[:, 3] < 80).all()


def test_erased_pixels_are_noise_around_imagenets_mean():
    image, rng = np.zeros((200, 200, 3), np.uint8), np.random.default_rng(0)
    bounds = {"area": (0.3, 0.3), "ratio": (1.0, 1.0)}
    erased = rand_augment.random_erasing(image, rng, probability=1.0, **bounds)
    values = erased[erased.any(axis=-1)]
    assert abs(len(values) - 110**2) <= 1  # (0.3 * 40000) ** 0.5 = 109.5
    np.testing.assert_allclose(values.mean(axis=0), [123.7, 116.3, 103.5], atol=2.5)
    np.testing.assert_allclose(values.std(axis=0), [58.4, 57.1, 57.4], rtol=0.05)  # cut: a bit less
    assert _erased(image, rng, probability=0.0) is None


def test_groupvit_crops_by_area_flips_half_and_augments_after(monkeypatch):
    shapes, flips = [], []
    resize, flip = image_ops.resize_bilinear, image_ops.flip
    monkeypatch.setattr(
        image_ops, "resize_bilinear", lambda x, size: shapes.append(x.shape[:2]) or resize(x, size)
    )
    monkeypatch.setattr(image_ops, "flip", lambda x: flips.append(x.shape) or flip(x))
    image, rng = _image(200, 200), np.random.default_rng(0)
    for _ in range(400):
        transforms.groupvit(image, 16, rng)
    areas = np.prod(shapes, axis=1) / 200**2
    assert areas.min() > 0.075 and areas.max() <= 1.0
    assert abs(areas.mean() - 0.54) < 0.06  # a little less: the largest crops do not always fit
    assert abs(len(flips) - 200) < 40 and set(flips) == {(16, 16, 3)}

"""Image operations against PIL, or against arithmetic where PIL is not the definition."""

import cv2
import numpy as np
import pytest

from trm_jax.data import image_ops as ops
from trm_jax.data.sources.base import read_image

pil = pytest.importorskip("PIL")
from PIL import Image, ImageEnhance, ImageOps  # noqa: E402


def _photo(height=60, width=80, seed=0):
    """Smooth structure with noise, as photos have it."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image.astype(int) + rng.integers(-8, 9, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture(params=["photo", "flat", "two", "narrow"])
def image(request):
    if request.param == "photo":
        return _photo()
    if request.param == "flat":
        return np.full((5, 7, 3), 90, np.uint8)
    if request.param == "two":
        return np.array([[[0, 10, 255], [3, 10, 254]]], np.uint8)
    return (_photo() // 4 + 100).astype(np.uint8)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ops.equalize, ImageOps.equalize),
        (ops.autocontrast, ImageOps.autocontrast),
        (ops.invert, ImageOps.invert),
        (ops.flip, ImageOps.mirror),
        *[
            (lambda x, b=b: ops.posterize(x, b), lambda x, b=b: ImageOps.posterize(x, b))
            for b in (1, 4, 7, 8)
        ],
        *[
            (lambda x, t=t: ops.solarize(x, t), lambda x, t=t: ImageOps.solarize(x, t))
            for t in (0, 100, 127.5, 256)
        ],
    ],
)
def test_point_operations_equal_pil(image, ours, theirs):
    np.testing.assert_array_equal(ours(image), np.asarray(theirs(Image.fromarray(image))))


@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
def test_enhancements_equal_pil_within_rounding(name, factor):
    image = _photo()
    expected = getattr(ImageEnhance, name.capitalize())(Image.fromarray(image)).enhance(factor)
    difference = getattr(ops, name)(image, factor).astype(int) - np.asarray(expected)
    # PIL truncates where OpenCV rounds, before and after the blend.
    assert abs(difference).max() <= 2
    if factor == 1.0:
        assert not difference.any()


@pytest.mark.parametrize(
    ("ours", "coefficients"),
    [
        (lambda x: ops.translate_x(x, 0.25), (1, 0, 5, 0, 1, 0)),
        (lambda x: ops.translate_y(x, -0.5), (1, 0, 0, 0, 1, -10)),
    ],
)
def test_translations_equal_pil(ours, coefficients):
    image = _photo(20, 20)
    expected = Image.fromarray(image).transform(
        (20, 20), Image.Transform.AFFINE, coefficients, fillcolor=(128, 128, 128)
    )
    np.testing.assert_array_equal(ours(image), np.asarray(expected))


def test_a_quarter_turn_is_exact_and_counter_clockwise():
    image = _photo(21, 21)
    np.testing.assert_array_equal(ops.rotate(image, 90.0), np.rot90(image))
    np.testing.assert_array_equal(ops.rotate(image, 0.0), image)


def test_shears_move_rows_and_columns_about_the_centre():
    image = _photo(21, 21)
    sheared = ops.shear_x(image, 1.0)
    np.testing.assert_array_equal(sheared[10], image[10])
    np.testing.assert_array_equal(sheared[13, :18], image[13, 3:])
    assert np.all(sheared[13, 18:] == 128)
    np.testing.assert_array_equal(
        ops.shear_y(image, 1.0), ops.shear_x(image.transpose(1, 0, 2), 1.0).transpose(1, 0, 2)
    )


@pytest.mark.parametrize("size", [24, 44, 50, 96])
def test_resize_is_close_to_antialiased_bicubic(size):
    image = _photo(60, 80)
    expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    difference = ops.resize(image, size).astype(float) - expected
    assert abs(difference).mean() < 2.0 and abs(difference.mean()) < 0.3


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("size", "mean", "worst", "plain"),
    [(448, 0.75, 2.8, 1.4), (336, 0.9, 3.3, 2.7), (224, 1.0, 2.8, 4.8), (96, 1.7, 4.2, 8.5)],
)
def test_photos_look_as_clips_preprocessing_makes_them(data_root, size, mean, worst, plain):
    """Grey levels between ours and PIL's antialiased bicubic, from the file to the square."""
    files = sorted((data_root / "coco_subset").glob("*2017/*.jpg"))[::2]
    ours, without = [], []
    for file in files:
        image = read_image(file)
        with Image.open(file) as opened:
            decoded = opened.convert("RGB")
        np.testing.assert_array_equal(image, np.asarray(decoded))  # both are libjpeg-turbo's
        expected = np.asarray(decoded.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
        ours.append(abs(ops.resize(image, size) - expected).mean())
        bare = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
        without.append(abs(bare - expected).mean())
    assert np.mean(ours) < mean and max(ours) < worst
    assert np.mean(without) > plain  # antialiasing is what makes the difference


@pytest.mark.parametrize("factor", [1.02, 1.43, 2.44, 2.46, 3.9])
def test_the_smoothing_before_bicubic_leaves_flat_and_slanted_surfaces(factor):
    taps, deviation = ops._smoothing(factor)
    kernel = cv2.getGaussianKernel(taps, deviation)[:, 0]
    np.testing.assert_allclose(kernel.sum(), 1.0, atol=1e-6)
    np.testing.assert_array_equal(kernel, kernel[::-1])
    if taps == 3:
        np.testing.assert_allclose(kernel[0], 0.2 * factor - 0.17, atol=1e-6)
    assert taps == (3 if factor < 2.45 else 5)


def test_growing_sides_are_not_smoothed():
    image = _photo(30, 40)
    expected = cv2.resize(image, (64, 64), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_array_equal(ops.resize(image, 64), expected)


def test_four_channels_warp_to_the_values_of_three():
    image = _photo(64, 64)
    matrix = cv2.getRotationMatrix2D((31.5, 31.5), 27.0, 1.0)
    expected = cv2.warpAffine(image, matrix, (64, 64), borderValue=(128, 128, 128))
    difference = abs(ops.rotate(image, 27.0).astype(int) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.01  # the matrix is inverted once more


def test_resize_keeps_flat_images_and_antialiases():
    np.testing.assert_array_equal(
        ops.resize(np.full((30, 50, 3), 77, np.uint8), 16), np.full((16, 16, 3), 77)
    )
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    for size in (15, 16, 24, 30, 36):  # all ways of shrinking: no stripe may survive as a pattern
        assert ops.resize(stripes, size)[4:-4, 4:-4].std() < 45
    image = _photo(16, 16)
    assert ops.resize(image, 16) is image


def test_fill_leaves_its_input_alone():
    image = _photo(8, 8)
    before = image.copy()
    filled = ops.fill(image, (1, 2, 4, 7), np.array([1, 2, 3]))
    assert np.all(filled[2:7, 1:4] == [1, 2, 3])
    assert (filled != before).any(axis=-1).sum() <= 15
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3, 2.1, 3.4, 5.5])
def test_bilinear_resize_is_near_pils(factor):
    side = 48
    image = _photo(round(side * factor), round(side * factor * 1.2))
    expected = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    difference = np.abs(ops.resize_bilinear(image, side).astype(int) - expected)
    assert difference.mean() < 1.0, difference.mean()


def test_bilinear_resize_keeps_flat_images_and_the_mean():
    flat = np.full((70, 31, 3), 77, np.uint8)
    np.testing.assert_array_equal(ops.resize_bilinear(flat, 16), np.full((16, 16, 3), 77))
    image = _photo(160, 160)
    assert abs(ops.resize_bilinear(image, 20).mean() - image.mean()) < 0.5
    np.testing.assert_array_equal(ops.resize_bilinear(image, 160), image)


def test_solarize_add_moves_dark_values_only():
    values = np.array([[[0, 50, 127], [128, 200, 255]]], np.uint8)
    np.testing.assert_array_equal(
        ops.solarize_add(values, 110), [[[110, 160, 237], [128, 200, 255]]]
    )
    np.testing.assert_array_equal(ops.posterize(values, 0), np.zeros_like(values))

"""RandAugment and random erasing as the library timm has them; GroupViT's recipe uses both.

What "rand-m9-mstd0.5-inc1" stands for: two operations drawn with replacement from those whose
strength grows with the level, each applied half of the time at a level of its own, N(9, 0.5) cut to
[0, 10]. What lies outside of a warped image is the mean colour of ImageNet.
"""

from collections.abc import Callable

import numpy as np

from trm_jax.data import image_ops as ops

Generator = np.random.Generator

# Pixel statistics of ImageNet, RGB in [0, 1].
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_FILL = (124, 116, 104)


def _enhanced(level: float, sign: int) -> float:
    """Factor of an enhancement: 1 +- 0.9 at level 10, and never quite flat."""
    return max(0.1, 1.0 + sign * 0.09 * level)


def _shear_x(image: np.ndarray, amount: float) -> np.ndarray:
    """Unlike image_ops', about the upper edge, so that the image moves as well."""
    matrix = np.array([[1, amount, amount * image.shape[0] / 2], [0, 1, 0]])
    return ops.affine(image, matrix, _FILL)


def _shear_y(image: np.ndarray, amount: float) -> np.ndarray:
    matrix = np.array([[1, 0, 0], [amount, 1, amount * image.shape[1] / 2]])
    return ops.affine(image, matrix, _FILL)


# Operation name -> (image, level in [0, 10], sign -1 or +1) -> image. Posterize keeps 4 bits at
# level 0 and none at 10, where AutoAugment's keeps 8 and 4.
_INCREASING: dict[str, Callable[[np.ndarray, float, int], np.ndarray]] = {
    "autocontrast": lambda image, level, sign: ops.autocontrast(image),
    "equalize": lambda image, level, sign: ops.equalize(image),
    "invert": lambda image, level, sign: ops.invert(image),
    "rotate": lambda image, level, sign: ops.rotate(image, sign * 3.0 * level, _FILL),
    "posterize": lambda image, level, sign: ops.posterize(image, 4 - int(level / 10 * 4)),
    "solarize": lambda image, level, sign: ops.solarize(image, 256 - int(level / 10 * 256)),
    "solarize_add": lambda image, level, sign: ops.solarize_add(image, int(level / 10 * 110)),
    "color": lambda image, level, sign: ops.color(image, _enhanced(level, sign)),
    "contrast": lambda image, level, sign: ops.contrast(image, _enhanced(level, sign)),
    "brightness": lambda image, level, sign: ops.brightness(image, _enhanced(level, sign)),
    "sharpness": lambda image, level, sign: ops.sharpness(image, _enhanced(level, sign)),
    "shear_x": lambda image, level, sign: _shear_x(image, sign * 0.03 * level),
    "shear_y": lambda image, level, sign: _shear_y(image, sign * 0.03 * level),
    "translate_x": lambda image, level, sign: ops.translate_x(image, sign * 0.045 * level, _FILL),
    "translate_y": lambda image, level, sign: ops.translate_y(image, sign * 0.045 * level, _FILL),
}
_NAMES = tuple(_INCREASING)


def rand_augment_increasing(
    image: np.ndarray,
    rng: Generator,
    *,
    count: int = 2,
    probability: float = 0.5,
    level: float = 9.0,
    level_std: float = 0.5,
) -> np.ndarray:
    """`count` operations, each applied with `probability` at a level N(level, level_std).

    Args:
      image: uint8 [h, w, 3].
      rng: all randomness.
      count, probability, level, level_std: see the head of this file; levels are cut to [0, 10].

    Returns:
      uint8 [h, w, 3].
    """
    for index in rng.integers(len(_NAMES), size=count):
        if rng.random() < probability:
            drawn = float(np.clip(rng.normal(level, level_std), 0.0, 10.0))
            sign = 1 if rng.random() < 0.5 else -1
            image = _INCREASING[_NAMES[index]](image, drawn, sign)
    return image


def random_erasing(
    image: np.ndarray,
    rng: Generator,
    *,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """Fills one rectangle with noise, with `probability` (Zhong et al. 2020).

    The noise is N(0, 1) of each value in the space normalised by ImageNet's mean and deviation.
    Pixels are still bytes here, so it is rounded and cut to 0 .. 255, which changes 3 % of it.

    Args:
      image: uint8 [h, w, 3].
      rng: all randomness.
      probability: of erasing at all.
      area: of the rectangle as a share of the image's, uniform.
      ratio: height over width, log-uniform. After ten rectangles that do not fit: none.

    Returns:
      uint8 [h, w, 3].
    """
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        h, w = round(float(np.sqrt(pixels * aspect))), round(float(np.sqrt(pixels / aspect)))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = rng.standard_normal((h, w, 3), np.float32)
            values = np.rint(255.0 * (_MEAN + _STD * noise))
            image = image.copy()
            image[top : top + h, left : left + w] = np.clip(values, 0, 255)
            break
    return image

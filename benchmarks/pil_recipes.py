"""The package's image transforms written with PIL alone, as the programs of peers have them.

They draw from the same distributions as trm_jax.data.transforms, from the same policy table.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from trm_jax.data import transforms

_GREY = (128, 128, 128)
_Generator = np.random.Generator


def none(image: Image.Image, size: int, rng: _Generator) -> Image.Image:
    """Squash to a square."""
    del rng
    return image.resize((size, size), Image.Resampling.BICUBIC)


def flip_crop(image: Image.Image, size: int, rng: _Generator) -> Image.Image:
    """Crop of 0.6 to 1 of the area, and a flip half of the time."""
    return _flip(_crop(image, size, rng, 0.6), rng)


def tai(image: Image.Image, size: int, rng: _Generator) -> Image.Image:
    """A crop, or a squash with a cut-out; one sub-policy of AutoAugment; a flip."""
    if rng.random() < 0.5:
        image = _crop(image, size, rng, 0.5)
    else:
        image = _cutout(none(image, size, rng), rng)
    for name, probability, level in transforms._POLICY[int(rng.integers(50))]:
        if rng.random() < probability:
            image = _OPERATIONS[name](image, level, 1 if rng.random() < 0.5 else -1)
    return _flip(image, rng)


def dualcoop(image: Image.Image, size: int, rng: _Generator) -> Image.Image:
    """Squash, cut-out, RandAugment."""
    image = _cutout(none(image, size, rng), rng)
    names = transforms._RAND_OPERATIONS
    for index in rng.integers(len(names), size=2):
        image = _OPERATIONS[names[index]](image, 0.9, 1 if rng.random() < 0.5 else -1)
    return image


RECIPES: dict[str, Callable[[Image.Image, int, _Generator], Image.Image]] = {
    "none": none,
    "flip_crop": flip_crop,
    "tai": tai,
    "dualcoop": dualcoop,
}


def _flip(image: Image.Image, rng: _Generator) -> Image.Image:
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _crop(image: Image.Image, size: int, rng: _Generator, smallest: float) -> Image.Image:
    area = image.width * image.height * rng.uniform(smallest, 1.0)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width = min(round((area * aspect) ** 0.5), image.width)
    height = min(round((area / aspect) ** 0.5), image.height)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size, size), Image.Resampling.BICUBIC)


def _cutout(image: Image.Image, rng: _Generator) -> Image.Image:
    half = image.width // 4
    x, y = (int(place) for place in rng.integers(image.width, size=2))
    colour = tuple(int(level) for level in rng.integers(0, 256, 3))
    image.paste(colour, (max(x - half, 0), max(y - half, 0), x + half, y + half))
    return image


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients,
        resample=Image.Resampling.BILINEAR,
        fillcolor=_GREY,
    )


def _shear(image: Image.Image, x: float, y: float) -> Image.Image:
    """About the centre."""
    return _affine(image, 1, x, -x * image.height / 2, y, 1, -y * image.width / 2)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=_GREY)


# Operation -> (image, level in [0, 1], sign), with the ranges of transforms._OPERATIONS.
_OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda image, level, sign: image,
    "shear_x": lambda image, level, sign: _shear(image, sign * 0.3 * level, 0),
    "shear_y": lambda image, level, sign: _shear(image, 0, sign * 0.3 * level),
    "translate_x": lambda i, level, sign: _affine(
        i, 1, 0, sign * level * 150 / 331 * i.width, 0, 1, 0
    ),
    "translate_y": lambda i, level, sign: _affine(
        i, 1, 0, 0, 0, 1, sign * level * 150 / 331 * i.height
    ),
    "rotate": lambda image, level, sign: _rotate(image, sign * 30.0 * level),
    "color": lambda i, level, sign: ImageEnhance.Color(i).enhance(1.0 + sign * 0.9 * level),
    "contrast": lambda i, level, sign: ImageEnhance.Contrast(i).enhance(1.0 + sign * 0.9 * level),
    "brightness": lambda i, level, sign: ImageEnhance.Brightness(i).enhance(
        1.0 + sign * 0.9 * level
    ),
    "sharpness": lambda i, level, sign: ImageEnhance.Sharpness(i).enhance(1.0 + sign * 0.9 * level),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 8 - round(4 * level)),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, round(255.0 * (1.0 - level))),
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
}

"""Image transforms of the training recipes: uint8 RGB of any size to uint8 [size, size, 3].

All randomness comes from the generator that the caller passes, so that a sample is a function of
its key alone. Normalisation happens on the device, inside the image tower.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from trm_jax.data import image_ops as ops
from trm_jax.data.rand_augment import rand_augment_increasing, random_erasing
from trm_jax.types import UserError

Generator = np.random.Generator


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """One named transform; picklable. `size` is the side of the output in pixels."""

    name: str
    size: int

    def __call__(self, image: np.ndarray, rng: Generator) -> np.ndarray:
        """uint8 [h, w, 3] to uint8 [size, size, 3]."""
        return TRANSFORMS[self.name](image, self.size, rng)


def image_transform(name: str, size: int) -> ImageTransform:
    """The transform of `data.augment`: one of TRANSFORMS; UserError for an unknown name."""
    if name not in TRANSFORMS:
        raise UserError(f"data.augment '{name}' is unknown; it is one of {', '.join(TRANSFORMS)}")
    if size < 1:
        raise UserError(f"data.image_size is {size}; it must be at least 1")
    return ImageTransform(name, size)


def none(image: np.ndarray, size: int, rng: Generator) -> np.ndarray:
    """Squash to a square, no augmentation: evaluation and cached features."""
    del rng
    return ops.resize(image, size)


def tai(image: np.ndarray, size: int, rng: Generator) -> np.ndarray:
    """TaI-DPT's recipe, which TRM-ML follows.

    Either a random crop of 0.5 to 1 of the area or a squash with a cut-out; then one sub-policy of
    AutoAugment; then a flip half of the time.
    """
    if rng.random() < 0.5:
        image = random_resized_crop(image, size, rng, scale=(0.5, 1.0))
    else:
        image = cutout(ops.resize(image, size), rng)
    image = auto_augment(image, rng)
    return ops.flip(image) if rng.random() < 0.5 else image


def dualcoop(image: np.ndarray, size: int, rng: Generator) -> np.ndarray:
    """DualCoOp's recipe: squash, cut-out, RandAugment; no flip."""
    return rand_augment(cutout(ops.resize(image, size), rng), rng)


def flip_crop(image: np.ndarray, size: int, rng: Generator) -> np.ndarray:
    """A light recipe for small encoders trained from scratch: crop of 0.6 to 1, and a flip."""
    image = random_resized_crop(image, size, rng, scale=(0.6, 1.0))
    return ops.flip(image) if rng.random() < 0.5 else image


def groupvit(image: np.ndarray, size: int, rng: Generator) -> np.ndarray:
    """GroupViT's recipe (Xu et al. 2022), of the library timm.

    A crop of 0.08 to 1 of the area, a flip half of the time, RandAugment "rand-m9-mstd0.5-inc1",
    and random erasing with probability 1/4. The recipe's colour jitter is off under RandAugment.
    """
    image = random_resized_crop(image, size, rng, scale=(0.08, 1.0), resize=ops.resize_bilinear)
    image = ops.flip(image) if rng.random() < 0.5 else image
    return random_erasing(rand_augment_increasing(image, rng), rng)


def center_crop(image: np.ndarray, size: int, rng: Generator) -> np.ndarray:
    """ImageNet's evaluation: the short side to size * 256 / 224, the central square of it."""
    del rng
    # Cut to a square first: a strip would grow beyond all bounds with its short side.
    square = _central(image, min(image.shape[:2]))
    return _central(ops.resize(square, round(size * 256 / 224)), size)


def _central(image: np.ndarray, side: int) -> np.ndarray:
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    resize: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> np.ndarray:
    """A crop of `scale` of the area with an aspect `ratio` (log-uniform), squashed to a square.

    After ten crops that do not fit: the central crop of the nearest allowed aspect. `resize` is
    that of image_ops, bicubic, by default.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        crop_w = round(float(np.sqrt(area * aspect)))
        crop_h = round(float(np.sqrt(area / aspect)))
        if 0 < crop_w <= width and 0 < crop_h <= height:
            left = int(rng.integers(width - crop_w + 1))
            top = int(rng.integers(height - crop_h + 1))
            break
    else:
        aspect = np.clip(width / height, *ratio)
        crop_w = min(width, max(1, round(float(height * aspect))))
        crop_h = min(height, max(1, round(float(width / aspect))))
        left, top = (width - crop_w) // 2, (height - crop_h) // 2
    return (resize or ops.resize)(image[top : top + crop_h, left : left + crop_w], size)


def cutout(image: np.ndarray, rng: Generator, factor: float = 0.5) -> np.ndarray:
    """Fills a rectangle of `factor` of each side with one random colour.

    Its centre is uniform over the image and what lies outside is cut off, so that at factor 0.5
    a hole is 7/8 of its nominal side on average.
    """
    height, width = image.shape[:2]
    half_h, half_w = int(factor * height + 0.5) // 2, int(factor * width + 0.5) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    box = (max(x - half_w, 0), max(y - half_h, 0), min(x + half_w, width), min(y + half_h, height))
    return ops.fill(image, box, rng.integers(0, 256, 3))


# Operation name -> (image, level in [0, 1], sign -1 or +1) -> image, with the ranges of AutoAugment
# (Cubuk et al. 2019, Table 6); 150 of 331 pixels is its largest translation.
_OPERATIONS: dict[str, Callable[[np.ndarray, float, int], np.ndarray]] = {
    "identity": lambda image, level, sign: image,
    "shear_x": lambda image, level, sign: ops.shear_x(image, sign * 0.3 * level),
    "shear_y": lambda image, level, sign: ops.shear_y(image, sign * 0.3 * level),
    "translate_x": lambda image, level, sign: ops.translate_x(image, sign * level * 150 / 331),
    "translate_y": lambda image, level, sign: ops.translate_y(image, sign * level * 150 / 331),
    "rotate": lambda image, level, sign: ops.rotate(image, sign * 30.0 * level),
    "color": lambda image, level, sign: ops.color(image, 1.0 + sign * 0.9 * level),
    "contrast": lambda image, level, sign: ops.contrast(image, 1.0 + sign * 0.9 * level),
    "brightness": lambda image, level, sign: ops.brightness(image, 1.0 + sign * 0.9 * level),
    "sharpness": lambda image, level, sign: ops.sharpness(image, 1.0 + sign * 0.9 * level),
    "posterize": lambda image, level, sign: ops.posterize(image, 8 - round(4 * level)),
    "solarize": lambda image, level, sign: ops.solarize(image, 255.0 * (1.0 - level)),
    "autocontrast": lambda image, level, sign: ops.autocontrast(image),
    "equalize": lambda image, level, sign: ops.equalize(image),
    "invert": lambda image, level, sign: ops.invert(image),
}
# RandAugment's 14 operations (Cubuk et al. 2020): all but invert.
_RAND_OPERATIONS = tuple(name for name in _OPERATIONS if name != "invert")

# Sub-policies of AutoAugment (Cubuk et al. 2019, Tables 7 and 9): operation, probability, level of
# 0 .. 9, twice; repeated rows are repeated in the paper and weigh double.
_IMAGENET = """
posterize .4 8 rotate .6 9; solarize .6 5 autocontrast .6 5; equalize .8 8 equalize .6 3;
posterize .6 7 posterize .6 6; equalize .4 7 solarize .2 4; equalize .4 4 rotate .8 8;
solarize .6 3 equalize .6 7; posterize .8 5 equalize 1 2; rotate .2 3 solarize .6 8;
equalize .6 8 posterize .4 6; rotate .8 8 color .4 0; rotate .4 9 equalize .6 2;
equalize 0 7 equalize .8 8; invert .6 4 equalize 1 8; color .6 4 contrast 1 8;
rotate .8 8 color 1 2; color .8 8 solarize .8 7; sharpness .4 7 invert .6 8;
shear_x .6 5 equalize 1 9; color .4 0 equalize .6 3; equalize .4 7 solarize .2 4;
solarize .6 5 autocontrast .6 5; invert .6 4 equalize 1 8; color .6 4 contrast 1 8;
equalize .8 8 equalize .6 3
"""
_CIFAR10 = """
invert .1 7 contrast .2 6; rotate .7 2 translate_x .3 9; sharpness .8 1 sharpness .9 3;
shear_y .5 8 translate_y .7 9; autocontrast .5 8 equalize .9 2; shear_y .2 7 posterize .3 7;
color .4 3 brightness .6 7; sharpness .3 9 brightness .7 9; equalize .6 5 equalize .5 1;
contrast .6 7 sharpness .6 5; color .7 7 translate_x .5 8; equalize .3 7 autocontrast .4 8;
translate_y .4 3 sharpness .2 6; brightness .9 6 color .2 8; solarize .5 2 invert 0 3;
equalize .2 0 autocontrast .6 0; equalize .2 8 equalize .6 4; color .9 9 equalize .6 6;
autocontrast .8 4 solarize .2 8; brightness .1 3 color .7 0; solarize .4 5 autocontrast .9 3;
translate_y .9 9 translate_y .7 9; autocontrast .9 2 solarize .8 3; equalize .8 8 invert .1 3;
translate_y .7 9 autocontrast .9 1
"""


def _parse(policy: str) -> tuple[tuple[tuple[str, float, float], ...], ...]:
    """Sub-policies as ((operation, probability, level in [0, 1]), ...)."""
    rows = [row.split() for row in policy.replace("\n", " ").split(";")]
    return tuple(
        tuple((row[i], float(row[i + 1]), int(row[i + 2]) / 9.0) for i in (0, 3)) for row in rows
    )


_POLICY = _parse(_IMAGENET) + _parse(_CIFAR10)


def auto_augment(image: np.ndarray, rng: Generator) -> np.ndarray:
    """One of the 50 sub-policies that AutoAugment found for ImageNet and CIFAR-10."""
    for name, probability, level in _POLICY[int(rng.integers(len(_POLICY)))]:
        if rng.random() < probability:
            image = _OPERATIONS[name](image, level, _sign(rng))
    return image


def rand_augment(
    image: np.ndarray, rng: Generator, *, count: int = 2, level: float = 0.9
) -> np.ndarray:
    """`count` operations drawn with replacement, at `level` (RandAugment's N=2, M=9 of 10)."""
    for index in rng.integers(len(_RAND_OPERATIONS), size=count):
        image = _OPERATIONS[_RAND_OPERATIONS[index]](image, level, _sign(rng))
    return image


def _sign(rng: Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


TRANSFORMS: dict[str, Callable[[np.ndarray, int, Generator], np.ndarray]] = {
    "none": none,
    "tai": tai,
    "dualcoop": dualcoop,
    "flip_crop": flip_crop,
    "groupvit": groupvit,
    "center_crop": center_crop,
}

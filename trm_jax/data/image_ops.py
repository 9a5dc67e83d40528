"""Operations on uint8 RGB images [h, w, 3], on OpenCV and numpy, without randomness.

The point operations are those of PIL's ImageOps and ImageEnhance, which AutoAugment and RandAugment
were defined by: equalize, autocontrast, posterize, solarize and invert agree bit for bit.
"""

import cv2
import numpy as np

GREY = (128, 128, 128)
# Variance of the kernel of linear interpolation, in squared pixels.
_LINEAR = 1.0 / 6.0


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Squashes to [size, size, 3], bicubic with antialiasing, as CLIP's preprocessing.

    OpenCV's bicubic does not antialias. Up to a factor of 4 a Gaussian of three or five taps before
    it stands in for the widened kernel, beyond that area averaging takes the place of both. Mean
    difference from PIL's antialiased bicubic on COCO photos, in grey levels of 256: 0.7 at 448 px
    (2.6 on the worst photo), 0.95 at 224, 1.6 at 96; without the Gaussian 1.6 at 448, 5.3 at 224.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    if max(height, width) > 4 * size:
        return _shrink_by_area(image, size)
    (taps_y, sigma_y), (taps_x, sigma_x) = (_smoothing(side / size) for side in (height, width))
    if max(taps_y, taps_x) > 1:
        image = cv2.GaussianBlur(image, (taps_x, taps_y), sigmaX=sigma_x, sigmaY=sigma_y)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def _smoothing(factor: float) -> tuple[int, float]:
    """Taps and deviation of the Gaussian that brings OpenCV's bicubic nearest to PIL's.

    Fitted to COCO photos at factors of 1.02 to 4. Kernels of so few taps are not sampled Gaussians:
    the deviation is a name for the weight of the outer taps, which the fit is linear in.
    """
    if factor <= 1.0:
        return 1, 1.0
    if factor < 2.45:
        outer = 0.2 * factor - 0.17
        return 3, float(0.5 / np.log(1.0 / outer - 2.0)) ** 0.5
    return 5, 0.6 * factor - 0.62


def _shrink_by_area(image: np.ndarray, size: int) -> np.ndarray:
    """Area averaging along the sides that shrink, then bicubic along one that grows."""
    height, width = (min(side, size) for side in image.shape[:2])
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def resize_bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Squashes to [size, size, 3], bilinear with antialiasing, as PIL does.

    PIL widens the linear kernel by the factor of a side that shrinks; here a Gaussian before
    OpenCV's linear interpolation brings the sum of variances to the same. Beyond a factor of 4,
    area averaging to twice the size goes before. Mean difference from PIL on COCO photos at 224
    px, in grey levels of 256: 0.5 (1.1 on the worst photo); without the Gaussian 5.1.
    """
    height, width = image.shape[:2]
    if max(height, width) > 4 * size:
        height, width = (2 * size if side > 4 * size else side for side in (height, width))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if (height, width) == (size, size):
        return image
    if max(height, width) > size:
        sigmas = [(_LINEAR * max((side / size) ** 2 - 1.0, 0.0)) ** 0.5 for side in (width, height)]
        taps = [1 + 2 * int(np.ceil(2.0 * sigma)) for sigma in sigmas]
        image = cv2.GaussianBlur(
            image, taps, sigmaX=max(sigmas[0], 0.1), sigmaY=max(sigmas[1], 0.1)
        )
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def affine(image: np.ndarray, matrix: np.ndarray, fill: tuple[int, int, int] = GREY) -> np.ndarray:
    """Warps about the image centre, bilinear; the colour `fill` outside.

    matrix: [2, 3], maps centred output coordinates (x, y, 1) to centred input coordinates.
    """
    height, width = image.shape[:2]
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    linear = np.asarray(matrix, np.float64)[:, :2]
    shift = np.asarray(matrix, np.float64)[:, 2] + centre - linear @ centre
    # Four channels warp three times as fast as three, to the same values.
    warped = cv2.warpAffine(
        cv2.cvtColor(image, cv2.COLOR_RGB2RGBA),
        np.column_stack([linear, shift]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


def shear_x(image: np.ndarray, amount: float) -> np.ndarray:
    """Row y moves by amount * y."""
    return affine(image, np.array([[1, amount, 0], [0, 1, 0]]))


def shear_y(image: np.ndarray, amount: float) -> np.ndarray:
    """Column x moves by amount * x."""
    return affine(image, np.array([[1, 0, 0], [amount, 1, 0]]))


def translate_x(image: np.ndarray, amount: float, fill: tuple[int, int, int] = GREY) -> np.ndarray:
    """Moves by amount * width; a positive amount shows what is further right."""
    return affine(image, np.array([[1, 0, amount * image.shape[1]], [0, 1, 0]]), fill)


def translate_y(image: np.ndarray, amount: float, fill: tuple[int, int, int] = GREY) -> np.ndarray:
    """Moves by amount * height; a positive amount shows what is further down."""
    return affine(image, np.array([[1, 0, 0], [0, 1, amount * image.shape[0]]]), fill)


def rotate(image: np.ndarray, degrees: float, fill: tuple[int, int, int] = GREY) -> np.ndarray:
    """Turns about the centre, counter-clockwise for positive degrees."""
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    return affine(image, np.array([[cos, -sin, 0], [sin, cos, 0]]), fill)


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Saturation: 0 is greyscale, 1 the image."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return _blend(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is the mean grey level everywhere, 1 the image."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _blend(np.full_like(image, mean), image, factor)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is black, 1 the image."""
    return _blend(np.zeros_like(image), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """0 is smoothed by a 3 x 3 kernel, 1 the image; the outermost pixels stay as they are."""
    # PIL's kernel is ones with a 5 in the middle, over 13: 9/13 of the mean of the nine pixels and
    # 4/13 of the image.
    weight = (1.0 - factor) * 9.0 / 13.0
    sharp = cv2.addWeighted(image, 1.0 - weight, cv2.blur(image, (3, 3)), weight, 0.0)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        sharp[edge] = image[edge]
    return sharp


def invert(image: np.ndarray) -> np.ndarray:
    """255 - value."""
    return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the `bits` highest bits of each value; bits 0 (black) to 8."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts the values that are at least `threshold`."""
    chosen = (image >= int(np.ceil(threshold))).view(np.uint8)
    return image ^ np.negative(chosen)  # 255 where chosen, and 255 - v is v ^ 255


def solarize_add(image: np.ndarray, amount: int) -> np.ndarray:
    """Adds `amount` to the values below 128, to at most 255."""
    return np.where(image < 128, cv2.add(image, np.full_like(image, amount)), image)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to 0 .. 255; a constant channel stays as it is."""
    rows = image.reshape(len(image), -1)  # whole rows: numpy is slow along an axis of three
    low = rows.min(axis=0).reshape(-1, 3).min(axis=0).astype(np.float64)
    high = rows.max(axis=0).reshape(-1, 3).max(axis=0).astype(np.float64)
    values = np.arange(256.0)[:, None]
    scale = 255.0 / np.maximum(high - low, 1.0)
    stretched = np.clip(np.trunc(values * scale - low * scale), 0, 255)
    return _lookup(image, np.where(high > low, stretched, values))


def equalize(image: np.ndarray) -> np.ndarray:
    """Flattens the histogram of each channel."""
    tables = []
    for channel in range(3):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        below = np.cumsum(counts) - counts
        tables.append(np.minimum((step // 2 + below) // step, 255) if step else np.arange(256))
    return _lookup(image, np.stack(tables, axis=-1))


def flip(image: np.ndarray) -> np.ndarray:
    """Left becomes right."""
    return cv2.flip(image, 1)


def fill(image: np.ndarray, box: tuple[int, int, int, int], value: np.ndarray) -> np.ndarray:
    """A copy with the pixels of box (x0, y0, x1, y1; x1, y1 excluded) set to `value` [3]."""
    x0, y0, x1, y1 = box
    image = image.copy()
    if x0 < x1 and y0 < y1:
        colour = [int(level) for level in value]
        cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), colour, cv2.FILLED)
    return image


def _blend(low: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """low + factor * (image - low), rounded and clipped."""
    return cv2.addWeighted(image, factor, low, 1.0 - factor, 0.0)


def _lookup(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table [256, 3], one column for each channel, applied to every value."""
    return cv2.LUT(image, np.ascontiguousarray(table, np.uint8)[None])

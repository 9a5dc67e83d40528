"""Zero-shot semantic segmentation: mIoU of a grouping model from class embeddings alone.

`segmentation_windows` has the protocol. Labels are int16: a foreground class, -1 background, -2
(truth only) not counted. A channel axis of size K holds the background first, where the protocol
has one: K = C + 1, else K = C.
"""

import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from trm_jax.evaluate import segmentation_windows as windows
from trm_jax.evaluate.segmentation_windows import Protocol, Segment
from trm_jax.types import BadSampleError, UserError

_DIGITS = 20  # bits of a count that one int32 carries through a sum over processes


@typing.runtime_checkable
class MaskSource(typing.Protocol):
    """What is needed of a source with ground truth; data.sources.base.MaskedSource has it all."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C foreground classes."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Mapping[str, np.ndarray]:
        """{"image": uint8 [H, W, 3] RGB, ..}; raises BadSampleError."""
        ...

    def semantic_mask(self, index: int) -> np.ndarray:
        """int16 [H, W]: the class of a pixel, -1 background, -2 not counted."""
        ...


class Counts(NamedTuple):
    """What was counted over an evaluation set, by all processes."""

    confusion: np.ndarray  # int64 [K, K]: pixels by truth (rows) and prediction (columns)
    images: int
    skipped: int  # images that could not be read


def evaluate(
    segment: Segment, classes: ArrayLike, source: MaskSource, **options: Any
) -> dict[str, float]:
    """`metrics` of a whole set; arguments and errors as `count`."""
    protocol = options.get("protocol", Protocol())
    counts = count(segment, classes, source, **options)
    values = metrics(counts.confusion, background=protocol.has_background)
    return values | {"images": counts.images, "images_skipped": counts.skipped}


def metrics(confusion: np.ndarray, *, background: bool) -> dict[str, float]:
    """mIoU, pixel_accuracy and, with `background`, IoU_background, in per cent.

    Classes that neither the truth nor the prediction has anywhere are left out of the mean.

    Args:
        confusion: int64 [K, K], of `Counts`; channel 0 is the background if `background`.
        background: as the protocol's `has_background`.
    """
    ious = class_ious(confusion)
    present = ious[~np.isnan(ious)]
    right = 100.0 * float(np.trace(confusion)) / max(int(confusion.sum()), 1)
    values = {"mIoU": float(present.mean()) if present.size else 0.0, "pixel_accuracy": right}
    if background:
        values["IoU_background"] = float(np.nan_to_num(ious[0]))
    return values


def class_ious(confusion: np.ndarray) -> np.ndarray:
    """[K] float64: intersection over union of every channel, in per cent; NaN where it is 0/0."""
    right = np.diagonal(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
    return np.where(union > 0, 100.0 * right / np.maximum(union, 1), np.nan)


def count(
    segment: Segment,
    classes: ArrayLike,
    source: MaskSource,
    *,
    protocol: Protocol = Protocol(),
    process_index: int = 0,
    process_count: int = 1,
    sum_over_processes: Callable[[np.ndarray], np.ndarray] = np.asarray,
    to_host: Callable[[Any], Any] = jax.device_get,
    threads: int = 8,
) -> Counts:
    """Segments every image of `source` and counts pixels by truth and prediction.

    Args:
        segment: {"image": uint8 [n, window, window, 3]} -> "groups" [n, G, d] and "embedding"
            [n, d] of unit norm, "assignment" [n, h, w, G] (soft, both stages multiplied) and
            "logit_scale" [] (1/tau); jitted, with the parameters bound. It is given numpy rows of
            this process, always batch_size of them, and puts them on the devices as it likes.
        classes: [C, d] unit norm, in the order of `source.class_names`.
        source: images and truth. Images that raise BadSampleError are skipped and counted. Without
            a background the truth's -1 is not counted.
        protocol: see `Protocol`.
        process_index, process_count: this process takes every process_count-th image. All
            processes make the same number of calls of `segment`.
        sum_over_processes: int32 array -> its sum over the processes.
        to_host: maps a pytree of batch rows to numpy, of this process or of all in their order
            (see `evaluate.multilabel.evaluate`).
        threads: that read images, and as many that assemble windows.

    Raises:
        UserError: no image can be read, a mask holds an unknown class or has another size than its
            image, the classes do not fit, a field of the protocol is out of range, or an affinity
            is not finite.
    """
    classes = windows.check(protocol, classes)
    if len(classes) != len(source.class_names):
        raise UserError(
            f"{len(classes)} class embeddings for the {len(source.class_names)} classes of the data"
        )
    background = protocol.has_background
    total = np.zeros((len(classes) + background,) * 2, np.int64)
    seen = skipped = 0

    def read(index: int):
        try:
            sample, truth = source.read(index), source.semantic_mask(index)
        except BadSampleError:
            return None
        if "image" not in sample:
            raise UserError(f"segmentation needs images; the data has {sorted(sample)}")
        if truth.shape != sample["image"].shape[:2]:
            raise UserError(
                f"the mask of image {index} is {list(truth.shape)} and the image "
                f"{list(sample['image'].shape[:2])}: they must have the same size"
            )
        return windows.plan(sample["image"], protocol), truth, index

    def readable():
        nonlocal skipped
        for item in _in_threads(read, range(process_index, len(source), process_count), threads):
            if item is None:
                skipped += 1
            else:
                yield item

    def tally(item) -> np.ndarray:
        (plan, truth, index), results = item
        labels = _labels(*windows.assemble(plan, results, protocol)[:2], background)
        return confusion_matrix(truth, labels, len(classes), background=background, name=index)

    def everywhere(rows: bool) -> bool:
        if process_count == 1:
            return rows
        return bool(sum_over_processes(np.asarray(rows, np.int32)) > 0)

    dispatch = windows.dispatcher(segment, classes, protocol, to_host, process_index)
    done = windows.results(readable(), dispatch, protocol, everywhere)
    for part in _in_threads(tally, done, threads):
        total += part
        seen += 1
    flat = np.concatenate([total.ravel(), np.asarray([seen, skipped], np.int64)])
    flat = _exact_sum(flat, sum_over_processes)
    if not flat[-2]:
        raise UserError("the segmentation set has no readable image: check data.root and the split")
    return Counts(flat[:-2].reshape(total.shape), int(flat[-2]), int(flat[-1]))


def confusion_matrix(
    truth: np.ndarray, labels: np.ndarray, classes: int, *, background: bool, name: object = ""
) -> np.ndarray:
    """int64 [K, K]: pixels of one image by truth (rows) and label (columns).

    Args:
        truth: [H, W] int: a class, -1 background (not counted unless `background`), -2 not counted.
        labels: [H, W] int: a class, or -1 if `background`.
        classes: C.
        background: whether channel 0 is the background.
        name: of the image, for the message.

    Raises:
        UserError: `truth` holds a number that is no class.
    """
    if truth.min() < -2 or truth.max() >= classes:
        wrong = truth.min() if truth.min() < -2 else truth.max()
        raise UserError(
            f"the mask of image {name} holds {wrong}: it may hold the classes 0..{classes - 1}, "
            "-1 (background) and -2 (not counted)"
        )
    size, known = classes + background, truth >= -int(background)
    pairs = (truth[known].astype(np.int64) + background) * size + labels[known] + background
    return np.bincount(pairs, minlength=size * size).reshape(size, size)


def label_map(
    segment: Segment, classes: ArrayLike, image: np.ndarray, protocol: Protocol = Protocol()
) -> np.ndarray:
    """int16 [H, W]: the class of every pixel of one image uint8 [H, W, 3], -1 background.

    Other arguments and errors as `count`.
    """
    logits, used, _ = _one_image(segment, classes, image, protocol)
    return _labels(logits, used, protocol.has_background)


def class_scores(
    segment: Segment, classes: ArrayLike, image: np.ndarray, protocol: Protocol = Protocol()
) -> np.ndarray:
    """float32 [H, W, K], whose arg-max `label_map` is: mean affinities, with TTA probabilities.

    Arguments and errors as `label_map`.
    """
    logits, used, rest = _one_image(segment, classes, image, protocol)
    channels = len(np.asarray(classes)) + protocol.has_background
    scores = np.repeat(rest[..., None], channels, axis=-1)
    scores[..., used] = logits
    return scores


def _one_image(segment: Segment, classes: ArrayLike, image: np.ndarray, protocol: Protocol):
    """`windows.assemble` of one image."""
    classes = windows.check(protocol, classes)
    dispatch = windows.dispatcher(segment, classes, protocol, jax.device_get, 0)
    (((plan,), results),) = windows.results(
        [(windows.plan(image, protocol),)], dispatch, protocol, bool
    )
    return windows.assemble(plan, results, protocol)


def _labels(logits: np.ndarray, used: np.ndarray, background: bool) -> np.ndarray:
    """int16 [H, W]: the channel of the highest score, as a label."""
    return (used - int(background)).astype(np.int16)[logits.argmax(axis=-1)]


def _in_threads(function: Callable[[Any], Any], items: Iterable, threads: int) -> Iterator:
    """function(item) of every item, in order, a few items ahead; errors are raised here."""
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        ahead: deque = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > max(threads, 1):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _exact_sum(counts: np.ndarray, sum_over_processes) -> np.ndarray:
    """Sum of int64 `counts` over the processes, by int32 digits: JAX has no int64 by default."""
    mask = 2**_DIGITS - 1
    digits = np.stack([counts & mask, counts >> _DIGITS & mask, counts >> 2 * _DIGITS])
    low, middle, high = np.asarray(sum_over_processes(digits.astype(np.int32)), np.int64)
    return low + (middle << _DIGITS) + (high << 2 * _DIGITS)

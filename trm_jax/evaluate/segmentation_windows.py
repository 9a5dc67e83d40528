"""The windows of zero-shot segmentation: cut, batched, run on the device, put together again.

`segmentation` is what users call. Here is the protocol of GroupViT and SimCon: an image is resized
and cut into overlapping windows. In each window every pixel belongs to one of G groups, and a group
has an affinity to every class. The affinities of overlapping windows are averaged and resized to
the image's own size. The public code runs one image at a time; here the windows of several images
and views fill batches of one fixed size. The device returns only group numbers and affinities.

A channel axis of size K holds the background first, where the protocol has one: K = C + 1, else
K = C.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float

from trm_jax.types import Array, Batch, UserError

Segment = Callable[[Batch], Mapping[str, Any]]
Result = tuple[np.ndarray, np.ndarray]  # of a window: group [S, S], affinity [G, K]

_OUTPUTS = ("groups", "assignment", "embedding", "logit_scale")
_CHANNELS = 64  # cv2.resize takes at most 128 at once


class Protocol(NamedTuple):
    """How images are cut into windows and how affinities become labels; sizes are in pixels.

    `window` is the model's input. An image that is smaller on a side is mirrored at its lower or
    right edge up to the window, so that its scale stays (mmsegmentation feeds smaller crops, which
    would need a compilation per shape).
    """

    short_side: int = 448  # images are resized to this, the ratio kept ..
    long_side: int = 2048  # .. unless the long side would exceed this
    window: int = 448
    stride: int = 224
    top_classes: int = 5  # per window, nearest to its mean embedding; the others have affinity 0
    background_threshold: float | None = 0.95  # VOC, COCO-Object; 0.35 Context; None or 0: none
    tta: bool = False  # test-time augmentation: both flips of every scale
    tta_scales: tuple[float, ...] = (0.5, 0.75, 1.0)  # of (long_side, tta_short_side)
    tta_short_side: int = 512
    batch_size: int = 32  # windows per batch and process

    @property
    def has_background(self) -> bool:
        """Whether there is a background channel."""
        return self.background_threshold is not None and self.background_threshold > 0


def affinities(
    groups: Float[Array, "n G d"],
    embedding: Float[Array, "n d"],
    classes: Float[Array, "C d"],
    logit_scale: Float[Array, ""],
    *,
    top_classes: int,
    background_threshold: float | None,
) -> Float[Array, "n G K"]:
    """Affinity of every group of a window to every channel, in [0, 1].

    With a = logit_scale * cos(group, class): softmax(a) times the softmax of a over the
    `top_classes` classes nearest to the window's mean embedding (0 for the others). The background
    has 1 for a group whose highest affinity is below min(threshold, the window's highest), so
    that at least one group stays foreground, and 0 for others.

    Args:
        groups, embedding, classes: unit norm; computed in float32.
        logit_scale: 1/tau.
        top_classes: at least 1; C or more means all.
        background_threshold: None: no background channel, K = C.
    """
    classes = classes.astype(jnp.float32)
    dot = functools.partial(jnp.einsum, precision="highest")
    logits = logit_scale * dot("ngd,cd->ngc", groups.astype(jnp.float32), classes)
    nearness = dot("nd,cd->nc", embedding.astype(jnp.float32), classes)
    _, nearest = lax.top_k(nearness, min(top_classes, len(classes)))
    kept = jax.nn.one_hot(nearest, len(classes), dtype=bool).any(axis=1)[:, None, :]
    chosen = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    affinity = jax.nn.softmax(logits, axis=-1) * chosen
    if background_threshold is None:
        return affinity
    # The barrier keeps XLA from computing it twice with other roundings: the highest must stay the
    # highest in the comparison.
    affinity = lax.optimization_barrier(affinity)
    best = affinity.max(axis=-1, keepdims=True)
    limit = jnp.minimum(background_threshold, best.max(axis=1, keepdims=True))
    return jnp.concatenate([(best < limit).astype(jnp.float32), affinity], axis=-1)


def check(protocol: Protocol, classes: ArrayLike) -> np.ndarray:
    """`classes` as float32 [C, d]; UserError if they or the protocol cannot be used."""
    array = np.asarray(jax.device_get(classes), np.float32)
    if array.ndim != 2 or not array.size:
        raise UserError(f"class embeddings have the shape {list(array.shape)}, not [C, d]")
    if not np.isfinite(array).all():
        raise UserError(
            "class embeddings are not finite: the model's training has diverged; lower "
            "optimizer.learning_rate"
        )
    for name in ("short_side", "long_side", "window", "stride", "top_classes", "batch_size"):
        if getattr(protocol, name) < 1:
            raise UserError(f"segmentation: {name} is {getattr(protocol, name)}; at least 1")
    if protocol.stride > protocol.window:
        raise UserError(
            f"segmentation: stride {protocol.stride} is larger than the window "
            f"{protocol.window} and would leave pixels out"
        )
    sides = [protocol.tta_short_side * scale for scale in protocol.tta_scales]
    if protocol.tta and (not sides or min(sides) < 1):
        raise UserError(f"segmentation: tta_scales {protocol.tta_scales} leave no image")
    return array


@functools.partial(jax.jit, static_argnames=("window", "top_classes", "background_threshold"))
def _reduce(output, classes, *, window: int, top_classes: int, background_threshold: float | None):
    """What the host needs of a batch: "group" [n, S, S] uint and "affinity" [n, G, K]."""
    soft = jnp.asarray(output["assignment"], jnp.float32)
    n, _, _, G = soft.shape
    soft = jax.image.resize(soft, (n, window, window, G), "bilinear")
    affinity = affinities(
        output["groups"],
        output["embedding"],
        classes,
        jnp.asarray(output["logit_scale"], jnp.float32),
        top_classes=top_classes,
        background_threshold=background_threshold,
    )
    return {
        "group": soft.argmax(axis=-1).astype(jnp.uint8 if G <= 256 else jnp.uint16),
        "affinity": affinity,
    }


class View(NamedTuple):
    """One resized, maybe flipped image and the upper left corners of its windows."""

    flip: bool
    shape: tuple[int, int]
    corners: list[tuple[int, int]]


class Plan(NamedTuple):
    """An image as views, and all their windows uint8 [S, S, 3] in order."""

    shape: tuple[int, int]
    views: list[View]
    crops: list[np.ndarray]


def plan(image: np.ndarray, protocol: Protocol) -> Plan:
    """The views and windows of `image`."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"the image is {image.dtype}{list(image.shape)}, not uint8 [H, W, 3]")
    sides = [(protocol.short_side, protocol.long_side)]
    if protocol.tta:
        both = (protocol.tta_short_side, protocol.long_side)
        sides = [(int(both[0] * s), int(both[1] * s)) for s in protocol.tta_scales]
    height, width = image.shape[:2]
    size, views, crops = protocol.window, [], []
    for short, long in sides:
        factor = min(short / min(height, width), long / max(height, width))
        h, w = (max(1, int(side * factor + 0.5)) for side in (height, width))
        resized = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
        corners = [(y, x) for y in _starts(h, protocol) for x in _starts(w, protocol)]
        for flip in (False, True) if protocol.tta else (False,):
            view = resized[:, ::-1] if flip else resized
            below, right = max(size - h, 0), max(size - w, 0)
            if below or right:
                view = cv2.copyMakeBorder(view, 0, below, 0, right, cv2.BORDER_REFLECT_101)
            views.append(View(flip, (h, w), corners))
            crops += [view[y : y + size, x : x + size] for y, x in corners]
    return Plan((height, width), views, crops)


def _starts(length: int, protocol: Protocol) -> list[int]:
    """Where windows begin along a side, as mmsegmentation's slide_inference places them."""
    last = max(length - protocol.window, 0)
    return [min(start, last) for start in range(0, last + protocol.stride, protocol.stride)]


def dispatcher(segment: Segment, classes: np.ndarray, protocol: Protocol, to_host, process: int):
    """A function that starts a batch uint8 [n, S, S, 3], and returns one that awaits its rows."""
    threshold = protocol.background_threshold if protocol.has_background else None

    def dispatch(images: np.ndarray, rows: int) -> Callable[[], list[Result]]:
        output = segment({"image": images})
        out = _reduce(
            {name: output[name] for name in _OUTPUTS},
            classes,
            window=protocol.window,
            top_classes=protocol.top_classes,
            background_threshold=threshold,
        )

        def fetch() -> list[Result]:
            host = {name: np.asarray(array) for name, array in to_host(out).items()}
            if len(host["group"]) > len(images):  # the rows of all processes
                first = process * len(images)
                host = {name: array[first:] for name, array in host.items()}
            if not np.isfinite(host["affinity"][:rows]).all():
                raise UserError(
                    "the segmentation has affinities that are not finite: the model diverged or "
                    "precision.compute is too low; evaluate an earlier checkpoint"
                )
            return list(zip(host["group"][:rows], host["affinity"][:rows], strict=True))

        return fetch

    return dispatch


def results(
    items: Iterable[tuple], dispatch, protocol: Protocol, everywhere: Callable[[bool], bool]
) -> Iterator[tuple[tuple, list[Result]]]:
    """Yields each of `items` (its first entry a plan) with the results of its windows, in order."""
    waiting: deque[tuple[tuple, list[Result]]] = deque()

    def crops() -> Iterator[np.ndarray]:
        for item in items:
            waiting.append((item, []))
            yield from item[0].crops

    for result in _one_behind(crops(), dispatch, protocol.batch_size, protocol.window, everywhere):
        item, results = waiting[0]
        results.append(result)
        if len(results) == len(item[0].crops):
            yield waiting.popleft()


def _one_behind(crops: Iterator[np.ndarray], dispatch, size: int, window: int, everywhere):
    """Yields the results of `crops` in batches of `size`; the device has the next one meanwhile."""
    fetch = None
    while True:
        rows = list(itertools.islice(crops, size))
        images = np.zeros((size, window, window, 3), np.uint8)
        for image, row in zip(images, rows, strict=False):
            image[:] = row
        going = everywhere(bool(rows))
        following = dispatch(images, len(rows)) if going else None
        if fetch is not None:
            yield from fetch()
        if following is None:
            return
        fetch = following


def assemble(
    plan: Plan, results: list[Result], protocol: Protocol
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores at the image's size of the channels that any window gives more than 0.

    Returns (scores [H, W, U] float32, channels [U] ascending, score [H, W] of any other channel).
    Few classes are among the nearest of some window, so this is far less than [H, W, K].
    """
    tables = np.stack([affinity for _, affinity in results])
    used = np.flatnonzero((tables > 0).any(axis=(0, 1)))
    used = used if len(used) else np.zeros(1, np.int64)
    others = tables.shape[-1] - len(used)
    windows = zip([group for group, _ in results], tables[..., used], strict=True)
    total = np.zeros((*plan.shape, len(used)), np.float32)
    rest = np.zeros(plan.shape, np.float32)
    for view in plan.views:
        logits = _average(view, windows, len(used))
        logits = _resized(logits[:, ::-1] if view.flip else logits, plan.shape)
        if protocol.tta:
            powers = np.exp(logits)
            norm = powers.sum(axis=-1) + others  # exp(0) each
            logits = powers / norm[..., None]
            rest += 1.0 / norm / len(plan.views)
        total += logits / len(plan.views)
    return total, used, rest


def _average(view: View, windows: Iterator[Result], channels: int) -> np.ndarray:
    """[h, w, U] of one view: the mean over the windows that cover a pixel; takes its windows."""
    total = np.zeros((*view.shape, channels), np.float32)
    covered = np.zeros((*view.shape, 1), np.float32)
    for y, x in view.corners:
        group, table = next(windows)
        part = total[y : y + len(group), x : x + len(group)]
        part += np.take(table, group[: part.shape[0], : part.shape[1]], axis=0)
        covered[y : y + len(group), x : x + len(group)] += 1.0
    return total / covered


def _resized(logits: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear (half-pixel centres, no antialiasing, as mmsegmentation), any number of channels."""
    parts = []
    for start in range(0, logits.shape[-1], _CHANNELS):
        part = np.ascontiguousarray(logits[..., start : start + _CHANNELS])
        part = cv2.resize(part, shape[::-1], interpolation=cv2.INTER_LINEAR)
        parts.append(part.reshape(*shape, -1))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

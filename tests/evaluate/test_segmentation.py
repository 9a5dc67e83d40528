"""Zero-shot segmentation against pixel loops, hand-worked cases and invariances."""

import threading

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import segmentation as oracle
from trm_jax.evaluate import segmentation
from trm_jax.evaluate import segmentation_windows as windows
from trm_jax.types import BadSampleError, UserError

_S, _G, _C, _D, _CELLS = 16, 4, 7, 6, 4
_BASE = segmentation.Protocol(
    short_side=20, long_side=44, window=_S, stride=8, top_classes=3, batch_size=4
)
_SIZES = ((23, 37), (16, 16), (40, 19), (9, 50), (7, 5))


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


_RNG = np.random.default_rng(0)
_CLASSES = _unit(_RNG.normal(size=(_C, _D))).astype(np.float32)
_TO_GROUP = _RNG.normal(size=(3, _G)) * 8
_TO_TOKEN = _RNG.normal(size=(_CELLS * _CELLS * 3, _G * _D)) * 0.5
_BIAS = _unit(_RNG.normal(size=(_G, _D)))
_TO_EMBEDDING = _RNG.normal(size=(_CELLS * _CELLS * 3, _D)) * 0.05


def _segment_window(window):
    """A model that is linear in the pixels of the window, before its softmax and norms."""
    cell = len(window) // _CELLS
    means = window.reshape(_CELLS, cell, _CELLS, cell, 3).mean(axis=(1, 3)) / 255 - 0.5
    powers = np.exp(means @ _TO_GROUP)
    groups = _unit(_BIAS + (means.ravel() @ _TO_TOKEN).reshape(_G, _D)).astype(np.float32)
    assignment = (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)
    embedding = _unit(groups.mean(axis=0) + means.ravel() @ _TO_EMBEDDING).astype(np.float32)
    return groups, assignment, embedding, np.float32(20.0)


def _segment(batch):
    rows = [_segment_window(row) for row in batch["image"]]
    names = ("groups", "assignment", "embedding")
    output = {name: np.stack([row[i] for row in rows]) for i, name in enumerate(names)}
    return output | {"logit_scale": rows[0][3]}


def _image(size, seed=0):
    """Blobs, so that neighbouring windows differ and groups have extents."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def _expected(image, protocol):
    """The oracle's (scores, margin) under `protocol`."""
    sides = [(protocol.short_side, protocol.long_side)]
    if protocol.tta:
        scales = protocol.tta_scales
        sides = [(int(protocol.tta_short_side * s), int(protocol.long_side * s)) for s in scales]
    return oracle.scores(
        lambda window: [np.asarray(part, np.float64) for part in _segment_window(window)],
        _CLASSES.astype(np.float64),
        image,
        resize=lambda x, h, w: cv2.resize(x, (w, h), interpolation=cv2.INTER_LINEAR),
        sides=sides,
        flips=protocol.tta,
        normalise=protocol.tta,
        window=protocol.window,
        stride=protocol.stride,
        top_classes=protocol.top_classes,
        threshold=protocol.background_threshold,
    )


def _compare(image, protocol):
    """Asserts scores within 1e-5 and the labels of clear pixels; returns the labels."""
    expected, margin = _expected(image, protocol)
    assert margin > 1e-6  # or the groups themselves would be a matter of rounding
    got = segmentation.class_scores(_segment, _CLASSES, image, protocol)
    labels = segmentation.label_map(_segment, _CLASSES, image, protocol)
    assert got.shape == expected.shape and got.dtype == np.float32
    assert labels.shape == image.shape[:2] and labels.dtype == np.int16
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    ranked = np.sort(expected, axis=-1)
    clear = ranked[..., -1] - ranked[..., -2] > 1e-4
    assert clear.mean() > 0.95
    wanted = expected.argmax(axis=-1) - int(protocol.has_background)
    np.testing.assert_array_equal(labels[clear], wanted[clear])
    return labels


class _Images:
    """Images of many sizes with random truth; the indices in `bad` cannot be read."""

    class_names = tuple("abcdefg")

    def __init__(self, sizes=_SIZES, bad=()):
        self.sizes, self.bad = sizes, bad

    def __len__(self):
        return len(self.sizes)

    def read(self, index):
        if index in self.bad:
            raise BadSampleError("corrupt")
        return {"image": _image(self.sizes[index], index)}

    def semantic_mask(self, index):
        rng = np.random.default_rng(100 + index)
        coarse = rng.integers(-2, _C - 1, (3, 3)).astype(np.float32)  # class 6 is never true
        height, width = self.sizes[index]
        large = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
        return large.astype(np.int16)


def test_the_oracles_interpolation_is_that_of_opencv_and_jax():
    rng = np.random.default_rng(1)
    x = rng.random((6, 9, 3)).astype(np.float32)
    for height, width in ((13, 20), (5, 7), (6, 9)):
        large = oracle.bilinear(x, height, width)
        np.testing.assert_allclose(cv2.resize(x, (width, height)), large, atol=1e-6)
    up = jax.image.resize(jnp.asarray(x), (13, 20, 3), "bilinear")
    np.testing.assert_allclose(up, oracle.bilinear(x, 13, 20), atol=1e-6)
    pixels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    rounded = cv2.resize(pixels, (20, 13)).astype(float)
    assert abs(rounded - oracle.bilinear(pixels, 13, 20)).max() < 1.0


@pytest.mark.parametrize("size", _SIZES)
def test_scores_and_labels_equal_the_pixel_loops(size):
    labels = _compare(_image(size, 4), _BASE)
    assert len(np.unique(labels)) >= 3  # background and several classes


@pytest.mark.parametrize(
    "change",
    [
        {"background_threshold": 0.3},
        {"background_threshold": None},
        {"top_classes": 1},
        {"top_classes": 50, "stride": 16},
    ],
    ids=str,
)
def test_thresholds_and_top_classes_equal_the_pixel_loops(change):
    protocol = _BASE._replace(**change)
    labels = _compare(_image((23, 37)), protocol)
    background = (labels == -1).mean()
    if protocol.background_threshold is None:
        assert background == 0
    else:  # both occur, so that the threshold is seen to matter
        assert 0.2 < background < 0.8


def test_augmented_scores_equal_the_pixel_loops_and_follow_a_flip():
    protocol = _BASE._replace(tta=True, tta_scales=(0.5, 1.0), tta_short_side=24)
    image = _image((24, 32), 5)
    _compare(image, protocol)
    _compare(_image((9, 50), 5), protocol)  # its long side is limited at every scale
    scores = segmentation.class_scores(_segment, _CLASSES, image, protocol)
    np.testing.assert_allclose(scores.sum(axis=-1), 1.0, atol=1e-5)
    # Sizes halve exactly, so that resizing commutes with the flip to the last bit.
    flipped = np.ascontiguousarray(image[:, ::-1])
    other = segmentation.class_scores(_segment, _CLASSES, flipped, protocol)
    np.testing.assert_allclose(other[:, ::-1], scores, atol=1e-5)
    plain = segmentation.class_scores(_segment, _CLASSES, image, _BASE)
    mirror = segmentation.class_scores(_segment, _CLASSES, flipped, _BASE)
    assert abs(mirror[:, ::-1] - plain).max() > 1e-2  # the model itself is not symmetric


def test_affinities_by_hand():
    classes = jnp.eye(3)
    groups = jnp.asarray([[[1.0, 0, 0], [0, 0.6, 0.8]]])
    embedding = jnp.asarray([[0.8, 0.0, 0.6]])  # nearest: classes 0 and 2

    def affinity(**options):
        values = windows.affinities(groups, embedding, classes, jnp.asarray(2.0), **options)
        return np.asarray(values)[0]

    first = np.exp([2.0, 0, 0]) / np.exp([2.0, 0, 0]).sum()  # 0.787, 0.107, 0.107
    second = np.exp([0, 1.2, 1.6]) / np.exp([0, 1.2, 1.6]).sum()  # 0.108, 0.358, 0.534
    within = [
        np.exp([2.0, 0]) / np.exp([2.0, 0]).sum(),
        np.exp([0, 1.6]) / np.exp([0, 1.6]).sum(),
    ]
    expected = np.array(
        [
            [first[0] * within[0][0], 0, first[2] * within[0][1]],  # highest 0.693
            [second[0] * within[1][0], 0, second[2] * within[1][1]],  # highest 0.444
        ]
    )
    got = affinity(top_classes=2, background_threshold=None)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    # Above the highest affinity the window's own highest takes the threshold's place.
    for threshold, background in ((0.95, [0, 1]), (0.5, [0, 1]), (0.4, [0, 0])):
        got = affinity(top_classes=2, background_threshold=threshold)
        np.testing.assert_allclose(got[:, 1:], expected, atol=1e-6)
        np.testing.assert_array_equal(got[:, 0], background)
    np.testing.assert_allclose(
        affinity(top_classes=9, background_threshold=None), [first**2, second**2], atol=1e-6
    )


def test_windows_lie_where_mmsegmentation_puts_them():
    protocol = segmentation.Protocol()
    plan = windows.plan(np.zeros((448, 700, 3), np.uint8), protocol)
    assert plan.views[0].corners == [(0, 0), (0, 224), (0, 252)]
    for stride in (7, 16):
        small = _BASE._replace(short_side=1, long_side=1000, stride=stride)
        for length in range(1, 70):
            (view,) = windows.plan(np.zeros((1, length, 3), np.uint8), small).views
            assert [x for _, x in view.corners] == oracle.corners(length, _S, stride)
    # VOC's usual size, and one that the long side limits.
    for size, shape in (((375, 500), (448, 597)), ((100, 1000), (205, 2048))):
        assert windows.plan(np.zeros((*size, 3), np.uint8), protocol).views[0].shape == shape
    tta = windows.plan(np.zeros((375, 500, 3), np.uint8), protocol._replace(tta=True))
    assert [(v.flip, v.shape[0]) for v in tta.views] == [
        (flip, short) for short in (256, 384, 512) for flip in (False, True)
    ]


def test_metrics_by_hand():
    # Background, a and b; c is nowhere. Of 12 pixels 2 are not counted.
    truth = np.array([[-1, -1, -1, 0], [0, 0, 0, 1], [1, 1, -2, -2]])
    labels = np.array([[-1, -1, 0, 0], [0, 0, 1, 1], [1, -1, 1, 2]])
    confusion = segmentation.confusion_matrix(truth, labels, 3, background=True)
    by_hand = [[2, 1, 0, 0], [0, 3, 1, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(confusion, by_hand)
    assert confusion.dtype == np.int64
    ious = segmentation.class_ious(confusion)
    np.testing.assert_allclose(ious, [200 / 4, 300 / 5, 200 / 4, np.nan])
    assert segmentation.metrics(confusion, background=True) == pytest.approx(
        {"mIoU": 160 / 3, "pixel_accuracy": 70.0, "IoU_background": 50.0}
    )
    # A class that is predicted but never true has IoU 0 and counts.
    more = segmentation.confusion_matrix(np.array([[1]]), np.array([[2]]), 3, background=True)
    values = segmentation.metrics(confusion + more, background=True)
    assert values["mIoU"] == pytest.approx((50 + 60 + 40 + 0) / 4)
    # Without a background class the truth's -1 is not counted either.
    plain = segmentation.confusion_matrix(truth, labels.clip(0), 3, background=False)
    np.testing.assert_array_equal(plain, [[3, 1, 0], [1, 2, 0], [0, 0, 0]])
    assert set(segmentation.metrics(plain, background=False)) == {"mIoU", "pixel_accuracy"}


@pytest.mark.parametrize("threshold", [0.95, None])
def test_evaluate_equals_the_pixel_loops_and_skips_bad_images(threshold):
    protocol = _BASE._replace(background_threshold=threshold)
    source = _Images(bad=(1,))
    truth, labels = [], []
    for index in (0, 2, 3, 4):
        truth.append(source.semantic_mask(index))
        scores, _ = _expected(source.read(index)["image"], protocol)
        labels.append(scores.argmax(axis=-1) - int(protocol.has_background))
        if threshold is None:
            truth[-1][truth[-1] == -1] = -2
    channels = list(range(-1 if threshold else 0, _C))
    ious = 100 * oracle.ious(truth, labels, channels)
    got = segmentation.evaluate(_segment, _CLASSES, source, protocol=protocol)
    known = np.concatenate([t.ravel() for t in truth]) != -2
    right = np.concatenate([(t == p).ravel() for t, p in zip(truth, labels, strict=True)])[known]
    assert got["mIoU"] == pytest.approx(np.nanmean(ious), abs=0.05)
    assert got["pixel_accuracy"] == pytest.approx(100 * right.mean(), abs=0.05)
    assert (got["images"], got["images_skipped"]) == (4, 1)
    assert ("IoU_background" in got) == (threshold is not None)
    if threshold:
        assert got["IoU_background"] == pytest.approx(ious[0], abs=0.05)
    per_class = segmentation.class_ious(
        segmentation.count(_segment, _CLASSES, source, protocol=protocol).confusion
    )
    np.testing.assert_allclose(per_class, ious, atol=0.1)


def test_batches_and_threads_change_nothing():
    source, calls = _Images(), []

    def segment(batch):
        calls.append(batch["image"].shape)
        return _segment(batch)

    whole = None
    for size, threads in ((1, 1), (3, 2), (8, 8)):
        calls.clear()
        protocol = _BASE._replace(batch_size=size)
        got = segmentation.count(segment, _CLASSES, source, protocol=protocol, threads=threads)
        number = sum(len(windows.plan(source.read(i)["image"], protocol).crops) for i in range(5))
        assert calls == [(size, _S, _S, 3)] * -(-number // size)  # full batches across images
        whole = got if whole is None else whole
        np.testing.assert_array_equal(got.confusion, whole.confusion)
    assert whole is not None
    truth = [source.semantic_mask(index) for index in range(5)]
    assert whole.confusion.sum() == sum(int((mask > -2).sum()) for mask in truth)


class _World:
    """Two processes as threads that meet at every collective."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=30)
        self.slots: list = [None, None]

    def gather(self, process, value):
        self.slots[process] = value
        self.barrier.wait()
        both = list(self.slots)
        self.barrier.wait()
        return both


@pytest.mark.parametrize("gathers_rows", [False, True])
def test_two_processes_sum_to_one(gathers_rows):
    # The second process has less to do and one image that cannot be read.
    source = _Images(sizes=((40, 90), (16, 16), (23, 37), (7, 5), (60, 30)), bad=(3,))
    whole = segmentation.count(_segment, _CLASSES, source, protocol=_BASE)
    world, counts, calls = _World(), {}, [0, 0]

    def run(process):
        def segment(batch):
            calls[process] += 1
            return _segment(batch)

        def to_host(tree):
            tree = jax.device_get(tree)
            if not gathers_rows:
                return tree
            return jax.tree.map(lambda *x: np.concatenate(x), *world.gather(process, tree))

        counts[process] = segmentation.count(
            segment,
            _CLASSES,
            source,
            protocol=_BASE,
            process_index=process,
            process_count=2,
            sum_over_processes=lambda x: np.sum(world.gather(process, x), axis=0),
            to_host=to_host,
        )

    threads = [threading.Thread(target=run, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in (0, 1):
        got = counts[process]
        np.testing.assert_array_equal(got.confusion, whole.confusion)
        assert (got.images, got.skipped) == (whole.images, whole.skipped) == (4, 1)
    assert calls[0] == calls[1]  # or the processes would wait for each other for ever


def test_counts_beyond_int32_are_summed_exactly():
    counts = np.array([0, 2**20 - 1, 3_000_000_017, 2**50 + 12345], np.int64)

    def add(x):
        assert x.dtype == np.int32
        return (x * np.int32(5)).astype(np.int32)

    np.testing.assert_array_equal(segmentation._exact_sum(counts, add), 5 * counts)


def test_half_precision_outputs_are_accepted():
    def segment(batch):
        return {k: jnp.asarray(v, jnp.bfloat16) for k, v in _segment(batch).items()}

    image = _image((23, 37), 6)
    got = segmentation.label_map(segment, _CLASSES, image, _BASE)
    assert (got == segmentation.label_map(_segment, _CLASSES, image, _BASE)).mean() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 17}, "stride 17 is larger than the window 16"),
        ({"short_side": 0}, "short_side is 0"),
        ({"top_classes": 0}, "top_classes is 0"),
        ({"tta": True, "tta_scales": ()}, "tta_scales"),
    ],
)
def test_refuses_protocols(change, message):
    with pytest.raises(UserError, match=message):
        segmentation.label_map(_segment, _CLASSES, _image((7, 5)), _BASE._replace(**change))


def test_refusals():
    def not_finite(batch):
        output = _segment(batch)
        return output | {"groups": np.full_like(output["groups"], np.nan)}

    image = _image((7, 5))
    with pytest.raises(UserError, match="not finite"):
        segmentation.label_map(not_finite, _CLASSES, image, _BASE)
    with pytest.raises(UserError, match="not uint8"):
        segmentation.label_map(_segment, _CLASSES, image.astype(np.float32), _BASE)
    with pytest.raises(UserError, match="class embeddings are not finite.*learning_rate"):
        segmentation.label_map(_segment, _CLASSES * np.nan, image, _BASE)
    with pytest.raises(UserError, match=r"have the shape \[3\], not \[C, d\]"):
        segmentation.label_map(_segment, np.ones(3), image, _BASE)
    with pytest.raises(UserError, match="6 class embeddings for the 7 classes"):
        segmentation.evaluate(_segment, _CLASSES[:6], _Images(), protocol=_BASE)
    source = _Images()
    source.semantic_mask = lambda index: np.zeros((3, 3), np.int16)
    with pytest.raises(UserError, match=r"mask of image 0 is \[3, 3\] and the image \[23, 37\]"):
        segmentation.evaluate(_segment, _CLASSES, source, protocol=_BASE)
    with pytest.raises(UserError, match="no readable image"):
        segmentation.evaluate(_segment, _CLASSES, _Images(bad=range(5)), protocol=_BASE)
    for wrong in (7, -3):
        with pytest.raises(UserError, match=f"mask of image 5 holds {wrong}"):
            segmentation.confusion_matrix(
                np.array([[wrong]]), np.array([[0]]), 7, background=True, name=5
            )

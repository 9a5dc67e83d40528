"""Zero-shot segmentation in plain numpy float64, pixel by pixel, from the specification alone.

Nothing of the package is imported. `segment` is a function of one window: uint8 [S, S, 3] ->
(groups [G, d], assignment [h, w, G], embedding [d], logit_scale). The resizing of an image to its
working size is passed in, since OpenCV rounds uint8 in its own way.
"""

import math

import numpy as np


def softmax(x):
    """Of one vector; -inf gives 0."""
    e = np.exp(x - x.max())
    return e / e.sum()


def bilinear(x, height, width):
    """[h, w, c] -> [height, width, c]: half-pixel centres, the border repeated, no antialiasing."""
    x = np.asarray(x, np.float64)
    out = np.zeros((height, width, x.shape[2]))
    for i in range(height):
        top, bottom, down = _between(i, height, x.shape[0])
        for j in range(width):
            left, right, across = _between(j, width, x.shape[1])
            upper = (1 - across) * x[top, left] + across * x[top, right]
            lower = (1 - across) * x[bottom, left] + across * x[bottom, right]
            out[i, j] = (1 - down) * upper + down * lower
    return out


def _between(i, length, old):
    """The two old positions around the new position i, and the weight of the second."""
    place = (i + 0.5) * old / length - 0.5
    place = min(max(place, 0.0), old - 1.0)
    low = math.floor(place)
    return low, min(low + 1, old - 1), place - low


def mirrored(i, length):
    """Position i of a row that is reflected at its ends, the end itself not repeated."""
    while not 0 <= i < length:
        i = -i if i < 0 else 2 * (length - 1) - i
    return i


def corners(length, window, stride):
    """Starts of the windows: every `stride`, the last one shifted back to end with the image."""
    starts = [0]
    while starts[-1] + window < length:
        starts.append(min(starts[-1] + stride, length - window))
    return starts


def window_scores(segment, classes, window, top_classes, threshold):
    """([S, S, K], smallest margin of the arg-max over groups) of one window."""
    groups, assignment, embedding, scale = segment(window)
    size, C = len(window), len(classes)
    near = [float(embedding @ c) for c in classes]
    nearest = sorted(range(C), key=lambda c: -near[c])[:top_classes]
    A = []
    for g in groups:
        a = np.array([scale * float(g @ c) for c in classes])
        kept = np.array([a[c] if c in nearest else -np.inf for c in range(C)])
        A.append(softmax(a) * softmax(kept))
    A = np.array(A)
    up = bilinear(assignment, size, size)
    out = np.zeros((size, size, C + (threshold is not None)))
    margin = np.inf
    for y in range(size):
        for x in range(size):
            ranked = np.sort(up[y, x])
            margin = min(margin, ranked[-1] - ranked[-2])
            affinity = A[np.argmax(up[y, x])]
            out[y, x, -C:] = affinity
            if threshold is not None and affinity.max() < min(threshold, A.max()):
                out[y, x, 0] = 1.0
    return out, margin


def view_scores(segment, classes, image, *, window, stride, top_classes, threshold):
    """([h, w, K], margin): the mean over the windows of one image at its working size."""
    h, w = image.shape[:2]
    total = np.zeros((h, w, len(classes) + (threshold is not None)))
    times = np.zeros((h, w))
    margin = np.inf
    for y in corners(h, window, stride):
        for x in corners(w, window, stride):
            part = np.zeros((window, window, 3), np.uint8)
            for i in range(window):
                for j in range(window):
                    part[i, j] = image[mirrored(y + i, h), mirrored(x + j, w)]
            scores, least = window_scores(segment, classes, part, top_classes, threshold)
            margin = min(margin, least)
            for i in range(min(window, h - y)):
                for j in range(min(window, w - x)):
                    total[y + i, x + j] += scores[i, j]
                    times[y + i, x + j] += 1
    assert times.min() >= 1
    return total / times[..., None], margin


def working_size(height, width, short_side, long_side):
    """(h, w): the short side as asked, unless the long side would exceed its limit."""
    factor = short_side / min(height, width)
    if max(height, width) * factor > long_side:
        factor = long_side / max(height, width)
    return math.floor(height * factor + 0.5), math.floor(width * factor + 0.5)


def scores(segment, classes, image, *, resize, sides, flips, normalise, **protocol):
    """([H, W, K], margin) at the size of `image`.

    resize: (image, h, w) -> uint8 [h, w, 3]. sides: the (short, long) side of every view. flips:
    whether each is seen mirrored too. normalise: softmax over the channels before the views are
    averaged.
    """
    height, width = image.shape[:2]
    views, margin = [], np.inf
    for short, long in sides:
        small = resize(image, *working_size(height, width, short, long))
        for flip in (False, True) if flips else (False,):
            seen = np.ascontiguousarray(small[:, ::-1]) if flip else small
            logits, least = view_scores(segment, classes, seen, **protocol)
            margin = min(margin, least)
            logits = bilinear(logits, height, width)
            if normalise:
                logits = np.apply_along_axis(softmax, 2, logits)
            views.append(logits[:, ::-1] if flip else logits)
    return np.mean(views, axis=0), margin


def ious(truth, labels, channels):
    """IoU of each of `channels` (labels) over lists of maps; truth -2 is left out; NaN for 0/0."""
    values = []
    for c in channels:
        both = either = 0
        for t, p in zip(truth, labels, strict=True):
            for a, b in zip(t.ravel().tolist(), p.ravel().tolist(), strict=True):
                if a == -2:
                    continue
                both += a == c and b == c
                either += c in (a, b)
        values.append(both / either if either else np.nan)
    return np.array(values)

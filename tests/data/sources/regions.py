"""Small files of region features as bottom-up-attention programs write them."""

import base64

import numpy as np


def region(number, count=4, width=3):
    """(features [count, width], boxes [count, 4]) of image `number`, float32."""
    features = np.arange(count * width, dtype=np.float32).reshape(count, width) + 100 * number
    corners = np.arange(count * 2, dtype=np.float32).reshape(count, 2) + number
    return features, np.concatenate([corners, corners + 5], axis=1)


def line(name, features, boxes, columns=6, size=(50, 33)):
    """One line of a TSV; `size` is (width, height)."""
    cells = [base64.b64encode(np.ascontiguousarray(array, "<f4")) for array in (boxes, features)]
    width, height = (str(value).encode() for value in size)
    count = str(len(features)).encode()
    if columns == 6:
        head = [name.encode(), width, height, count]
    else:
        head = [name.encode(), height, width, b"AA==", b"AA==", b"AA==", b"AA==", count]
    return b"\t".join([*head, *cells]) + b"\n"


def write_tsv(path, names, columns=6, **shape):
    """A TSV of the images `names`, numbered from 0; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (line(name, *region(n, **shape), columns) for n, name in enumerate(names))
    path.write_bytes(b"".join(lines))
    return path


def write_npz(path, number, *, key="x", **shape):
    """The npz file of image `number`; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features, boxes = region(number, **shape)
    # `info` is a pickled dictionary, as bottom-up-attention.pytorch adds it.
    parts = {"bbox": boxes, "num_bbox": len(boxes), "image_w": 50, "image_h": 33}
    np.savez_compressed(path, **{key: features}, **parts, info=np.asarray({"a": 1}, object))
    return path

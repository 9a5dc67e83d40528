"""Tiny tar shards as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json, neighbours."""

import io
import json
import tarfile

import cv2
import numpy as np


def image(number, ending="png", size=(12, 16)):
    """The file of an image whose red is `number`; in a PNG exactly."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[..., 2], pixels[..., 1] = number, np.arange(size[1])  # BGR
    return cv2.imencode(f".{ending}", pixels)[1].tobytes()


def caption(number):
    """Its caption."""
    return f"photo number {number}"


def members(numbers, ending="png"):
    """(name, content) of the members of whole samples."""
    found = []
    for number in numbers:
        key = f"{number:05d}"
        found.append((f"{key}.{ending}", image(number, ending)))
        found.append((f"{key}.json", json.dumps({"caption": f"json {number}"}).encode()))
        found.append((f"{key}.txt", caption(number).encode()))
    return found


def write_tar(path, content, format=tarfile.GNU_FORMAT):
    """A tar of (name, bytes); returns where the header of each member begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = []
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            starts.append(tar.offset)
            tar.addfile(info, io.BytesIO(data))
    return starts


def make_shards(folder, counts=(4, 3, 2)):
    """{folder}/00000.tar, ...: samples 0, 1, 2 ... of which shard k has counts[k]."""
    first = 0
    for shard, count in enumerate(counts):
        write_tar(folder / f"{shard:05d}.tar", members(range(first, first + count)))
        first += count
    return folder

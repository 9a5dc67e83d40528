"""What a data source is, and how one image file becomes an RGB array.

A source is random access by position. It is pickled to the workers of the input pipeline, so it
holds paths and small arrays and opens big files on first use.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np

from trm_jax.types import BadSampleError


@runtime_checkable
class Source(Protocol):
    """Random access to images (or precomputed features), labels and captions."""

    @property
    def ids(self) -> Sequence[str]:
        """Stable image ids, one per example; label masks are derived from them."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """() when the source carries no labels."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """int8 [N, C] in {-1, 0, +1}, known without decoding an image; [N, 0] without classes."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Mapping[str, np.ndarray]:
        """The inputs of one example; raises BadSampleError if they cannot be used.

        Any of: "image" uint8 [h, w, 3] RGB of any size; "features" [r, D] of a backbone;
        "dense" [hw, d] and "global_embedding" [d] that lie in the joint space already.
        """
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one image, () if it has none."""
        ...


@runtime_checkable
class MaskedSource(Source, Protocol):
    """A source that knows the class of every pixel; `subset.has_masks` tells whether one does."""

    def semantic_mask(self, index: int) -> np.ndarray:
        """int16 [h, w], as large as the upright image: an index into class_names per pixel.

        -1 is the background, of no class; -2 marks pixels that no metric counts. Raises
        BadSampleError for an unreadable file, UserError for a mask that does not fit its image or
        its classes.
        """
        ...


def read_image(path: str | Path) -> np.ndarray:
    """Decodes an image file to uint8 [h, w, 3] RGB, see `decode_image`.

    Raises BadSampleError for a missing, empty, corrupt, truncated or foreign file.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise BadSampleError(f"{path}: {error.strerror or error}") from error
    return decode_image(data.tobytes(), path)


def decode_image(data: bytes, name: object) -> np.ndarray:
    """Decodes the bytes of an image file to uint8 [h, w, 3] RGB, upright by its EXIF orientation.

    Greyscale is repeated, 16-bit depths are scaled to 8, CMYK is converted, alpha is dropped.
    Raises BadSampleError, which says `name`, for empty, corrupt, truncated or foreign bytes.
    """
    if not data:
        raise BadSampleError(f"{name}: the file is empty")
    if not _is_complete(data):
        raise BadSampleError(f"{name}: the image is truncated")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise BadSampleError(f"{name}: {error.err}") from error
    if image is None:
        raise BadSampleError(f"{name}: not a readable image")
    return image


def file_fingerprint(paths: Iterable[Path]) -> str:
    """Hex SHA-256 of the names and sizes of `paths`, in their order; -1 stands for a missing one.

    It notices images that were replaced or resized, without reading them.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            size = path.stat().st_size
        except OSError:
            size = -1
        digest.update(f"{path.name}\n{size}\n".encode())
    return digest.hexdigest()


def _is_complete(data: bytes) -> bool:
    """False for a JPEG or PNG without its end marker: OpenCV would fill the rest with grey."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return b"IEND" in data
    position = 2 if data[:2] == b"\xff\xd8" else len(data)
    # Walks the segments before the scan: a thumbnail inside them has an end marker of its own.
    while data[position : position + 1] == b"\xff":
        if data[position : position + 2] == b"\xff\xda":
            # A whole file ends with the marker: then there is no need to search the scan.
            return data.endswith(b"\xff\xd9") or data.find(b"\xff\xd9", position) >= 0
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True

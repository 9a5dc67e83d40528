"""A part of a source: a held-out share of the training images, or its first N."""

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np

# The module, not the function: partial_labels imports the sources itself.
from trm_jax.data import partial_labels
from trm_jax.data.sources.base import MaskedSource, Source
from trm_jax.data.sources.lazy import LazyIds
from trm_jax.types import UserError


class Subset:
    """The examples of `source` at `indices`, in that order; a Source itself."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.ids: Sequence[str] = LazyIds(len(self.indices), self._id)
        if not isinstance(source.ids, LazyIds):
            self.ids = tuple(self.ids)
        self.class_names = source.class_names
        # Read late: some sources make their labels from all masks.
        self._labels: np.ndarray | None = None
        inside = getattr(source, "captioned", None)  # see lazy.captioned
        if inside is not None:
            everywhere = isinstance(inside, range) and inside == range(len(source))
            self.captioned: np.ndarray | range = range(len(self.indices))
            if not everywhere:
                known = np.isin(self.indices, np.asarray(inside))
                self.captioned = np.flatnonzero(known).astype(np.int32)
        rows = getattr(source, "file_rows", None)
        if rows is not None:
            self.file_rows = np.asarray(rows)[self.indices]
            self.num_file_rows = getattr(source, "num_file_rows", None)

    @property
    def labels(self) -> np.ndarray:
        """int8 [n, C]: the rows of this part."""
        if self._labels is None:
            self._labels = self.source.labels[self.indices]
        return self._labels

    def __len__(self) -> int:
        return len(self.indices)

    def _id(self, index: int) -> str:
        return self.source.ids[int(self.indices[index])]

    def read(self, index: int):
        """The inputs of one example."""
        return self.source.read(int(self.indices[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one example."""
        return self.source.captions(int(self.indices[index]))

    def semantic_mask(self, index: int) -> np.ndarray:
        """int16 [h, w], see base.MaskedSource; UserError if the source has no masks."""
        if not has_masks(self.source):
            raise UserError("this dataset has no segmentation masks; choose another data.dataset")
        return self.source.semantic_mask(int(self.indices[index]))

    def fingerprint(self) -> str:
        """That of the whole source; the ids of this part where it has none."""
        whole = getattr(self.source, "fingerprint", None)
        return whole() if whole else "\n".join(self.ids)


def has_masks(source: Source) -> TypeGuard[MaskedSource]:
    """Whether `source`, or the source that it is a part of, has segmentation masks."""
    # Not isinstance: a Subset always has the method, and Python 3.11 would compute the labels.
    while isinstance(source, Subset):
        source = source.source
    return callable(getattr(source, "semantic_mask", None))


def hold_out(source: Source, fraction: float, *, seed: int = 0) -> tuple[Subset, Subset]:
    """(kept, held out): an image is held out iff a hash of (seed, its id) is below `fraction`."""
    # Not the hash that hides labels: the images that are kept would then know no first class.
    names = [f"hold out {name}" for name in source.ids]
    drawn = partial_labels.entry_uniforms(names, 1, seed)[:, 0] < fraction
    return Subset(source, np.flatnonzero(~drawn)), Subset(source, np.flatnonzero(drawn))

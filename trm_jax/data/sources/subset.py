"""A part of a source: a held-out share of the training images, or its first N."""

from collections.abc import Sequence

import numpy as np

from trm_jax.data.partial_labels import entry_uniforms
from trm_jax.data.sources.base import Source


class Subset:
    """The examples of `source` at `indices`, in that order; a Source itself."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.ids: Sequence[str] = tuple(source.ids[int(i)] for i in self.indices)
        self.class_names = source.class_names
        self.labels = source.labels[self.indices]
        rows = getattr(source, "file_rows", None)
        if rows is not None:
            self.file_rows = np.asarray(rows)[self.indices]
            self.num_file_rows = getattr(source, "num_file_rows", None)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int):
        """The inputs of one example."""
        return self.source.read(int(self.indices[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one example."""
        return self.source.captions(int(self.indices[index]))

    def fingerprint(self) -> str:
        """That of the whole source; the ids of this part where it has none."""
        whole = getattr(self.source, "fingerprint", None)
        return whole() if whole else "\n".join(self.ids)


def hold_out(source: Source, fraction: float, *, seed: int = 0) -> tuple[Subset, Subset]:
    """(kept, held out): an image is held out iff a hash of (seed, its id) is below `fraction`."""
    # Not the hash that hides labels: the images that are kept would then know no first class.
    names = [f"hold out {name}" for name in source.ids]
    drawn = entry_uniforms(names, 1, seed)[:, 0] < fraction
    return Subset(source, np.flatnonzero(~drawn)), Subset(source, np.flatnonzero(drawn))

"""Which examples a run has seen: computed from the step it reached, since nothing else decides."""

import json
from collections.abc import Container, Iterator
from typing import Any

import numpy as np

from trm_jax.data import pipeline
from trm_jax.data.sources.base import Source

# Positions that are Python's integers at a time.
_CHUNK = 1 << 16


def visits(num_examples: int, batch_size: int, *, seed: int, steps: int) -> np.ndarray:
    """int32 [num_examples]: how often the steps 0 .. steps - 1 of `train_batches` visit each.

    Of a whole epoch only the few examples are looked up that fill no batch; of the last one the
    visited or the others, whichever are fewer: an epoch of 41 million takes about a minute.

    Raises UserError if an epoch has not one full batch.
    """
    per_epoch = pipeline.steps_per_epoch(num_examples, batch_size)
    counts = np.zeros(num_examples, np.int32)
    for epoch in range(-(-steps // per_epoch)):
        end = min(steps - epoch * per_epoch, per_epoch) * batch_size
        few = end <= num_examples // 2
        places = range(end) if few else range(end, num_examples)
        at = np.fromiter(
            (pipeline.position(p, num_examples, seed=seed, epoch=epoch) for p in places), np.int64
        )
        counts += 0 if few else 1
        counts[at] += 1 if few else -1
    return counts


def used_samples(
    source: Source,
    indices: np.ndarray | range,
    counts: np.ndarray,
    skipped: Container[str] = (),
) -> Iterator[tuple[str, int]]:
    """Yields (id, visits) of each sample that was used, in the order of the source.

    Args:
      source: the training data.
      indices: [n] positions in `source` of the examples: all, those with captions, or one for
        each caption.
      counts: int32 [n], see `visits`.
      skipped: ids of the samples that could not be read.
    """
    total = np.zeros(len(source), np.int64)
    np.add.at(total, np.asarray(indices), counts)
    if hasattr(source, "first_visit"):  # a mixture, in which a sample has several positions
        positions = np.flatnonzero(total)
        first: Any = source.first_visit(positions)  # pyright: ignore[reportAttributeAccessIssue]
        total = np.bincount(first, weights=total[positions], minlength=len(source)).astype(int)
    ids = source.ids
    for start in range(0, len(total), _CHUNK):
        for position in (start + np.flatnonzero(total[start : start + _CHUNK])).tolist():
            name = str(ids[position])
            if name not in skipped:
                yield name, int(total[position])


def line(name: str, count: int) -> str:
    """A line of the list: the id and its visits, with a tab between; JSON's escapes in the id."""
    if any(ord(letter) < 32 for letter in name):
        name = json.dumps(name)
    return f"{name}\t{count}\n"

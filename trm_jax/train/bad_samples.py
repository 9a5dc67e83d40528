"""Unreadable samples: counted, named, and too many of them are an error."""

from collections.abc import Callable

import numpy as np

from trm_jax.train import distributed
from trm_jax.types import Batch, UserError


class BadSamples:
    """The samples of a split that came as blanks (valid=False) so far, by position in the data.

    Args:
      total: samples of the split.
      max_fraction: share of them that may be unreadable.
      name_of: position -> the id that users know.
    """

    def __init__(self, total: int, max_fraction: float, name_of: Callable[[int], str]):
        self._total, self._max_fraction, self._name_of = total, max_fraction, name_of
        self._positions: set[int] = set()

    def count(self, batch: Batch) -> None:
        """Takes the bad samples of a host batch down; UserError that names some if too many."""
        valid = np.asarray(batch["valid"])
        if valid.all():
            return
        self._positions.update(int(i) for i in np.asarray(batch["index"])[~valid])
        self._check()

    def share(self) -> None:
        """Takes down the bad samples of all processes; all must call it, and all raise alike."""
        self._positions = distributed.union(self._positions)
        self._check()

    def names(self) -> list[str]:
        """The ids of the bad samples, in the order of the data."""
        return [self._name_of(position) for position in sorted(self._positions)]

    def _check(self) -> None:
        if len(self._positions) > self._max_fraction * self._total:
            raise UserError(
                f"{len(self._positions)} of {self._total} samples are unreadable, "
                f"more than data.max_bad_fraction={self._max_fraction}: "
                f"{', '.join(self.names()[:8])}"
            )

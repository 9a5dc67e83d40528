"""What sources of many millions of examples need: ids made when asked for, captions not counted."""

import abc
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from trm_jax.data.sources.base import Source


class LazyIds(Sequence[str]):
    """`size` ids of which each is made by `name_of(index)` when it is read."""

    def __init__(self, size: int, name_of: Callable[[int], str]):
        self._size = size
        self._name_of = name_of

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        places = range(self._size)[index]
        if isinstance(places, range):
            return tuple(self._name_of(place) for place in places)
        return self._name_of(places)


class JoinedPairs(abc.ABC):
    """Image-text pairs that lie in several files or parts, one after the other; has no classes.

    A subclass sets `_starts` [parts + 1], where each part begins, and has `_id(index)`.
    """

    class_names: tuple[str, ...] = ()
    _starts: np.ndarray

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the samples, made or read when asked for."""
        return LazyIds(len(self), self._id)

    @property
    def labels(self) -> np.ndarray:
        """int8 [N, 0]."""
        return np.zeros((len(self), 0), np.int8)

    @abc.abstractmethod
    def _id(self, index: int) -> str: ...

    def _place(self, index: int) -> tuple[int, int]:
        """(part, row of the part)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])


def captioned(source: Source) -> np.ndarray | range:
    """Positions of the examples of `source` that have at least one caption, ascending.

    A source whose captions lie on a disk has them as its attribute `captioned` ([n] integers or a
    range): no caption is read for it, so one may turn out to be empty. For others it is int32 [n].
    """
    known = getattr(source, "captioned", None)
    if known is not None:
        return known
    return np.fromiter((i for i in range(len(source)) if source.captions(i)), np.int32)

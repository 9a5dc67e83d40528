"""What sources of many millions of examples need: ids made when asked for, captions not counted."""

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


def captioned(source: Source) -> np.ndarray | range:
    """Positions of the examples of `source` that have at least one caption, ascending.

    A source whose captions lie on a disk has them as its attribute `captioned` ([n] integers or a
    range): no caption is read for it, so one may turn out to be empty. For others it is int32 [n].
    """
    from trm_jax.data.sources.subset import Subset  # late: it imports what imports this

    known = getattr(source, "captioned", None)
    if known is not None:
        return known
    if isinstance(source, Subset) and hasattr(source.source, "captioned"):
        inside = captioned(source.source)
        if isinstance(inside, range) and inside == range(len(source.source)):
            return range(len(source))
        return np.flatnonzero(np.isin(source.indices, np.asarray(inside))).astype(np.int32)
    return np.fromiter((i for i in range(len(source)) if source.captions(i)), np.int32)

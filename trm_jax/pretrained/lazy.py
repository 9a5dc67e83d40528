"""An array that stays in its file until somebody asks for its numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np


class LazyArray:
    """Shape and dtype of a stored array; `numpy.asarray` reads it, each time anew.

    Attributes:
      shape: of the array.
      dtype: as stored.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        """`read` returns the array; it may raise UserError if the file is damaged."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._read = read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._read(), dtype, copy=copy)

"""The vocabulary every folder shares: array aliases, the method protocol, user-facing errors.

Dimension letters, used in every docstring, annotation and einsum of this package:

    n  examples in a batch (images)        m  texts or candidates in a batch
    C  classes                             L  slots of a prototype queue (per class)
    d  width of the joint embedding space  k  pixels kept per positive (top-k)
    h, w, hw  height, width, positions of a dense feature map
    H, W  height and width of an input image in pixels
    T  tokens of a text                    r  regions of an image
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Key = jax.Array
PyTree = Any
Batch = Mapping[str, Any]


class UserError(Exception):
    """A mistake of the user that one clear line can explain; launchers print it and exit with 2."""


class BadSampleError(Exception):
    """One sample cannot be used (corrupt, empty); the pipeline counts it and training goes on."""


class Mean(NamedTuple):
    """A metric as (sum, count), so that means are right under masks, padding and devices."""

    total: Array
    count: Array

    @classmethod
    def of(cls, values, where=None) -> "Mean":
        """Mean of `values` [...] over the entries where `where` (broadcastable bool) holds."""
        values = jnp.asarray(values, jnp.float32)
        if where is None:
            return cls(values.sum(), jnp.asarray(values.size, jnp.float32))
        where = jnp.broadcast_to(where, values.shape)
        return cls(jnp.where(where, values, 0.0).sum(), where.sum().astype(jnp.float32))

    def value(self) -> Array:
        """total / count, 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1e-12)


class StepOutput(NamedTuple):
    """What one application of a method's loss returns."""

    loss: Array  # []
    extras: PyTree  # new memory, batch statistics, ...
    metrics: dict[str, Mean]


class ArraySpec(NamedTuple):
    """Shape and dtype of one batch entry; None is the batch dimension, a tuple lists the sizes."""

    shape: tuple[int | None | tuple[int, ...], ...]
    dtype: Any


BatchSpec = Mapping[str, ArraySpec]


class DataInfo(NamedTuple):
    """What a method may know about the data when it is built."""

    class_names: tuple[str, ...] = ()
    num_train: int = 0
    num_eval: int = 0
    steps_per_epoch: int = 1
    total_steps: int = 1
    single_positive: bool = False  # the label protocol knows no negatives
    num_proxies: int = 0  # nouns of the captions that have a proxy


class Method(NamedTuple):
    """A training method as a record of pure functions; nothing inherits from it.

    specs:   "train", "eval" and every name in `predict` -> batch key -> ArraySpec.
    init:    (key, *, pretrained) -> (params, extras). `params` holds trained and frozen
             weights; the config's `optimizer.freeze` regexes decide which is which.
    loss:    (params, extras, batch, *, key, step, train) -> StepOutput. Pure, differentiable
             in params; `step` is a traced int32.
    predict: name -> (params, extras, batch) -> dict. "prepare", where it exists, maps an empty
             batch to arrays that depend on no example (the text features of all classes);
             callers compute it once and merge it into every batch.
    refresh: (params, extras, batches) -> extras, or None: exact recomputation before step 0 and
             at each epoch's end, in a fixed order.
    decomposes: whether the loss of a batch is the mean of a loss per valid example, so that the
             parts of a batch can be added up; if not, plain gradient accumulation is refused.
    """

    specs: Mapping[str, BatchSpec]
    init: Callable
    loss: Callable
    predict: Mapping[str, Callable]
    refresh: Callable | None = None
    decomposes: bool = False


def check_batch(batch: Mapping[str, np.ndarray], spec: BatchSpec) -> None:
    """Raises UserError if `batch` lacks a key of `spec` or has another shape or dtype there."""
    for name, (shape, dtype) in spec.items():
        if name not in batch:
            raise UserError(f"the data has no '{name}'; it has {sorted(batch)}")
        array = batch[name]
        sizes_match = len(array.shape) == len(shape) and all(
            want is None or (size in want if isinstance(want, tuple) else size == want)
            for size, want in zip(array.shape, shape, strict=True)
        )
        if not sizes_match or np.dtype(array.dtype) != np.dtype(dtype):
            raise UserError(
                f"the data's '{name}' is {array.dtype}{list(array.shape)}, "
                f"the method needs {np.dtype(dtype)}{list(shape)}"
            )

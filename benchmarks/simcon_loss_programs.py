"""The programs that benchmarks/simcon_loss.py measures, and what they are fed.

Every program is loss and gradient with respect to all embeddings and the scale, for weights and a
mask that are inputs, as in training: a constant mask would let XLA leave out a part of the work.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from trm_jax.losses import simcon_streaming
from trm_jax.losses.simcon import simcon_loss

SCALE, THRESHOLD = 1 / 0.07, 0.9
# Views and threshold.
LOSSES: dict[str, tuple[int, float | None]] = {
    "InfoNCE": (1, None),
    "SimCon": (1, THRESHOLD),
    "MV-SimCon": (2, THRESHOLD),
}


class Task(NamedTuple):
    """One measurement; its rows are written together.

    part: a function of simcon_loss_workers.py. block: 0 for the loss's default. loss, devices and
    columns count where one program is measured. peers: time dense and PyTorch forms as well.
    """

    part: str
    batch: int
    width: int
    block: int = 0
    dtype: str = "float32"
    loss: str = ""
    devices: int = 1
    columns: str = ""
    peers: bool = False
    rounds: int = 5

    @property
    def tile(self) -> int:
        """The side of the tiles that the loss takes."""
        return min(self.block or simcon_streaming.default_block(), -(-self.batch // self.devices))

    @property
    def condition(self) -> dict[str, Any]:
        """Of the rows."""
        condition = {"batch": self.batch, "width": self.width, "dtype": self.dtype}
        condition |= {"block": self.tile, "devices": self.devices}
        return condition | ({"columns": self.columns} if self.columns else {})

    def label(self, device: str) -> str:
        """Names the measurement in the results file; the same for every number of rounds."""
        fields = {k: v for k, v in self._asdict().items() if v and k not in ("part", "rounds")}
        return " ".join([device, self.part, *(f"{k}={v}" for k, v in fields.items())])


@functools.lru_cache(maxsize=1)  # a million pairs take a minute
def embeddings(task: Task, views: int = 2) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """(one or two views, texts), unit norm, [batch, width] float32.

    An eighth of the images and of the texts are near-copies of others (cosine 0.98); a text is
    near to its image (cosine 0.45) and the views are near to each other (0.7). In at least 128
    dimensions no other cosine comes near the threshold.
    """
    rng = np.random.default_rng(0)
    shape = (task.batch, task.width)

    def near(x: np.ndarray, noise: float) -> np.ndarray:
        moved = x + noise * _unit(rng.standard_normal(x.shape, np.float32))
        return _unit(moved)

    def copied(x: np.ndarray) -> np.ndarray:
        count = task.batch // 8
        x[:count] = near(x[rng.integers(count, task.batch, count)], 0.2)
        return x

    images = copied(_unit(rng.standard_normal(shape, np.float32)))
    text = copied(near(images, 2.0))
    return ((images, near(images, 1.0)) if views > 1 else (images,)), text


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def mesh(task: Task) -> Any:
    """The devices of the task, None for one."""
    if task.devices == 1:
        return None
    devices = jax.devices()[: task.devices]
    if len(devices) < task.devices:
        raise RuntimeError(f"{len(devices)} devices where {task.devices} are needed")
    return jax.make_mesh((task.devices,), ("data",), (AxisType.Auto,), devices=devices)


def gradient(task: Task, loss: str, *, dense: bool = False) -> Callable:
    """(images, text, scale, weights, where) -> ((sum, values [B]), gradients)."""
    views, threshold = LOSSES[loss]
    place = mesh(task)

    def weighted(images, text, scale, weights, where):
        values, _ = simcon_loss(
            images[:views],
            text,
            logit_scale=scale,
            threshold=threshold,
            where=where,
            implementation="dense" if dense else "streaming",
            columns=task.columns or "gather",
            block=task.block,
            mesh=place,
        )
        return (values * weights).sum(), values

    return jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)


def shapes(task: Task, loss: str) -> tuple[Any, ...]:
    """The arguments of `gradient`, without numbers, over the devices of the task."""
    place = mesh(task)
    rows = None if place is None else jax.NamedSharding(place, jax.P("data"))

    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows if shape else None)

    vectors = spec((task.batch, task.width), jnp.dtype(task.dtype))
    weights, where = spec((task.batch,), jnp.float32), spec((task.batch,), bool)
    return (vectors,) * LOSSES[loss][0], vectors, spec((), jnp.float32), weights, where


def arguments(task: Task, views: int = 2) -> tuple[Any, ...]:
    """The arguments of `gradient`, on the device."""
    # Rounded here: a copy in float32 would count in the peak of a GPU.
    dtype = jnp.dtype(task.dtype)
    images, text = jax.tree.map(lambda x: jnp.asarray(x.astype(dtype)), embeddings(task, views))
    weights = jnp.full(task.batch, 1 / task.batch, jnp.float32)
    where = jnp.ones(task.batch, bool)
    return jax.block_until_ready((images, text, jnp.float32(SCALE), weights, where))


def compiled(task: Task, loss: str, *, dense: bool = False) -> Any:
    """The program of one loss; one device gets `arguments`, cut to the loss's views."""
    return jax.jit(gradient(task, loss, dense=dense)).lower(*shapes(task, loss)).compile()


def tile_product(task: Task, flop: float) -> tuple[Callable[[], Any], float]:
    """A chain of [block, d] @ [d, block] @ [block, d], about `flop` long, and its FLOPs.

    The loss computes nothing but such products and what is done to each entry of a tile.
    """
    count = max(1, math.ceil(flop / (4 * task.tile**2 * task.width)))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((task.tile, task.width), np.float32)
    # Of norm one, so that a long chain neither grows nor fades.
    matrix = jnp.asarray(x / np.linalg.norm(x, 2), task.dtype)

    def dot(a, b):
        product = jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)
        return product.astype(task.dtype)

    def chain(x):
        return jax.lax.fori_loop(0, count, lambda _, y: dot(dot(y, x.T), x), x)

    run = jax.jit(chain).lower(matrix).compile()
    return lambda: jax.block_until_ready(run(matrix)), 4.0 * count * task.tile**2 * task.width

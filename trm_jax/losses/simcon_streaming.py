"""SimCon without its B x B matrices: the same value and gradient in O(B d) memory.

The forward pass visits tiles of block x block pairs and keeps running sums for every anchor; the
backward pass computes the tiles again. On one device each unordered pair of blocks is visited
once, since the intra-modal tiles are symmetric. On several, a device holds its rows and meets all
columns, which come by all-gather ("gather") or travel around a ring ("ring"); the gradient of a
row is complete without any gradient of the columns being sent.

Cost of loss and gradient in units of 2 B^2 d: InfoNCE 4, SimCon 8, MV-SimCon 14 on one device; 6,
12 and 21, shared evenly, on several.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from trm_jax.losses import simcon_tiles as tiles
from trm_jax.losses.simcon_tiles import Block, Gradient, Pulls, Settings, Stats
from trm_jax.types import Array

_PIECES = 8  # at most, of a device's share on a ring


class Plan(NamedTuple):
    """Static: the arithmetic, the tiles' side, how columns arrive, and over which mesh."""

    settings: Settings
    block: int
    columns: str = "gather"
    mesh: Any = None  # None: one device

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that the batch is cut over: all of them."""
        return tuple(self.mesh.axis_names)

    @property
    def devices(self) -> int:
        """How many devices share the rows."""
        return math.prod(self.mesh.shape.values()) if self.mesh is not None else 1


def default_block() -> int:
    """Side of a tile: what the caches of a CPU hold, or what fills an accelerator."""
    return 512 if jax.default_backend() == "cpu" else 2048


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def anchor_losses(
    plan: Plan,
    images: tuple[Array, ...],
    text: Array,
    valid: Array,
    scale: Array,
    threshold: Array,
) -> tuple[Array, Array]:
    """(losses [K, B], numbers of positives [K, B]) of all anchors; zero where not `valid`.

    Args:
      plan: how to compute it.
      images: V views, each [B, d], finite.
      text: [B, d], finite.
      valid: [B] bool.
      scale: [], multiplies the similarities.
      threshold: [], of the similarities that make a pair positive.
    """
    stats = _everywhere(plan, _stats, images, text, valid, scale, threshold)
    return _losses(stats, valid)


def _forward(plan, images, text, valid, scale, threshold):
    stats = _everywhere(plan, _stats, images, text, valid, scale, threshold)
    lse, count = tiles.log_sum(stats), stats.count
    return _losses(stats, valid), (images, text, valid, scale, threshold, lse, count)


def _backward(plan, saved, cotangents):
    images, text, valid, scale, threshold, lse, count = saved
    push = jnp.where(valid[None], cotangents[0], 0.0)
    pulls = Pulls(lse, push, push / jnp.maximum(count, 1.0))
    grads = _everywhere(plan, _gradient, images, text, valid, scale, threshold, pulls)
    grads = jax.tree.map(lambda g: scale * g, grads)
    # The loss depends on scale * x.y alone, so scaling all vectors and scaling the logits are the
    # same thing (Euler's identity); no tile is needed for the gradient of the scale.
    vectors = (*images, text)
    of_scale = sum(
        jnp.vdot(x.astype(g.dtype), g) for x, g in zip(vectors, jax.tree.leaves(grads), strict=True)
    )
    of_scale = (of_scale / (2.0 * scale)).astype(scale.dtype)
    of_images = tuple(g.astype(x.dtype) for g, x in zip(grads.images, images, strict=True))
    return of_images, grads.text.astype(text.dtype), None, of_scale, jnp.zeros_like(threshold)


anchor_losses.defvjp(_forward, _backward)


def _losses(stats: Stats, valid: Array) -> tuple[Array, Array]:
    values = tiles.log_sum(stats) - stats.positive / jnp.maximum(stats.count, 1.0)
    return jnp.where(valid[None], values, 0.0), stats.count


def _everywhere(plan: Plan, function: Callable, images, text, valid, scale, threshold, *pulls):
    """function(plan, ...) on one device, or on every device for its share of the rows."""
    arguments = (images, text, valid, scale, threshold, *pulls)
    if plan.devices == 1:
        return function(plan, *arguments)
    rows, anchors, whole = PartitionSpec(plan.axes), PartitionSpec(None, plan.axes), PartitionSpec()
    of_images = tuple(rows for _ in images)
    shares = (of_images, rows, rows, whole, whole, *(Pulls._make([anchors] * 3) for _ in pulls))
    out = Gradient._make([of_images, rows]) if pulls else Stats._make([anchors] * 4)
    share = functools.partial(function, plan)
    mapped = jax.shard_map(share, mesh=plan.mesh, in_specs=shares, out_specs=out, check_vma=False)
    return mapped(*arguments)


def _stats(plan: Plan, images, text, valid, scale, threshold) -> Stats:
    """The stats of this device's anchors over all candidates."""
    size = text.shape[0]
    rows = _block(plan, images, text, valid)
    width = jnp.promote_types(text.dtype, jnp.float32)
    start = tiles.no_stats(2 * len(images), rows.text.shape[0], width)
    see = functools.partial(tiles.visit, scale=scale, threshold=threshold, settings=plan.settings)

    def triangle(stats: Stats, pair):
        first, second = pair
        a, b = _take(rows, first, plan.block), _take(rows, second, plan.block)
        before = _take(stats, first, plan.block), _take(stats, second, plan.block)
        of_a, of_b = see(a, b, stats=before)
        of_b = _where(first != second, of_b, of_a)  # a diagonal block is seen once
        return _put(_put(stats, first, of_a), second, of_b), None

    def against(stats: Stats, cols: Block) -> Stats:
        def rectangle(stats: Stats, pair):
            first, second = pair
            a, b = _take(rows, first, plan.block), _take(cols, second, plan.block)
            (of_a,) = see(a, b, stats=(_take(stats, first, plan.block),))
            return _put(stats, first, of_a), None

        return jax.lax.scan(rectangle, stats, _rectangle(plan, rows, cols))[0]

    if plan.devices == 1:
        stats = jax.lax.scan(triangle, start, _triangle(plan, rows))[0]
    else:
        stats = _over_columns(plan, start, (rows,), lambda s, held: against(s, held[0]))
    return Stats(*(x[:, :size] for x in stats))


def _gradient(plan: Plan, images, text, valid, scale, threshold, pulls: Pulls) -> Gradient:
    """The gradient of this device's vectors, divided by the scale."""
    size = text.shape[0]
    rows = _block(plan, images, text, valid)
    pulls = Pulls(*(_padded(x, plan.block, axis=1) for x in pulls))
    width = jnp.promote_types(text.dtype, jnp.float32)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, width), Gradient(rows.images, rows.text))
    slopes = functools.partial(
        tiles.gradient, scale=scale, threshold=threshold, settings=plan.settings
    )

    def triangle(grads: Gradient, pair):
        first, second = pair
        a, b = _take(rows, first, plan.block), _take(rows, second, plan.block)
        both = _take(pulls, first, plan.block), _take(pulls, second, plan.block)
        of_a, of_b = slopes(a, b, pulls=both, both=True)
        grads = _add(grads, first, of_a)
        once = jax.tree.map(lambda g: jnp.where(first != second, g, 0.0), of_b)
        return _add(grads, second, once), None

    def against(grads: Gradient, held: tuple[Block, Pulls]) -> Gradient:
        cols, col_pulls = held

        def rectangle(grads: Gradient, pair):
            first, second = pair
            a, b = _take(rows, first, plan.block), _take(cols, second, plan.block)
            both = _take(pulls, first, plan.block), _take(col_pulls, second, plan.block)
            (of_a,) = slopes(a, b, pulls=both, both=False)
            return _add(grads, first, of_a), None

        return jax.lax.scan(rectangle, grads, _rectangle(plan, rows, cols))[0]

    if plan.devices == 1:
        grads = jax.lax.scan(triangle, start, _triangle(plan, rows))[0]
    else:
        grads = _over_columns(plan, start, (rows, pulls), against)
    return jax.tree.map(lambda g: g[:size], grads)


def _over_columns(plan: Plan, carry, held: tuple, visit: Callable):
    """`carry` after it has met what every device holds, all at once or one device at a time."""
    if plan.columns == "gather":

        def gathered(part):
            axis = _row_axis(part)
            return jax.tree.map(
                lambda x: jax.lax.all_gather(x, plan.axes, axis=axis, tiled=True), part
            )

        return visit(carry, tuple(gathered(part) for part in held))
    neighbours = [(i, (i + 1) % plan.devices) for i in range(plan.devices)]
    # Pieces of a share go round one after the other: what travels takes little memory.
    blocks = held[0].valid.shape[0] // plan.block
    pieces = max(count for count in range(1, _PIECES + 1) if blocks % count == 0)

    def step(state, _):
        carry, held = state
        # Sent on before it is used, so that the transfer may overlap with the arithmetic.
        passed = jax.tree.map(lambda x: jax.lax.ppermute(x, plan.axes, neighbours), held)
        return (visit(carry, held), passed), None

    def round_trip(carry, index):
        piece = tuple(_take(part, index, blocks // pieces * plan.block) for part in held)
        return jax.lax.scan(step, (carry, piece), None, length=plan.devices)[0][0], None

    return jax.lax.scan(round_trip, carry, np.arange(pieces, dtype=np.int32))[0]


def _block(plan: Plan, images, text, valid) -> Block:
    """This device's pairs, filled up to whole blocks with pairs that do not count."""
    images = tuple(_padded(x, plan.block) for x in images)
    text, valid = _padded(text, plan.block), _padded(valid, plan.block)
    ids = jnp.arange(text.shape[0], dtype=jnp.int32)
    if plan.devices > 1:
        ids = ids + jax.lax.axis_index(plan.axes).astype(jnp.int32) * text.shape[0]
    return Block(images, text, valid, ids)


def _padded(x: Array, block: int, axis: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def _triangle(plan: Plan, rows: Block) -> tuple[np.ndarray, np.ndarray]:
    """Every unordered pair of blocks once."""
    first, second = np.triu_indices(rows.text.shape[0] // plan.block)
    return first.astype(np.int32), second.astype(np.int32)


def _rectangle(plan: Plan, rows: Block, cols: Block) -> tuple[np.ndarray, np.ndarray]:
    """Every block of rows with every block of columns."""
    counts = (rows.text.shape[0] // plan.block, cols.text.shape[0] // plan.block)
    first, second = np.divmod(np.arange(counts[0] * counts[1], dtype=np.int32), counts[1])
    return first, second


def _row_axis(part) -> int:
    return 1 if isinstance(part, Stats | Pulls) else 0


def _take(part, index, block: int):
    """Block `index` of every array of a record."""
    axis = _row_axis(part)
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * block, block, axis), part)


def _put(whole: Stats, index, part: Stats) -> Stats:
    def put(x, y):
        return jax.lax.dynamic_update_slice_in_dim(x, y, index * y.shape[1], axis=1)

    return jax.tree.map(put, whole, part)


def _add(whole: Gradient, index, part: Gradient) -> Gradient:
    def add(x, y):
        start = index * y.shape[0]
        old = jax.lax.dynamic_slice_in_dim(x, start, y.shape[0])
        return jax.lax.dynamic_update_slice_in_dim(x, old + y, start, axis=0)

    return jax.tree.map(add, whole, part)


def _where(condition, chosen, other):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), chosen, other)

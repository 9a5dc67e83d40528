"""What a program of benchmarks/simcon_loss.py costs by its text, and what it should by the plan.

XLA's cost analysis counts the body of a loop once, whatever the number of its rounds. So FLOPs are
counted in the jaxpr, whose scans state their length, and collectives in the compiled text, whose
loops state their trip count.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.simcon_loss_programs import LOSSES, Task, gradient, shapes
from trm_jax.losses import simcon_tiles as tiles

_KINDS = ("all-gather", "collective-permute", "all-reduce", "reduce-scatter", "all-to-all")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:(ENTRY) )?%?([\w.\-]+) .*\{$")
_NAMES = r"\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
_CALLED = re.compile(rf"(?:calls|to_apply|body|condition|branch_computations)={_NAMES}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def visits(task: Task) -> int:
    """Tiles that a device computes in one pass."""
    blocks = math.ceil(math.ceil(task.batch / task.devices) / task.tile)
    return blocks * (blocks + 1) // 2 if task.devices == 1 else task.devices * blocks**2


def planned_flop(task: Task, loss: str) -> int:
    """FLOPs of the products of tiles on one device, for loss and gradient.

    A tile has 2V products with the other modality and V + 1 within modalities (simcon_tiles.py).
    The backward pass computes them again and each once more against vectors: for the rows, and on
    one device, where a tile is visited for both of its sides, for the columns too.
    """
    times = 4 if task.devices == 1 else 3
    return visits(task) * times * _products(loss) * 2 * task.tile**2 * task.width


def limit_units(loss: str) -> int:
    """What loss and gradient need at least on one device, in units of 2 B^2 d, if the tiles are
    not kept: `planned_flop` without what the tiles on the diagonal have too much."""
    return 2 * _products(loss)


def _products(loss: str) -> int:
    """Of one tile in the forward pass."""
    views, threshold = LOSSES[loss]
    return 2 * views + (views + 1 if threshold is not None else 0)


def units(task: Task, loss: str) -> float:
    """`planned_flop` of all devices in units of 2 B^2 d."""
    return planned_flop(task, loss) * task.devices / (2 * task.batch**2 * task.width)


def planned_bytes(task: Task, loss: str) -> float:
    """Bytes that a device sends for loss and gradient: columns, and three statistics of each
    anchor for the backward pass.

    Gathered columns come once (XLA merges the two passes' gathers and keeps the result) from the
    other devices; around a ring they travel in both passes, all the way back to where they began.
    """
    if task.devices == 1:
        return 0.0
    views = LOSSES[loss][0]
    column = (views + 1) * task.width * jnp.dtype(task.dtype).itemsize + 4 + 1  # id, valid
    statistics = 3 * 2 * views * 4
    rows = -(-task.batch // task.devices)
    rows = -(-rows // task.tile) * task.tile * task.devices
    if task.columns == "ring":
        return float(rows * (2 * column + statistics))
    return rows * (task.devices - 1) / task.devices * (column + statistics)


def tile_flop(task: Task, loss: str) -> int:
    """FLOPs of the products in the scans of the program, on one device."""
    closed = jax.make_jaxpr(gradient(task, loss))(*shapes(task, loss))
    return _dots(closed.jaxpr, inside=False)


def _dots(jaxpr: Any, inside: bool) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, times = equation.primitive.name, 1
        if name == "dot_general" and inside:
            contracted = equation.params["dimension_numbers"][0][0]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        if name == "scan":
            times = equation.params["length"]
        found = sum(_dots(inner, inside or name == "scan") for inner in _inner(equation.params))
        if found and name in ("while", "cond"):
            raise ValueError(f"products inside a {name} cannot be counted")
        total += times * found
    return total


def _inner(parameters: Mapping[str, Any]):
    for leaf in jax.tree.leaves(list(parameters.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(leaf, "eqns"):
            yield leaf
        elif hasattr(leaf, "jaxpr"):
            yield leaf.jaxpr


def tile_costs(task: Task, loss: str) -> dict[str, float]:
    """XLA's {"flops", "bytes accessed"} of one tile in both passes, each compiled alone."""
    views, threshold = LOSSES[loss]
    settings = tiles.Settings(threshold is not None, joint=True, exclude=True)
    dtype, side, both = jnp.dtype(task.dtype), task.tile, task.devices == 1
    vectors: Any = jax.ShapeDtypeStruct((side, task.width), dtype)
    valid: Any = jax.ShapeDtypeStruct((side,), bool)
    ids: Any = jax.ShapeDtypeStruct((side,), jnp.int32)
    block = tiles.Block((vectors,) * views, vectors, valid, ids)
    scalar, anchors = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((), (2 * views, side)))
    pulls = tiles.Pulls._make([anchors] * 3)
    stats = (tiles.Stats._make([anchors] * 4),) * (2 if both else 1)

    def visit(a, b, scale, limit, stats):
        return tiles.visit(a, b, scale=scale, threshold=limit, settings=settings, stats=stats)

    def slope(a, b, scale, limit, pulls):
        return tiles.gradient(
            a, b, scale=scale, threshold=limit, settings=settings, pulls=pulls, both=both
        )

    total: Counter[str] = Counter()
    for function, last in ((visit, stats), (slope, (pulls, pulls))):
        compiled = jax.jit(function).lower(block, block, scalar, scalar, last).compile()
        analysis: Any = compiled.cost_analysis()
        total.update({name: analysis[name] for name in ("flops", "bytes accessed")})
    return dict(total)


def collectives(text: str, devices: int) -> dict[str, dict[str, float]]:
    """{kind: {"count", "bytes"}} of a compiled program: how often, and what a device sends.

    An all-gather or reduce-scatter of S bytes in all sends S (D - 1) / D from each device, an
    all-reduce twice that, a permute what it moves. What stands in the body of a loop counts as
    often as the loop's known trip count, loops in loops the product.

    Raises:
      ValueError: a loop with collectives has no known trip count, or a transfer is asynchronous
        (GPU programs), whose type names its buffers twice.
    """
    own, calls, entry = _computations(text)
    times: dict[str, float] = {}

    def call(name: str, count: float) -> None:
        times[name] = times.get(name, 0) + count
        for callee, trips in calls.get(name, ()):
            call(callee, count * trips)

    call(entry, 1)
    found: dict[str, dict[str, float]] = {}
    for name, instructions in own.items():
        for kind, size in instructions:
            if math.isnan(times.get(name, 0)):
                raise ValueError(f"{kind} stands in a loop without a known trip count")
            factor = {"all-gather": 1 / devices, "reduce-scatter": 1.0, "all-to-all": 1 / devices}
            sent = size * (devices - 1) * factor.get(kind, 2 / devices)
            sent = size if kind == "collective-permute" else sent
            total = found.setdefault(kind, {"count": 0, "bytes": 0.0})
            total["count"] += times.get(name, 0)
            total["bytes"] += times.get(name, 0) * sent
    return found


def _computations(text: str):
    """Of each computation its collectives (kind, bytes of the result) and whom it calls how often
    (NaN: nobody knows); the name of the first one."""
    own: dict[str, list[tuple[str, int]]] = {}
    calls: dict[str, list[tuple[str, float]]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            entry = current if head[1] else entry
            own[current], calls[current] = [], []
        if not line.startswith(" "):
            continue
        if match := _COLLECTIVE.search(line):
            if match[3]:
                raise ValueError(f"{match[2]}-start: only synchronous transfers can be counted")
            own[current].append((match[2], _bytes(match[1])))
        trips = 1.0
        if " while(" in line:
            known = _TRIPS.search(line)
            trips = float(known[1]) if known else math.nan
        for group in _CALLED.findall(line):
            calls[current] += [(name.strip().lstrip("%"), trips) for name in group.split(",")]
    return own, calls, entry


def _bytes(type_text: str) -> int:
    total = 0
    for name, bits, sides in _ARRAY.findall(type_text):
        width = 1 if name == "pred" else max(1, int(bits) // 8)
        total += width * math.prod(int(side) for side in sides.split(",") if side)
    return total

"""The measurements of benchmarks/simcon_loss.py, run in a process of their own.

python benchmarks/simcon_loss_workers.py '[{"part": "memory", "batch": 1024, "width": 256}, ...]'

prints one JSON object a task as soon as it is measured: {"task": its number, "rows": [...]}.
"""

import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Shared with PyTorch's processes, and read to know what a program takes.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# PyTorch's threads must not spin while ours work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax  # noqa: E402

from benchmarks import harness, simcon_loss_counts, simcon_loss_record  # noqa: E402
from benchmarks import simcon_loss_programs as programs  # noqa: E402
from benchmarks.simcon_loss_programs import LOSSES, Task  # noqa: E402
from benchmarks.step_trm_ml_workers import Worker  # noqa: E402

# Above it the dense form is compiled, but not run.
DENSE_BATCH = 8192
DENSE, TORCH, TORCH_COMPILED = "SimCon, dense", "SimCon, PyTorch", "SimCon, PyTorch compiled"
LIMIT = "matmul limit of {}"
# Seconds past which a first call is the measurement.
_LONG = 20.0


def time_rows(task: Task, *, chain_flop: float = 0.0) -> list[dict[str, Any]]:
    """Seconds of loss and gradient of all losses and peers, beside the time of their products."""
    arguments = programs.arguments(task)
    functions: dict[str, Callable[[], Any]] = {}
    for loss, (views, _) in LOSSES.items():
        functions[loss] = _bound(programs.compiled(task, loss), arguments, views)
    if task.peers and task.batch <= DENSE_BATCH:
        functions[DENSE] = _bound(programs.compiled(task, "SimCon", dense=True), arguments, 1)
    functions["tile product"], flop = programs.tile_product(task, chain_flop or _chain_flop())
    peer = _torch_worker(task)
    (value, _), _ = functions["SimCon"]()
    clocks = {name: _clock(function) for name, function in functions.items()}
    if peer:
        clocks[TORCH] = lambda: peer.seconds("eager")
        if "compiled" in peer.facts["forms"]:
            clocks[TORCH_COMPILED] = lambda: peer.seconds("compiled")
    seconds = _in_turn(clocks, task.rounds)
    rows = _time_rows(task, seconds, flop)
    if peer:
        apart = abs(peer.facts["loss"] / float(value) - 1)
        rows.append(_row(task, TORCH, "relative_difference", {0: apart}, ""))
        peer.close()
    return rows


def _time_rows(task: Task, seconds: Mapping[str, Sequence[float]], flop: float) -> list[dict]:
    product = [value / flop for value in seconds["tile product"]]
    unit = 2 * task.batch**2 * task.width
    units = {loss: simcon_loss_counts.limit_units(loss) for loss in LOSSES}
    floors = {loss: [units[loss] * unit * value for value in product] for loss in LOSSES}
    rows = []
    for name, values in seconds.items():
        if name == "tile product":
            rate = dict(enumerate(1e-9 / value for value in product))
            rows.append(_row(task, name, "gflop_per_s", rate, "GFLOP/s"))
            continue
        row = _row(task, name, "seconds", dict(enumerate(values)), "s")
        against = {other: seconds[other] for other in ("InfoNCE",) if name != other}
        against |= {LIMIT.format(name): floors[name]} if name in floors else {}
        if name == "SimCon":
            peers = (DENSE, TORCH, TORCH_COMPILED)
            against |= {other: seconds[other] for other in peers if other in seconds}
        rows += [row | _ratio(values, theirs, other) for other, theirs in against.items()]
    for loss, values in floors.items():
        row = _row(task, LIMIT.format(loss), "seconds", dict(enumerate(values)), "s")
        rows.append(row | {"units": units[loss]})
    return rows


def _chain_flop() -> float:
    """Of the tile products: a tenth of a second on two CPU cores and on a large GPU."""
    return 3e10 if jax.default_backend() == "cpu" else 3e13


def _bound(compiled: Any, arguments: tuple[Any, ...], views: int) -> Callable[[], Any]:
    images, *rest = arguments
    return lambda: jax.block_until_ready(compiled(images[:views], *rest))


def _clock(function: Callable[[], Any]) -> Callable[[], float]:
    def clock() -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    return clock


def _in_turn(clocks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side; the sides take turns, in another order in every round."""
    first = {name: clock() for name, clock in clocks.items()}
    if max(first.values()) > _LONG:
        return {name: [value] for name, value in first.items()}
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    names = list(clocks)
    for number in range(rounds):
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            # Short calls as often as makes a tenth of a second: clocks and threads need to wake.
            count = max(1, min(10, int(0.1 / max(first[name], 1e-6))))
            seconds[name].append(sum(clocks[name]() for _ in range(count)) / count)
    return seconds


def _torch_worker(task: Task) -> Worker | None:
    """The peer, where it is asked for, installed, and small enough."""
    largest = 4096 if jax.default_backend() == "cpu" else DENSE_BATCH
    if not task.peers or task.batch > largest or importlib.util.find_spec("torch") is None:
        return None
    from benchmarks import torch_simcon

    setting: Any = task
    return Worker(torch_simcon.sides, setting)


def memory_rows(task: Task) -> list[dict[str, Any]]:
    """Temporaries of the compiled programs; nothing is run."""
    rows = []
    for loss in LOSSES:
        for dense in (False, True):
            size = _temporaries(programs.compiled(task, loss, dense=dense))
            name = f"{loss}, dense" if dense else loss
            rows.append(_row(task, name, "program_mb", {0: size / 1e6}, "MB"))
    return rows


def _temporaries(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def devices_rows(task: Task) -> list[dict[str, Any]]:
    """What one device of several computes, moves and holds; nothing is run.

    Raises:
      RuntimeError: the program's products are not those of the plan.
    """
    counts, loss = simcon_loss_counts, task.loss
    compiled = programs.compiled(task, loss)
    flop = counts.tile_flop(task, loss)
    if flop != counts.planned_flop(task, loss):
        raise RuntimeError(f"{loss}: {flop} FLOPs, {counts.planned_flop(task, loss)} planned")
    # The analysis of the program counts every loop's body once.
    tile = counts.tile_costs(task, loss)["bytes accessed"]
    accessed = compiled.cost_analysis()["bytes accessed"] + (counts.visits(task) - 1) * tile
    small = _temporaries(compiled)
    large = _temporaries(programs.compiled(task._replace(batch=2 * task.batch), loss))
    values = {
        "gflop": (flop / 1e9, "GFLOP"),
        "units": (counts.units(task, loss) / task.devices, "2 B^2 d"),
        "gb_accessed": (accessed / 1e9, "GB"),
        "program_mb": (small / 1e6, "MB"),
        # A straight line through two batches: what grows with the batch, and the tiles.
        "program_mb_of_batch": ((large - small) / 1e6, "MB"),
        "program_mb_of_tiles": ((2 * small - large) / 1e6, "MB"),
        "planned_mb_sent": (counts.planned_bytes(task, loss) / 1e6, "MB"),
    }
    for kind, found in counts.collectives(compiled.as_text(), task.devices).items():
        values[f"{kind}_count"] = (found["count"], "")
        values[f"{kind}_mb_sent"] = (found["bytes"] / 1e6, "MB")
    return [_row(task, loss, name, {0: v}, unit) for name, (v, unit) in values.items()]


def planned_rows(task: Task) -> list[dict[str, Any]]:
    """The same by the formulas alone, for as many devices as nobody has here."""
    counts, loss = simcon_loss_counts, task.loss
    values = {
        "gflop": (counts.planned_flop(task, loss) / 1e9, "GFLOP"),
        "units": (counts.units(task, loss) / task.devices, "2 B^2 d"),
        "planned_mb_sent": (counts.planned_bytes(task, loss) / 1e6, "MB"),
    }
    rows = [_row(task, loss, name, {0: v}, unit) for name, (v, unit) in values.items()]
    return [row | {"extrapolated": True} for row in rows]


def peak_rows(task: Task) -> list[dict[str, Any]]:
    """What a GPU holds beside the inputs while a loss runs once, its gradients included."""
    result = simcon_loss_record.run_once(task, task.loss)
    facts = {name: value for name, value in result.facts.items() if name.endswith("_mb")}
    return [_row(task, task.loss, name, {0: value}, "MB") for name, value in facts.items()]


def record_rows(task: Task, *, chain_flop: float = 0.0) -> list[dict[str, Any]]:
    """One run of a very large batch, checked on some rows."""
    values = simcon_loss_record.record(task)
    seconds = values.pop("seconds")
    rows = [_row(task, "SimCon", "seconds", {0: seconds}, "s")]
    chain, flop = programs.tile_product(task, chain_flop or _chain_flop())
    chain()
    product = statistics.median(_clock(chain)() for _ in range(task.rounds)) / flop
    units = simcon_loss_counts.limit_units("SimCon")
    floor = units * 2 * task.batch**2 * task.width * product
    rows = [rows[0] | _ratio([seconds], [floor], LIMIT.format("SimCon"))]
    rows.append(_row(task, LIMIT.format("SimCon"), "seconds", {0: floor}, "s"))
    for name, value in values.items():
        rows.append(_row(task, "SimCon", name, {0: value}, "MB" if name.endswith("_mb") else ""))
    return rows


def fit_rows(task: Task) -> list[dict[str, Any]]:
    """How large a batch the dense PyTorch forms can take on this GPU, doubling from the task's."""
    from benchmarks import torch_simcon

    rows = []
    for form, name in (("eager", TORCH), ("compiled", TORCH_COMPILED)):
        found, failed = torch_simcon.largest(task, form)
        for batch, seconds, peak in found:
            at = task._replace(batch=batch)
            rows.append(_row(at, name, "seconds", {0: seconds}, "s"))
            rows.append(_row(at, name, "peak_extra_mb", {0: peak}, "MB"))
        fits = found[-1][0] if found else 0
        row = _row(task, name, "largest_batch", {0: fits}, "pairs")
        rows.append(row | {"out_of_memory": failed})
    return rows


PARTS: dict[str, Callable[[Task], list[dict[str, Any]]]] = {
    "time": time_rows,
    "memory": memory_rows,
    "devices": devices_rows,
    "planned": planned_rows,
    "peak": peak_rows,
    "record": record_rows,
    "fit": fit_rows,
}


def _row(task: Task, name: str, metric: str, values: Mapping[int, float], unit: str) -> dict:
    """A row whose figures keep their digits, however small they are."""
    row = harness.make_row(name, task.condition, metric, {0: 0.0}, unit, None)
    numbers = list(values.values())
    row["mean"] = _short(statistics.fmean(numbers))
    row["std"] = _short(statistics.stdev(numbers)) if len(numbers) > 1 else None
    row["median"] = _short(statistics.median(numbers))
    row["values"] = {str(key): _short(value) for key, value in values.items()}
    row["rounds"] = len(numbers)
    del row["seeds"]
    return row


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _ratio(ours: Sequence[float], theirs: Sequence[float], against: str) -> dict[str, Any]:
    """How many times as long, median of the quotients within a round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"ratio": _short(statistics.median(ratios)), "against": against}


def main(text: str) -> None:
    """Measures the tasks of a JSON list one after the other."""
    device = harness.device_name(jax.devices()[0].device_kind)
    for number, fields in enumerate(json.loads(text)):
        task, load = Task(**fields), os.getloadavg()[0]
        rows = [row | {"device": device, "load": round(load, 2)} for row in PARTS[task.part](task)]
        print(json.dumps({"task": number, "rows": rows}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

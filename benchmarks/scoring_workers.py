"""The measurements of benchmarks/scoring.py, each run in a process of its own.

python benchmarks/scoring_workers.py '{"part": "memory", "scorer": "SGR", ...}'

prints the rows as JSON.
"""

import functools
import json
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# On a GPU PyTorch needs memory, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import harness  # noqa: E402
from benchmarks import scoring_programs as programs  # noqa: E402
from benchmarks.measurements import short, timed_row  # noqa: E402
from benchmarks.scoring_programs import Batches, Task  # noqa: E402

TORCH, PRODUCT = "{}, PyTorch", "large matrix product"
BLOCKS = (4, 16, 64, 0)  # of the memory's rows
_SPEEDS = {"pairs_per_s": "pairs/s", "seconds": "s", "cpu_seconds": "s"}


class Spent(NamedTuple):
    """Seconds by the clock, and those that cores worked for the process."""

    wall: float
    cpu: float


class Timed(NamedTuple):
    """Captions of one padded length with some images.

    ours: scores [n, m] of all; theirs: [n', c], without what fills up batches, of some captions.
    columns: which. blocks: batches of images times batches of captions. pairs: n' c.
    """

    ours: Callable[[], np.ndarray]
    theirs: Callable[[], np.ndarray]
    columns: np.ndarray
    blocks: int
    pairs: int


Sides = Mapping[tuple[str, int], Callable[[], Any]]
Rounds = Sequence[Mapping[tuple[str, int], Spent]]


def evaluation_rows(task: Task, *, side: int = 0) -> list[dict[str, Any]]:
    """All pairs of evaluations of the task's sizes, beside PyTorch.

    Args:
      task: see Task.
      side: of the matrices whose product tells the device's rate; 0 for as large as is usual.
    """
    timed = _timed(task)
    rows = _difference_rows(task, timed.values())
    seconds, rates = in_turn(
        {(name, key): getattr(t, name) for key, t in timed.items() for name in ("ours", "theirs")},
        task.rounds,
        side,
    )
    rows.append(timed_row(task, PRODUCT, "gflop_per_s", rates, "GFLOP/s"))
    for images, captions in task.sizes:
        layout = programs.layout(captions, task.images, task.buckets)
        lengths = {batches.length: batches.lengths for batches in layout}
        blocks = {
            k: len(x) * -(-images // task.images) / timed[k].blocks for k, x in lengths.items()
        }
        pairs = {k: images * np.count_nonzero(x) / timed[k].pairs for k, x in lengths.items()}
        spent = _scaled(seconds, "ours", blocks), _scaled(seconds, "theirs", pairs)
        size = {"size": f"{images} x {captions}", "timed": _what(task, (images, captions))}
        rows += _speed_rows(task, size, images * captions, *spent)
        every = np.concatenate([x.reshape(-1) for x in lengths.values()])
        flop = programs.flop(task, images, every) / 1e9
        gflop = [flop / found.wall for found in spent[0]]
        row = timed_row(task, task.scorer, "gflop_per_s", gflop, "GFLOP/s", size)
        rows.append(row | _ratio(gflop, rates, PRODUCT))
        padded = sum(k * x.size for k, x in lengths.items()) / every.sum()
        rows.append(timed_row(task, task.scorer, "padding", [padded], "tokens a real one", size))
    return rows


def _what(task: Task, size: tuple[int, int]) -> str:
    if task.whole:
        first = "{} x {}".format(*task.sizes[0])
        return "all of it" if size == task.sizes[0] else f"scaled from {first}"
    peer = f", PyTorch with {task.captions} of them" if task.captions else ""
    return f"scaled from {task.images} images x {task.images} captions of each length{peer}"


def _timed(task: Task) -> dict[int, Timed]:
    """What is timed, by padded length."""
    from benchmarks import torch_matching

    model, draw, batch = programs.make_model(task), programs.Draw(task.width), task.images
    peer = torch_matching.make(**programs.torch_arguments(task, model), device=_torch_device())
    layouts = [programs.layout(captions, batch, task.buckets) for _, captions in task.sizes]
    chosen = {x.length: x for layout in reversed(layouts) for x in programs.samples(layout)}
    count = batch
    if task.whole:
        chosen |= {x.length: x for x in layouts[0]}
        count = task.sizes[0][0]
    regions = draw.regions(count, task.regions)
    images = [regions[i : i + batch] for i in range(0, count, batch)]
    full = np.zeros((batch, *regions.shape[1:]), np.float32)
    full[: len(images[-1])] = images[-1]
    sides = [programs.image_side(model, part) for part in (*images[:-1], full)]
    program = functools.partial(programs.evaluation(model), model.params, model.extras)

    def one(batches: Batches) -> Timed:
        captions, columns, ours = [], [], []
        for number, lengths in enumerate(batches.lengths):
            words, mask = draw.words(lengths, batches.length)
            ours.append(programs.caption_side(model, words, mask))
            real = int(np.count_nonzero(lengths))
            kept = spread(real, task.captions or real)
            columns.append(number * batch + kept)
            captions += [words[k, : lengths[k]] for k in kept]
        theirs = torch_matching.Evaluation(peer, images, captions, _torch_device())
        return Timed(
            lambda: np.block([[np.asarray(program({**a, **b})) for b in ours] for a in sides]),
            theirs,
            np.concatenate(columns),
            blocks=len(ours) * len(sides),
            pairs=count * len(captions),
        )

    return {length: one(batches) for length, batches in sorted(chosen.items())}


def spread(count: int, wanted: int) -> np.ndarray:
    """`wanted` of the numbers below `count`, or all of them, evenly spread."""
    wanted = min(count, wanted)
    return ((np.arange(wanted) + 0.5) * count / wanted).astype(int)


def _difference_rows(task: Task, timed) -> list[dict[str, Any]]:
    """How far the two sides' scores are apart, and how far scores are apart; runs all once."""
    apart, found = 0.0, []
    for part in timed:
        found.append(part.theirs())
        ours = part.ours()[: len(found[-1]), part.columns]
        apart = max(apart, float(np.abs(ours - found[-1]).max()))
    spread_of = max(x.max() for x in found) - min(x.min() for x in found)
    return [
        timed_row(task, task.scorer, "max_difference", [apart], ""),
        timed_row(task, task.scorer, "score_range", [float(spread_of)], ""),
    ]


def _torch_device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def in_turn(sides: Sides, rounds: int, side: int = 0) -> tuple[list[dict], list[float]]:
    """What each side takes in each round, and GFLOP/s of a product of two matrices [side, side].

    Sides of one key follow each other, in every second round the other way round. All must have
    been run before.
    """
    product, flop = programs.product(side or (2048 if jax.default_backend() == "cpu" else 8192))
    product()
    seconds, rates = [], []
    for number in range(rounds):
        order = sorted(sides, key=lambda key: (key[1], (key[0] == "ours") == number % 2))
        seconds.append({key: _spent(sides[key]) for key in order})
        rates.append(flop / 1e9 / _spent(product).wall)
    return seconds, rates


def _spent(function: Callable[[], Any]) -> Spent:
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def _scaled(seconds: Rounds, name: str, factors: Mapping[int, float]) -> list[Spent]:
    """What a side takes for the whole, in each round."""
    rounds = [[(found[name, key], f) for key, f in factors.items()] for found in seconds]
    return [
        Spent(sum(x.wall * f for x, f in parts), sum(x.cpu * f for x, f in parts))
        for parts in rounds
    ]


def training_rows(task: Task, *, side: int = 0) -> list[dict[str, Any]]:
    """Scores of a batch's pairs and their gradients, beside PyTorch's autograd."""
    from benchmarks import torch_matching

    model, draw, size = programs.make_model(task), programs.Draw(task.width), task.images
    length, (lengths,) = programs.layout(size, size, task.buckets)[0]
    lengths = np.random.default_rng(2).permutation(lengths)
    regions, (words, mask) = draw.regions(size, task.regions), draw.words(lengths, length)
    whole = np.asarray(programs.image_side(model, regions)["image_global"])
    weights = np.random.default_rng(3).standard_normal((size, size), np.float32)
    arguments = model.variables["params"], regions, whole, words, mask, weights
    arguments = jax.device_put(arguments)
    compiled = jax.jit(programs.training(task, model)).lower(*arguments).compile()
    columns = np.argsort(lengths)[spread(size, task.captions or size)]
    peer = torch_matching.make(**programs.torch_arguments(task, model), device=_torch_device())
    captions = [words[k, : lengths[k]] for k in columns]
    step = torch_matching.Step(peer, regions, whole, captions, weights[:, columns], _torch_device())
    (_, scores), gradients = jax.device_get(compiled(*arguments))
    differences = {"max_difference": float(np.abs(scores[:, columns] - step()).max())}
    ours, theirs = (np.zeros((len(columns), *words.shape[1:]), np.float32) for _ in range(2))
    for number, (k, gradient) in enumerate(zip(columns, step.word_gradients(), strict=True)):
        ours[number], theirs[number, : lengths[k]] = gradients[3][k], gradient
    ours, theirs = (_along_the_sphere(x, words[columns]) for x in (ours, theirs))
    differences["gradient_difference"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    sides: Sides = {
        ("ours", 0): lambda: jax.block_until_ready(compiled(*arguments)),
        ("theirs", 0): step,
    }
    seconds, rates = in_turn(sides, task.rounds, side)
    more: dict[str, Any] = {"size": f"{size} x {size}", "length": length}
    if len(columns) < size:
        more["timed"] = f"PyTorch scaled from {len(columns)} captions"
    spent = _scaled(seconds, "ours", {0: 1.0}), _scaled(seconds, "theirs", {0: size / len(columns)})
    rows = _speed_rows(task, more, size * size, *spent)
    rows.append(timed_row(task, PRODUCT, "gflop_per_s", rates, "GFLOP/s"))
    for metric, value in differences.items():
        rows.append(timed_row(task, task.scorer, metric, [value], "", more))
    padded = length * size / lengths.sum()
    rows.append(timed_row(task, task.scorer, "padding", [padded], "tokens a real one", more))
    return rows


def _along_the_sphere(gradient: np.ndarray, of: np.ndarray) -> np.ndarray:
    """What the unit norm of an encoder's words lets through of their gradient."""
    return gradient - np.sum(gradient * of, axis=-1, keepdims=True) * of


def memory_rows(task: Task) -> list[dict[str, Any]]:
    """Temporaries of the compiled programs by block, for captions of the first length above the
    mean; nothing is run."""
    model, size, rows = programs.make_model(task), task.images, []
    length = next(x for x in task.buckets if x > 13 or x == task.buckets[-1])
    regions = np.zeros((size, task.regions, task.width), np.float32)
    words, mask = np.zeros((size, length, task.width), np.float32), np.ones((size, length), bool)
    images = programs.image_side(model, regions)
    sides = images | programs.caption_side(model, words, mask)
    params, weights = model.variables["params"], np.zeros((size, size), np.float32)
    step = params, regions, images["image_global"], words, mask, weights
    for block in BLOCKS:
        at = task._replace(block=block)
        built = programs.with_block(model, at)
        for metric, lowered in (
            ("evaluation_mb", programs.evaluation(built).lower(built.params, built.extras, sides)),
            ("training_mb", jax.jit(programs.training(at, built)).lower(*step)),
        ):
            analysis: Any = lowered.compile().memory_analysis()
            more = {"size": f"{size} x {size}", "length": length}
            megabytes = [analysis.temp_size_in_bytes / 1e6]
            rows.append(timed_row(at, task.scorer, metric, megabytes, "MB", more))
    return rows


PARTS: dict[str, Callable[[Task], list[dict[str, Any]]]] = {
    "evaluation": evaluation_rows,
    "training": training_rows,
    "memory": memory_rows,
}


def _speed_rows(
    task: Task, more: Mapping[str, Any], pairs: int, ours: Sequence[Spent], theirs: Sequence[Spent]
) -> list[dict[str, Any]]:
    """Speed, seconds and CPU seconds of both sides, and how many times as fast ours is."""
    peer, rows = TORCH.format(task.scorer), []
    values = [
        {
            "pairs_per_s": [pairs / x.wall for x in side],
            "seconds": [x.wall for x in side],
            "cpu_seconds": [x.cpu for x in side],
        }
        for side in (ours, theirs)
    ]
    for metric, unit in _SPEEDS.items():
        mine, other = (side[metric] for side in values)
        faster = (mine, other) if metric == "pairs_per_s" else (other, mine)
        rows.append(timed_row(task, task.scorer, metric, mine, unit, more) | _ratio(*faster, peer))
        rows.append(timed_row(task, peer, metric, other, unit, more))
    return rows


def _ratio(many: Sequence[float], few: Sequence[float], against: str) -> dict[str, Any]:
    """The median of the quotients within a round."""
    ratios = map(operator.truediv, many, few)
    return {"ratio": short(statistics.median(ratios)), "against": against}


def limit_threads(count: int) -> None:
    """Leaves this process, JAX and PyTorch `count` cores; 0 for all. Before JAX sees its device."""
    if not count:
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    import torch

    torch.set_num_threads(count)


def main(text: str) -> None:
    """Measures a task."""
    task = programs.read_task(json.loads(text))
    limit_threads(task.threads)
    load, device = os.getloadavg()[0], harness.device_name(jax.devices()[0].device_kind)
    rows = PARTS[task.part](task)
    print(json.dumps([row | {"device": device, "load": round(load, 2)} for row in rows]))


if __name__ == "__main__":
    main(sys.argv[1])

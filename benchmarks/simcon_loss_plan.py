"""Which measurements benchmarks/simcon_loss.py makes, in which processes, and where they go."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measurements
from benchmarks import simcon_loss_report as report
from benchmarks.simcon_loss_programs import LOSSES, Task
from trm_jax.train import workdirs
from trm_jax.types import UserError

BENCHMARK = measurements.Benchmark(
    "simcon_loss",
    Path(__file__).with_name("simcon_loss_workers.py"),
    report.page,
    complete=report.with_shares,
)
PARTS = ("time", "memory", "devices", "gpu", "record")
DEVICES, EXTRAPOLATED = (1, 2, 4, 8), 256


def numbers(name: str, words: Sequence[str]) -> list[int]:
    """The whole numbers of a flag. Raises UserError at anything else."""
    if wrong := [word for word in words if not word.isdigit() or not int(word)]:
        raise UserError(f"--{name}: {wrong[0]!r} is no whole number from 1 on")
    return [int(word) for word in words]


def parts_of(words: Sequence[str], backend: str) -> list[str]:
    """The parts that are asked for, or all that the device can do. Raises UserError."""
    if wrong := [word for word in words if word not in PARTS]:
        raise UserError(f"--parts: {wrong[0]!r} is none of {', '.join(PARTS)}")
    if backend == "gpu":
        return list(words or PARTS)
    if needs := [word for word in words if word in ("gpu", "record")]:
        raise UserError(f"--parts: {needs[0]} needs a GPU, and JAX has a {backend} here")
    return list(words or PARTS[:3])


def plan(
    parts: Sequence[str],
    sizes: Sequence[int],
    widths: Sequence[int],
    backend: str,
    *,
    block: int = 0,
    rounds: int = 5,
) -> list[Task]:
    """The measurements, quick ones first; `sizes` empty: those of the published table."""
    tasks = []
    every = sizes or [2**n for n in range(10, 17)]
    for part in (part for part in ("memory", "devices", "time") if part in parts):
        if part == "devices":
            tasks += _devices(block)
            continue
        for width in widths:
            for size in every:
                if part == "time" and not sizes and backend == "cpu" and _long(size, width):
                    continue
                peers = part == "time"
                tasks.append(Task(part, size, width, block, peers=peers, rounds=rounds))
    if "time" in parts and not block:
        sides = (256, 512, 1024) if backend == "cpu" else (1024, 2048, 4096)
        size = max(s for s in (*every, 0) if s <= 8192) or min(every)
        tasks += [Task("time", size, widths[0], side, rounds=rounds) for side in sides]
    half = {"block": block, "dtype": "bfloat16", "rounds": rounds}
    if "gpu" in parts:
        tasks += [Task("time", size, 512, peers=True, **half) for size in (8192, 65_536)]
        tasks += [Task("peak", 65_536, 512, loss=loss, **half) for loss in LOSSES]
        tasks.append(Task("fit", 8192, 512, **half))
    if "record" in parts:
        tasks.append(Task("record", 2**20, 512, **half))
    return tasks


def _long(size: int, width: int) -> bool:
    """Whether two cores take minutes for it and a smaller width tells as much."""
    return size > 16_384 and width > 256


def _devices(block: int, batch: int = 32_768, width: int = 256) -> list[Task]:
    tasks = []
    for loss in ("SimCon", "MV-SimCon"):
        tasks.append(Task("devices", batch, width, block, loss=loss))
        for columns in ("gather", "ring"):
            shared = {"block": block, "loss": loss, "columns": columns}
            several = [count for count in DEVICES if count > 1]
            tasks += [Task("devices", batch, width, devices=n, **shared) for n in several]
            tasks.append(Task("planned", batch, width, devices=EXTRAPOLATED, **shared))
    return tasks


def run(tasks: Sequence[Task], path: Path, *, again: bool, backend: str, device: str) -> None:
    """Measures what the results file does not have, or everything `again`.

    Raises:
      RuntimeError: some measurements failed; the others were made.
    """
    labels = {task: task.label(_kind(task, backend)) for task in tasks}
    done = set() if again else {row["task"] for row in workdirs.read_json(path).get("rows", [])}
    missing = [task for task in tasks if labels[task] not in done]
    print(f"{len(missing)} of {len(tasks)} measurements to do", flush=True)
    failed = []
    for group in groups(missing):
        left, started = iter(group), [time.time()]

        def finished(rows: list[dict[str, Any]], left=left, started=started) -> None:
            task, now = next(left), time.time()
            seconds, started[0] = now - started[0], now
            print(f"{seconds:6.1f} s  {labels[task]}", flush=True)
            rows = [row | {"part": task.part, "task": labels[task]} for row in rows]
            measurements.write(BENCHMARK, path, rows, list(labels.values()), device, seconds)

        if error := measure(group, finished):
            failed.append(f"{labels[next(left, group[-1])]}: {error}")
            print(f"FAILED {failed[-1]}", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} measurements failed: {'; '.join(failed)}")


def _kind(task: Task, backend: str) -> str:
    return "cpu" if task.part in ("devices", "planned") else backend


def groups(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks that share a process: those that run nothing."""
    together: dict[str, list[Task]] = {}
    for number, task in enumerate(tasks):
        part = {"planned": "devices"}.get(task.part, task.part)
        key = part if part in ("memory", "devices") else str(number)
        together.setdefault(key, []).append(task)
    return list(together.values())


def measure(group: Sequence[Task], finished: Callable[[list[dict[str, Any]]], None]) -> str:
    """Runs the tasks in a process and hands over the rows of each; the last words of a failure."""
    played = {}
    if group[0].part in ("devices", "planned"):  # compiled for devices that the CPU plays
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        played = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    tasks = json.dumps([task._asdict() for task in group])
    with subprocess.Popen(
        [sys.executable, str(BENCHMARK.workers), tasks],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **played},
    ) as process:
        last = ""
        for line in process.stdout or ():
            if line.startswith('{"task"'):
                finished(json.loads(line)["rows"])
            else:
                last = line.strip()
    return f"exit code {process.returncode} {last}".strip() if process.returncode else ""

"""Measurements in processes of their own, into a results file that a later start goes on with."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks import harness
from trm_jax.train import workdirs

Row = dict[str, Any]


class Measurement(Protocol):
    """A task of a benchmark: a NamedTuple."""

    @property
    def part(self) -> str:
        """Which of the benchmark's parts."""
        ...

    def label(self, device: str, /) -> str:
        """Names the measurement in the results file."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


class Benchmark(NamedTuple):
    """What differs between benchmarks.

    name: of the results file and, with ".py", of the command.
    workers: a script that gets a task as JSON and prints its rows as JSON, last.
    page: rows -> Markdown.
    environment: task -> variables of its process.
    complete: rows -> rows with what only all of them tell.
    """

    name: str
    workers: Path
    page: Callable[[list[Row]], str]
    environment: Callable[[Any], Mapping[str, str]] = lambda task: {}
    complete: Callable[[list[Row]], list[Row]] = lambda rows: rows


def run(
    benchmark: Benchmark,
    tasks: Sequence[Measurement],
    path: Path,
    *,
    again: bool,
    backend: str,
    device: str,
) -> None:
    """Measures what the results file does not have, or everything `again`; each in a process.

    Raises:
      RuntimeError: some measurements failed; the others were made.
    """
    labels = [task.label(backend) for task in tasks]
    done = set() if again else {row["task"] for row in workdirs.read_json(path).get("rows", [])}
    missing = [pair for pair in zip(tasks, labels, strict=True) if pair[1] not in done]
    print(f"{len(missing)} of {len(tasks)} measurements to do", flush=True)
    failed = []
    for task, label in missing:
        started = time.time()
        rows, error = measure(benchmark, task)
        seconds = time.time() - started
        if error:
            failed.append(f"{label}: {error}")
            print(f"FAILED {failed[-1]}", flush=True)
            continue
        print(f"{seconds:6.1f} s  {label}", flush=True)
        rows = [row | {"part": task.part, "task": label} for row in rows]
        write(benchmark, path, rows, labels, device, seconds)
    if failed:
        raise RuntimeError(f"{len(failed)} measurements failed: {'; '.join(failed)}")


def measure(benchmark: Benchmark, task: Measurement) -> tuple[list[Row], str]:
    """(the task's rows, the last words of a failure), from a process of its own."""
    done = subprocess.run(
        [sys.executable, str(benchmark.workers), json.dumps(task._asdict())],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **benchmark.environment(task)},
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        last = lines[-1].strip() if lines else ""
        return [], f"exit code {done.returncode} {last}".strip()
    return json.loads(lines[-1]), ""


def write(
    benchmark: Benchmark,
    path: Path,
    rows: list[Row],
    planned: Sequence[str],
    device: str,
    seconds: float,
) -> None:
    """Adds a measurement's rows to the results file, or replaces them; writes the page."""
    before = workdirs.read_json(path)
    kept = [row for row in before.get("rows", []) if row["task"] != rows[0]["task"]]
    # In the order of the plan, what others measured first.
    place = {label: number for number, label in enumerate(planned)}
    merged = sorted(kept + rows, key=lambda row: place.get(row["task"], -1))
    missing = set(planned) - {row["task"] for row in merged}
    words = [word for word in sys.argv[1:] if not word.startswith(("--results", "--again"))]
    body = {
        "name": benchmark.name,
        "command": " ".join([f"python benchmarks/{benchmark.name}.py", *words]),
        "device": device,
        "cores": os.cpu_count(),
        "seconds": round(before.get("seconds", 0) + seconds, 1),
        "torch": _torch_version(),
        **({"partial": True} if missing else {}),
        "rows": benchmark.complete(merged),
    }
    harness.write_results(path, body)
    path.with_suffix(".md").write_text(benchmark.page(body["rows"]))


def timed_row(
    task: Any,
    name: str,
    metric: str,
    values: Sequence[float],
    unit: str,
    more: Mapping[str, Any] | None = None,
) -> Row:
    """A row whose figures keep six digits; `values` by round, `more` of task.condition."""
    made = harness.make_row(name, task.condition | dict(more or {}), metric, {0: 0.0}, unit, None)
    del made["seeds"]
    return made | {
        "mean": short(statistics.fmean(values)),
        "std": short(statistics.stdev(values)) if len(values) > 1 else None,
        "median": short(statistics.median(values)),
        "values": {str(number): short(value) for number, value in enumerate(values)},
        "rounds": len(values),
    }


def short(value: float) -> float:
    """Six digits of it."""
    return float(f"{value:.6g}")


def _torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None

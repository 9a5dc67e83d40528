"""Which measurements benchmarks/matching.py makes, in which processes, and where they go."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks import matching_report as report
from benchmarks.matching_sides import Task
from trm_jax.train import workdirs

WORKERS = Path(__file__).with_name("matching_workers.py")
PARTS = ("size", "memory", "query", "speed")


def plan(
    parts: Sequence[str],
    sides: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    threads: Sequence[int],
    template: Task,
) -> list[Task]:
    """The measurements, quick ones first.

    Args:
      parts: of PARTS. sides: of matching_sides.SIDES. sizes: (images, captions). threads: of a CPU.
      template: all else.
    """
    tasks = []
    for part in parts:
        own = template._replace(part=part)
        if part == "size":
            tasks.append(own)
            continue
        for count in threads:
            for images, captions in sizes[:1] if part == "query" else sizes:
                sized = own._replace(images=images, captions=captions, threads=count)
                if part == "memory":
                    tasks += [sized._replace(sides=(side,)) for side in sides]
                else:
                    tasks.append(sized._replace(sides=() if part == "query" else tuple(sides)))
    return tasks


def run(tasks: Sequence[Task], path: Path, *, again: bool, backend: str, device: str) -> None:
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
        rows, error = measure(task)
        seconds = time.time() - started
        if error:
            failed.append(f"{label}: {error}")
            print(f"FAILED {failed[-1]}", flush=True)
            continue
        print(f"{seconds:6.1f} s  {label}", flush=True)
        rows = [row | {"part": task.part, "task": label} for row in rows]
        write(path, rows, labels, device, seconds)
    if failed:
        raise RuntimeError(f"{len(failed)} measurements failed: {'; '.join(failed)}")


def measure(task: Task) -> tuple[list[dict[str, Any]], str]:
    """(the task's rows, the last words of a failure), from a process of its own."""
    command = [sys.executable, str(WORKERS), json.dumps(task._asdict())]
    # NumPy's BLAS makes its threads when it is loaded.
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    threads = dict.fromkeys(names, str(task.threads)) if task.threads else {}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **threads}
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        last = lines[-1].strip() if lines else ""
        return [], f"exit code {done.returncode} {last}".strip()
    return json.loads(lines[-1]), ""


def write(
    path: Path, rows: list[dict[str, Any]], planned: Sequence[str], device: str, seconds: float
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
        "name": "matching",
        "command": " ".join(["python benchmarks/matching.py", *words]),
        "device": device,
        "cores": os.cpu_count(),
        "seconds": round(before.get("seconds", 0) + seconds, 1),
        "torch": metadata.version("torch"),
        **({"partial": True} if missing else {}),
        "rows": merged,
    }
    harness.write_results(path, body)
    path.with_suffix(".md").write_text(report.page(merged))

"""Which measurements benchmarks/scoring.py makes, in which processes, and where they go."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks import scoring_report as report
from benchmarks.scoring_programs import LENGTHS, SHORTEST, Task
from configs import common_napreg
from trm_jax.train import workdirs
from trm_jax.types import UserError

WORKERS = Path(__file__).with_name("scoring_workers.py")
PARTS = ("memory", "evaluation", "training")


def some_of(flag: str, words: Sequence[str], known: Iterable[str]) -> list[str]:
    """The words of a flag, in the order of `known`. Raises UserError at others."""
    known = list(known)
    if wrong := [word for word in words if word not in known]:
        raise UserError(f"--{flag}: {wrong[0]!r} is none of {', '.join(known)}")
    return [word for word in known if word in words]


def sizes(words: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """IMAGESxCAPTIONS as numbers. Raises UserError at anything else."""
    matches = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word) for word in words]
    for word, match in zip(words, matches, strict=True):
        if not match:
            raise UserError(f"--sizes: {word!r} is not IMAGESxCAPTIONS, such as 1000x5000")
    if not words:
        raise UserError("--sizes: name at least one, such as 1000x5000")
    return tuple((int(match[1]), int(match[2])) for match in matches if match)


def buckets(given: Sequence[int]) -> tuple[int, ...]:
    """Lengths of captions, those of the configs by default. Raises UserError."""
    found = tuple(given or common_napreg.napreg("scan", "").data.length_buckets)
    longest = SHORTEST + len(LENGTHS) - 1
    if list(found) != sorted(set(found)) or found[-1] < longest:
        raise UserError(f"--buckets={found} must be ascending, the last {longest} or more")
    return found


def threads(given: Sequence[int], backend: str) -> tuple[int, ...]:
    """Numbers of CPU threads; 0, for all, on a GPU. Raises UserError where they cannot be had."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("this benchmark needs PyTorch: pip install -e '.[parity]'")
    if backend != "cpu":
        return (0,)
    if not hasattr(os, "sched_getaffinity"):
        raise UserError("--threads: only Linux can leave a process a part of the cores")
    cores = len(os.sched_getaffinity(0))
    if not given or max(given) > cores:
        raise UserError(f"--threads={','.join(map(str, given))}: there are {cores} cores here")
    return tuple(given)


def plan(
    parts: Sequence[str],
    scorers: Sequence[str],
    threads: Sequence[int],
    template: Task,
    backend: str,
) -> list[Task]:
    """The measurements, quick ones first."""
    tasks = []
    if backend != "cpu":
        template = template._replace(whole=True, captions=0)
    for part in parts:
        for count in threads if part != "memory" else (0,):
            for scorer in scorers:
                task = template._replace(part=part, scorer=scorer, threads=count)
                if part != "evaluation":
                    task = task._replace(sizes=(), whole=False)
                tasks.append(task)
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
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode:
        last = lines[-1].strip() if lines else ""
        return [], f"exit code {done.returncode} {last}".strip()
    return json.loads(lines[-1]), ""


def _torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


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
        "name": "scoring",
        "command": " ".join(["python benchmarks/scoring.py", *words]),
        "device": device,
        "cores": os.cpu_count(),
        "seconds": round(before.get("seconds", 0) + seconds, 1),
        "torch": _torch_version(),
        **({"partial": True} if missing else {}),
        "rows": merged,
    }
    harness.write_results(path, body)
    path.with_suffix(".md").write_text(report.page(merged))

"""Which measurements benchmarks/scoring.py makes."""

import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import measurements
from benchmarks import scoring_report as report
from benchmarks.scoring_programs import LENGTHS, SHORTEST, Task
from configs import common_napreg
from trm_jax.types import UserError

BENCHMARK = measurements.Benchmark(
    "scoring", Path(__file__).with_name("scoring_workers.py"), report.page
)
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

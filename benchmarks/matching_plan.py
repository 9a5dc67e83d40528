"""Which measurements benchmarks/matching.py makes."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import matching_report as report
from benchmarks import measurements
from benchmarks.matching_sides import Task

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


def _environment(task: Task) -> dict[str, str]:
    """NumPy's BLAS makes its threads when it is loaded."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return dict.fromkeys(names, str(task.threads)) if task.threads else {}


BENCHMARK = measurements.Benchmark(
    "matching", Path(__file__).with_name("matching_workers.py"), report.page, _environment
)

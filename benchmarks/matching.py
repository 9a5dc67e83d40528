"""Matching all images and captions by prototypes of words: speed and memory beside NumPy and torch.

python benchmarks/matching.py                       # two cores; on a GPU the same command
python benchmarks/matching.py --parts=speed --sizes=1000x5000 --threads=1

Writes benchmarks/results/matching.{json,md} after every measurement; started again it measures only
what is missing (--again: everything). Needs torch and Linux. Times need a quiet machine; "load" of
a row is the load average before its measurement.

speed    evaluate.knowledge_matching.score_all; the same algorithm in NumPy; a PyTorch loop over
         images, each against the words of all captions, timed on --torch_images of them and scaled.
         All sides take turns in one process, and their scores are compared.
memory   how far the resident memory of a process of each side rises above its inputs and its result
         (on a GPU: the device's peak above them).
query    one image against all captions of the first size, from its features on, and one caption
         against all of its images, from its text on.
size     parameters of the networks and numbers of a knowledge.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import flags  # noqa: E402

from benchmarks import harness, measurements, scoring_plan  # noqa: E402
from benchmarks import matching_plan as plans  # noqa: E402
from benchmarks.matching_sides import SIDES, Task  # noqa: E402
from benchmarks.simcon_loss_plan import numbers  # noqa: E402
from launch import cli  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "matching.json"

_PARTS = flags.DEFINE_list("parts", list(plans.PARTS), f"Of {', '.join(plans.PARTS)}")
_SIDES = flags.DEFINE_list("sides", list(SIDES), f"Of {', '.join(SIDES)}; ours is always there")
_THREADS = flags.DEFINE_list("threads", ["2"], "CPU threads of all sides, one after the other")
_SIZES = flags.DEFINE_list("sizes", ["1000x5000", "5000x25000"], "IMAGESxCAPTIONS")
_REGIONS = flags.DEFINE_integer("regions", 36, "Of an image", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 512, "Of regions and prototypes", lower_bound=1)
_WORDS = flags.DEFINE_integer("words", 10, "Of a caption, in the mean", lower_bound=1)
_KNOWLEDGE = flags.DEFINE_integer("knowledge", 12_385, "Words of the knowledge", lower_bound=1)
_TORCH_IMAGES = flags.DEFINE_integer(
    "torch_images", 50, "That PyTorch is timed with; 0: all", lower_bound=0
)
_MEMORY_MB = flags.DEFINE_float(
    "memory_mb", 0.0, "Of a block of images; 0: 16 on a CPU, 1024 on a GPU", lower_bound=0.0
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds in which the sides take turns", lower_bound=1)
_AGAIN = flags.DEFINE_bool("again", False, "Measure what the results file already has, too")
_RESULTS = flags.DEFINE_string("results", str(RESULTS), "The results file")


def main(arguments: list[str]) -> None:
    """Measures what is missing."""
    cli.no_arguments(arguments)
    import jax

    backend, kind = jax.default_backend(), jax.devices()[0].device_kind
    template = Task(
        part="",
        regions=_REGIONS.value,
        width=_WIDTH.value,
        words=_WORDS.value,
        knowledge=_KNOWLEDGE.value,
        torch_images=_TORCH_IMAGES.value,
        memory_mb=_MEMORY_MB.value or (16.0 if backend == "cpu" else 1024.0),
        rounds=_ROUNDS.value,
    )
    tasks = plans.plan(
        scoring_plan.some_of("parts", _PARTS.value, plans.PARTS),
        scoring_plan.some_of("sides", ["ours", *_SIDES.value], SIDES),
        scoring_plan.sizes(_SIZES.value),
        scoring_plan.threads(numbers("threads", _THREADS.value), backend),
        template,
    )
    device, path = harness.device_name(kind), Path(_RESULTS.value)
    options = {"again": _AGAIN.value, "backend": backend, "device": device}
    measurements.run(plans.BENCHMARK, tasks, path, **options)


if __name__ == "__main__":
    cli.run(main)

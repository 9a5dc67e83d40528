"""Scoring all pairs of images and captions: speed and memory beside a PyTorch loop over captions.

python benchmarks/scoring.py                        # two cores; on a GPU the same command
python benchmarks/scoring.py --parts=evaluation --scorers=SGR --threads=1 --rounds=3
python benchmarks/scoring.py --buckets=10,12,14,16,18,20,24,32,48 --block=32

Writes benchmarks/results/scoring.{json,md} after every measurement; started again it measures only
what is missing (--again: everything). Needs torch; on a CPU also Linux. Times need a quiet machine:
PyTorch's threads wait for each other at every operation, so other work slows it more than ours.
"load" of a row is the load average before its measurement.

evaluation  the evaluator's own program (batches of images and of captions sorted by length, padded
            to data.length_buckets, in blocks of model.options.block). On a CPU one batch of images
            meets one batch of captions of each padded length, PyTorch --captions of them, and both
            are scaled to all of --sizes; on a GPU the first size is run as a whole.
training    scores of a batch's pairs and their gradients (words, regions, parameters).
memory      temporaries of both programs, by block.

Both sides have the same weights, regions and words (random ones), and their scores are compared.
They take turns in one process; a ratio is the median of the quotients within a round.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import flags  # noqa: E402

from benchmarks import harness, measurements  # noqa: E402
from benchmarks import scoring_plan as plans  # noqa: E402
from benchmarks.scoring_programs import SCORERS, Task  # noqa: E402
from benchmarks.simcon_loss_plan import numbers  # noqa: E402
from launch import cli  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "scoring.json"

_PARTS = flags.DEFINE_list("parts", list(plans.PARTS), f"Of {', '.join(plans.PARTS)}")
_SCORERS = flags.DEFINE_list("scorers", list(SCORERS), f"Of {', '.join(SCORERS)}")
_THREADS = flags.DEFINE_list(
    "threads", ["1", "2"], "CPU threads of both sides, one after the other"
)
_SIZES = flags.DEFINE_list(
    "sizes", ["1000x5000", "5000x25000"], "IMAGESxCAPTIONS of evaluations, the shortest first"
)
_IMAGES = flags.DEFINE_integer("images", 128, "Of a batch, and captions of a batch", lower_bound=1)
_CAPTIONS = flags.DEFINE_integer(
    "captions", 32, "Of a batch, that PyTorch is timed with on a CPU; 0: all", lower_bound=0
)
_WIDTH = flags.DEFINE_integer("width", 1024, "Of regions and words", lower_bound=1)
_SIM_DIM = flags.DEFINE_integer("sim_dim", 256, "Of SGRAF's similarity vectors", lower_bound=1)
_REGIONS = flags.DEFINE_integer("regions", 36, "Of an image", lower_bound=1)
_BUCKETS = flags.DEFINE_list("buckets", [], "data.length_buckets, default: those of the configs")
_BLOCK = flags.DEFINE_integer(
    "block", -1, "model.options.block, -1: that of the configs", lower_bound=-1
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds in which the sides take turns", lower_bound=1)
_AGAIN = flags.DEFINE_bool("again", False, "Measure what the results file already has, too")
_RESULTS = flags.DEFINE_string("results", str(RESULTS), "The results file")


def main(arguments: list[str]) -> None:
    """Measures what is missing."""
    cli.no_arguments(arguments)
    import jax

    backend, kind = jax.default_backend(), jax.devices()[0].device_kind
    template = Task(
        part="",
        scorer="",
        images=_IMAGES.value,
        captions=_CAPTIONS.value,
        width=_WIDTH.value,
        sim_dim=_SIM_DIM.value,
        regions=_REGIONS.value,
        block=_BLOCK.value,
        buckets=plans.buckets(numbers("buckets", _BUCKETS.value)),
        sizes=plans.sizes(_SIZES.value),
        rounds=_ROUNDS.value,
    )
    tasks = plans.plan(
        plans.some_of("parts", _PARTS.value, plans.PARTS),
        plans.some_of("scorers", _SCORERS.value, SCORERS),
        plans.threads(numbers("threads", _THREADS.value), backend),
        template,
        backend,
    )
    device, path = harness.device_name(kind), Path(_RESULTS.value)
    options = {"again": _AGAIN.value, "backend": backend, "device": device}
    measurements.run(plans.BENCHMARK, tasks, path, **options)


if __name__ == "__main__":
    cli.run(main)

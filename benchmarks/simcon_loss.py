"""Streaming SimCon: time, memory, what several devices compute and move, and a record on a GPU.

python benchmarks/simcon_loss.py                        # on a CPU: time, memory, devices
python benchmarks/simcon_loss.py --parts=gpu,record     # on a GPU
python benchmarks/simcon_loss.py --parts=time --sizes=1024,2048 --rounds=3

Writes benchmarks/results/simcon_loss.{json,md} after every measurement; started again it measures
only what is missing (--again: everything). Times need a quiet machine: "load" of a row is the load
average before its measurement. Parts:

time     streaming InfoNCE (what a batch costs without SimCon), SimCon and MV-SimCon, dense SimCon
         (up to 8,192 pairs) and PyTorch's (up to 4,096, on a GPU 8,192), in rotating order, beside
         the products of tiles that cannot be saved; some sides of tiles at one size.
memory   temporaries of the compiled programs, dense and streaming.
devices  FLOPs, bytes accessed, collectives and temporaries of a device of 1, 2, 4, 8 (compiled for
         devices that the CPU plays), and by formula of 256.
gpu      65,536 pairs in bfloat16: time and peak memory; dense PyTorch up to what fits.
record   1,048,576 pairs in bfloat16, once, 64 rows against float64.

Every measurement runs in a process of its own. A ratio is how many times as long as the other side
in the same round, the median over the rounds. Calls longer than 20 seconds are not repeated.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import flags  # noqa: E402

from benchmarks import harness  # noqa: E402
from benchmarks import simcon_loss_plan as plans  # noqa: E402
from launch import cli  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "simcon_loss.json"

_PARTS = flags.DEFINE_list(
    "parts", [], f"Of {', '.join(plans.PARTS)}; default: what this device can do"
)
_SIZES = flags.DEFINE_list("sizes", [], "Batch sizes of time and memory, default 1024 to 65536")
_WIDTHS = flags.DEFINE_list("widths", ["256", "512"], "Embedding sizes of time and memory")
_BLOCK = flags.DEFINE_integer("block", 0, "Side of the tiles, 0: the loss's default", lower_bound=0)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds in which the sides take turns", lower_bound=1)
_AGAIN = flags.DEFINE_bool("again", False, "Measure what the results file already has, too")
_RESULTS = flags.DEFINE_string("results", str(RESULTS), "The results file")


def main(arguments: list[str]) -> None:
    """Measures what is missing."""
    cli.no_arguments(arguments)
    import jax

    backend, kind = jax.default_backend(), jax.devices()[0].device_kind
    tasks = plans.plan(
        plans.parts_of(_PARTS.value, backend),
        plans.numbers("sizes", _SIZES.value),
        plans.numbers("widths", _WIDTHS.value),
        backend,
        block=_BLOCK.value,
        rounds=_ROUNDS.value,
    )
    device, path = harness.device_name(kind), Path(_RESULTS.value)
    plans.run(tasks, path, again=_AGAIN.value, backend=backend, device=device)


if __name__ == "__main__":
    cli.run(main)

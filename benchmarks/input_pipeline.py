"""Images per second and core of the input pipeline, of bare OpenCV and of a torch DataLoader.

python benchmarks/input_pipeline.py --data=FOLDER --rounds=3

FOLDER is in COCO's layout (annotations/instances_trainYEAR.json and trainYEAR/). Every method runs
in a process of its own, pinned to as many cores as it has workers, for --seconds behind a warm-up;
all take turns, --rounds times, so that other load on the machine meets all of them. Images per CPU
second of the process and its children is the figure that such load moves least: it is what a row
"images_per_s_per_core" holds, "images_per_s" is by the clock. A ratio is the median over the
rounds of the quotient within a round. Writes benchmarks/results/input_pipeline.{json,md}. Linux.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags  # noqa: E402

from benchmarks import harness  # noqa: E402
from benchmarks import input_pipeline_report as report  # noqa: E402
from launch import cli  # noqa: E402
from trm_jax.types import UserError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "input_pipeline.json"
PACKAGES = ("grain", "numpy", "opencv-python-headless", "pillow", "torch")

_DATA = flags.DEFINE_string("data", "", "Folder in COCO's layout; required")
_YEAR = flags.DEFINE_enum("year", "2017", ["2014", "2017"], "Year of the layout")
_SIZES = flags.DEFINE_multi_integer("image_size", [448, 224], "Sides in pixels", lower_bound=1)
_AUGMENT = flags.DEFINE_multi_enum(
    "augment", ["none", "tai", "dualcoop"], ["none", "flip_crop", "tai", "dualcoop"], "Recipes"
)
_WORKERS = flags.DEFINE_multi_integer(
    "workers", [0, 1, 2], "Worker processes; 0 reads in the process itself", lower_bound=0
)
_SECONDS = flags.DEFINE_float("seconds", 2.0, "Length of one measurement", lower_bound=0.01)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each method", lower_bound=1)
_RESULTS = flags.DEFINE_string("results", "", f"The results file, default {RESULTS.name}")


def main(arguments: list[str]) -> None:
    """Measures all methods in turn and writes the results."""
    cli.no_arguments(arguments)
    if not _DATA.value:
        raise UserError("--data is missing: a folder in COCO's layout")
    started = time.time()
    tasks = report.plan(_SIZES.value, _AUGMENT.value, _WORKERS.value)
    spared = sorted(os.sched_getaffinity(0))
    common = {"data": _DATA.value, "year": _YEAR.value, "seconds": _SECONDS.value}
    measured: list[dict[str, Any]] = []
    for number in range(_ROUNDS.value):
        # Another start in every round: no method always runs after the same one.
        shift = number * len(tasks) // _ROUNDS.value
        for task in (*tasks[shift:], *tasks[:shift]):
            cores = spared[: max(1, task["workers"])]
            result = report.measure({**task, **common, "cores": cores, "packages": PACKAGES})
            measured.append({**task, "round": number, **result})
            speed = result["images"] / result["cpu_seconds"]
            print(f"round {number}: {report.describe(task)}: {speed:.0f} images/CPU-s", flush=True)
    path = Path(_RESULTS.value or RESULTS)
    words = [word for word in sys.argv[1:] if not word.startswith(("--data", "--results"))]
    body = {
        "name": "input_pipeline",
        "command": " ".join(["python benchmarks/input_pipeline.py --data=FOLDER", *words]),
        "versions": measured[0]["versions"],
        "device": harness.device_name("cpu"),
        "cores": os.cpu_count(),
        "seconds": round(time.time() - started, 1),
        "rows": report.rows(tasks, measured),
    }
    harness.write_results(path, body)
    path.with_suffix(".md").write_text(report.page(body["rows"]))


if __name__ == "__main__":
    cli.run(main)

"""TRM-ML's claims: its ablation, its main peer and simple baselines, by known labels and seed.

python benchmarks/claims_trm_ml.py --jobs=2 --seeds=3 \
    --data=FOLDER --lit=runs/lit_flickr8k/export/clip.safetensors

Writes benchmarks/results/claims_trm_ml.{json,md,png}, after every finished run; started again, it
measures what is missing: what neither --runs nor the results file has a record of, for this config
and these weights. After a change of code that moves the results, delete both. --data is the folder
of coco_dense/ and coco_subset/ (default: the environment variable TRM_DATA); without --lit the rows
on COCO's features are left out. A seed draws the parameters, the order of the images and the label
mask. mAP is that of the last epoch.

To choose settings, on a fifth of the training images instead of the test images:
python benchmarks/claims_trm_ml.py --validation --only='source=glyphs,known=0.1,name=TRM-ML' \
    --set=config.loss.contrastive_weight=0.03
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags  # noqa: E402

from benchmarks import claims_trm_ml_plan as plan  # noqa: E402
from benchmarks import claims_trm_ml_report as report  # noqa: E402
from benchmarks import harness, selection  # noqa: E402
from launch import cli  # noqa: E402
from trm_jax.train import workdirs  # noqa: E402
from trm_jax.types import UserError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "claims_trm_ml.json"
_KEYS = ("source", "known", "name", "recipe", "seed")

_JOBS = flags.DEFINE_integer("jobs", 1, "Worker processes, each with one thread", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0, 1, .. of every row", lower_bound=1)
_RUNS = flags.DEFINE_string("runs", "runs/claims", "Folder of the runs; kept to resume")
_DATA = flags.DEFINE_string(
    "data", os.environ.get("TRM_DATA", ""), "Folder of coco_dense/ and coco_subset/"
)
_LIT = flags.DEFINE_string("lit", "", "clip.safetensors of configs/lit_flickr8k.py, exported")
_ONLY = flags.DEFINE_string(
    "only", "", "Which runs: KEY=VALUE[|VALUE],.. by source, known, name, recipe, seed"
)
_SET = flags.DEFINE_multi_string("set", [], "config.A.B=VALUE for every run that has the field")
_VALIDATION = flags.DEFINE_bool(
    "validation",
    False,
    "Measure on 20 % of the training images and print a table; writes no results",
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "List the runs, done or not, and stop")
_RESULTS = flags.DEFINE_string("results", "", f"The results file, default {RESULTS.name}")


def main(arguments: list[str]) -> None:
    """Plans, runs what is missing and writes the results."""
    cli.no_arguments(arguments)
    if _SET.value and not (_VALIDATION.value or _RESULTS.value or _DRY_RUN.value):
        raise UserError("--set changes what is measured: use --validation, or name a --results")
    runs = Path(_RUNS.value)
    tasks = plan.tasks(
        seeds=_SEEDS.value,
        cache_dir=runs / "features",
        data=_DATA.value,
        lit=_LIT.value,
        overrides=selection.overrides(_SET.value),
        validation=_VALIDATION.value,
    )
    stored = _results_file().get("records", {})
    records = {t.folder: harness.record_of(t, runs) or stored.get(t.folder, {}) for t in tasks}
    chosen = selection.choose(tasks, _ONLY.value, _KEYS)
    if _DRY_RUN.value:
        for task in chosen:
            print("done" if records[task.folder] else "todo", task.folder)
        return
    todo = [task for task in chosen if not records[task.folder]]
    kept = not _VALIDATION.value

    def write_results() -> None:
        if kept:
            write(tasks, records)

    harness.run_plan(
        todo,
        records,
        runs,
        jobs=_JOBS.value,
        shown=("mAP", "mAP_best", "seconds"),
        write=write_results,
    )
    if not kept:
        print(report.validation_table(chosen, records))


def write(tasks: Sequence[harness.Task], records: Mapping[str, dict[str, Any]]) -> None:
    """The results file with the table and the chart beside it, from all records of the plan."""
    if not any(records.values()):
        return
    path = Path(_RESULTS.value or RESULTS)
    body = report.results(tasks, records, seeds=_SEEDS.value, before=_results_file())
    harness.write_results(path, body)
    report.write_pages(workdirs.read_json(path), path)


def _results_file() -> dict[str, Any]:
    return workdirs.read_json(Path(_RESULTS.value or RESULTS))


if __name__ == "__main__":
    cli.run(main)

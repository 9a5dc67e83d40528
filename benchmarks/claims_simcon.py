"""SimCon's claims: its ablation against InfoNCE under caption noise, by steps, batch and recipe.

python benchmarks/claims_simcon.py --jobs=2 --seeds=3 --data=FOLDER

Writes benchmarks/results/claims_simcon.{json,md} and claims_simcon_*.png, after every finished
run; started again, it measures what is missing: what neither --runs nor the results file has a
record of, for this config. After a change of code that moves the results, delete both. --data is
the folder of flickr8k_precomp/ and flickr8k/ (default: the environment variable TRM_DATA); without
it the rows on Flickr8k are left out. A seed draws the parameters, the order of the images, their
augmentation and, on Flickr8k, which captions are exchanged.

To choose settings, on other scenes than the test scenes:
python benchmarks/claims_simcon.py --validation --only='source=glyphs,noise=0.3,name=SimCon' \
    --set=config.optimizer.learning_rate=1e-3

To look at the positives that a run of launch/train.py mines, in RUN/pictures/positives.png:
python benchmarks/claims_simcon.py --positives=RUN
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags  # noqa: E402

from benchmarks import claims_simcon_measure as measure  # noqa: E402
from benchmarks import claims_simcon_plan as plan  # noqa: E402
from benchmarks import claims_simcon_report as report  # noqa: E402
from benchmarks import harness, selection  # noqa: E402
from launch import cli  # noqa: E402
from trm_jax.train import workdirs  # noqa: E402
from trm_jax.types import UserError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "claims_simcon.json"
_KEYS = ("source", "noise", "batch", "recipe", "name", "seed")
_SHOWN = ("mIoU", "Rsum", "seconds")

_JOBS = flags.DEFINE_integer("jobs", 1, "Worker processes, each with one thread", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds 0, 1, .. of every row", lower_bound=1)
_SWEEP_SEEDS = flags.DEFINE_integer(
    "sweep_seeds", 1, "Seeds of photos, recipes and batch sizes, at most --seeds", lower_bound=1
)
_RUNS = flags.DEFINE_string("runs", "runs/claims_simcon", "Folder of the runs; kept to resume")
_DATA = flags.DEFINE_string(
    "data", os.environ.get("TRM_DATA", ""), f"Folder of {plan.FEATURES}/ and {plan.PHOTOS}/"
)
_ONLY = flags.DEFINE_string(
    "only", "", f"Which runs: KEY=VALUE[|VALUE],.. by {', '.join(_KEYS)}; 'recipe=' is no recipe"
)
_SET = flags.DEFINE_multi_string("set", [], "config.A.B=VALUE for every run that has the field")
_VALIDATION = flags.DEFINE_bool(
    "validation",
    False,
    "Measure on other glyph scenes, and on 10 % of Flickr8k's training images, and print a table; "
    "writes no results",
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "List the runs, done or not, and stop")
_RESULTS = flags.DEFINE_string("results", "", f"The results file, default {RESULTS.name}")
_POSITIVES = flags.DEFINE_string("positives", "", "Draw the positives of this run, and stop")


def main(arguments: list[str]) -> None:
    """Plans, runs what is missing and writes the results; or draws positives."""
    cli.no_arguments(arguments)
    if _POSITIVES.value:
        print(f"positives in {measure.positives_picture(Path(_POSITIVES.value))}")
        return
    if _SET.value and not (_VALIDATION.value or _RESULTS.value or _DRY_RUN.value):
        raise UserError("--set changes what is measured: use --validation, or name a --results")
    for name in (plan.FEATURES, plan.PHOTOS) if _DATA.value else ():
        if not (Path(_DATA.value) / name).is_dir():
            raise UserError(
                f"--data={_DATA.value} has no folder {name}/; --data= is glyph scenes alone"
            )
    runs = Path(_RUNS.value)
    tasks = plan.tasks(
        seeds=_SEEDS.value,
        sweep_seeds=_SWEEP_SEEDS.value,
        data=_DATA.value,
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

    harness.run_plan(todo, records, runs, jobs=_JOBS.value, shown=_SHOWN, write=write_results)
    if not kept:
        print(report.validation_table(chosen, records))


def write(tasks: Sequence[harness.Task], records: Mapping[str, dict[str, Any]]) -> None:
    """The results file with the page and the charts beside it, from all records of the plan."""
    if not any(records.values()):
        return
    path = Path(_RESULTS.value or RESULTS)
    counts = {"seeds": _SEEDS.value, "sweep_seeds": _SWEEP_SEEDS.value}
    body = report.results(tasks, records, **counts, before=_results_file())
    harness.write_results(path, body)
    report.write_pages(workdirs.read_json(path), path)


def _results_file() -> dict[str, Any]:
    return workdirs.read_json(Path(_RESULTS.value or RESULTS))


if __name__ == "__main__":
    cli.run(main)

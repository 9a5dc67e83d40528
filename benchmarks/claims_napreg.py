"""NAPReg's claims: nouns as proxies beside triplet, multi-similarity and polynomial losses.

python benchmarks/claims_napreg.py --jobs=2 --seeds=3 --data=FOLDER

Writes benchmarks/results/claims_napreg.{json,md} and claims_napreg*.png, after every finished run;
started again, it measures what is missing: what neither --runs nor the results file has a record
of, for this config, and runs that were cut off go on from their last epoch. After a change of code
that moves the results, delete both. --data is the folder of flickr8k_precomp (default:
flickr8k_precomp/ in the folder of the environment variable TRM_DATA). A seed draws the parameters
and the order of the captions.

To choose settings, on a tenth of the training images instead of the test images:
python benchmarks/claims_napreg.py --validation --only='model=SCAN i2t,recipe=,name=MS|MS+NAP' \
    --set=config.optimizer.learning_rate=1e-3
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags  # noqa: E402

from benchmarks import claims_napreg_plan as plan  # noqa: E402
from benchmarks import claims_napreg_report as report  # noqa: E402
from benchmarks import claims_simcon_report, harness, selection  # noqa: E402
from launch import cli  # noqa: E402
from trm_jax.train import workdirs  # noqa: E402
from trm_jax.types import UserError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "claims_napreg.json"
_KEYS = ("model", "name", "pooling", "K", "context", "recipe", "seed")
_SHOWN = ("Rsum", "t2i_R@1", "i2t_R@1", "seconds")


_JOBS = flags.DEFINE_integer("jobs", 1, "Worker processes, each with one thread", lower_bound=1)
_SEEDS = flags.DEFINE_integer(
    "seeds", 3, f"Seeds 0, 1, .. of {plan.CHIEF} with {' and '.join(plan.FIRST)}", lower_bound=1
)
_SWEEP_SEEDS = flags.DEFINE_integer(
    "sweep_seeds", 1, "Seeds of all other rows, at most --seeds", lower_bound=1
)
_RUNS = flags.DEFINE_string("runs", "runs/claims_napreg", "Folder of the runs; kept to resume")
_DATA = flags.DEFINE_string("data", selection.in_data(plan.SOURCE), f"The folder of {plan.SOURCE}")
_TAGGER = flags.DEFINE_string(
    "tagger",
    selection.in_data("nltk_data/taggers/averaged_perceptron_tagger.zip"),
    "The file or folder of the perceptron tagger that finds the nouns; '': NLTK's own",
)
_ONLY = flags.DEFINE_string(
    "only", "", f"Which runs: KEY=VALUE[|VALUE],.. by {', '.join(_KEYS)}; 'recipe=' is no recipe"
)
_SET = flags.DEFINE_multi_string("set", [], "config.A.B=VALUE for every run that has the field")
_VALIDATION = flags.DEFINE_bool(
    "validation",
    False,
    "Measure on 10 % of the training images and print a table; writes no results",
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "List the runs, done or not, and stop")
_RESULTS = flags.DEFINE_string("results", "", f"The results file, default {RESULTS.name}")


def main(arguments: list[str]) -> None:
    """Plans, runs what is missing and writes the results."""
    cli.no_arguments(arguments)
    if _SET.value and not (_VALIDATION.value or _RESULTS.value or _DRY_RUN.value):
        raise UserError("--set changes what is measured: use --validation, or name a --results")
    if not (Path(_DATA.value) / "train_ims.npy").is_file():
        raise UserError(f"--data={_DATA.value} has no train_ims.npy; give {plan.SOURCE}'s folder")
    if _TAGGER.value and not Path(_TAGGER.value).exists():
        raise UserError(f"--tagger={_TAGGER.value} does not exist; --tagger= is NLTK's own")
    runs = Path(_RUNS.value)
    tasks = plan.tasks(
        seeds=_SEEDS.value,
        sweep_seeds=_SWEEP_SEEDS.value,
        data=_DATA.value,
        cache_dir=runs / "nouns",
        tagger=_TAGGER.value,
        overrides=selection.overrides(_SET.value),
        validation=_VALIDATION.value,
    )
    stored = workdirs.read_json(_results_file()).get("records", {})
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
        print(claims_simcon_report.validation_table(chosen, records))


def write(tasks: Sequence[harness.Task], records: Mapping[str, dict[str, Any]]) -> None:
    """The results file with the page and the charts beside it, from all records of the plan."""
    if not any(records.values()):
        return
    path = _results_file()
    body = report.results(tasks, records, seeds=_SEEDS.value, sweep_seeds=_SWEEP_SEEDS.value)
    harness.write_results(path, body)
    report.write_pages(workdirs.read_json(path), path)


def _results_file() -> Path:
    return Path(_RESULTS.value or RESULTS)


if __name__ == "__main__":
    cli.run(main)

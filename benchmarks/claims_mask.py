"""MASK's claims: prototypes of words that match images with captions, without any pair.

python benchmarks/claims_mask.py --jobs=2 --seeds=3 --data=FOLDER

Writes benchmarks/results/claims_mask.{json,md,png} after every finished run; started again, it
measures what is missing: what neither --runs nor the results file has a record of, for this config,
and runs that were cut off go on from their last checkpoint. After a change of code that moves the
results, delete both. --data (default: the environment variable TRM_DATA) holds coco_regions/,
flickr8k_precomp/ and words/; --data= leaves glyph scenes, which need none. A run trains once and is
matched in all ways that its row stands for.

To re-rank score matrices [images, captions] of other models by MASK's scores, for every seed:
python benchmarks/claims_mask.py --seeds=3 --base=SCAN=scan.npy --base=CLIP=clip.npy

To choose settings, on the images of flickr8k_precomp's dev split, or on other scenes:
python benchmarks/claims_mask.py --validation --novariants --only=name=MASK,recipe= \
    --set=config.optimizer.learning_rate=1e-3
"""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from benchmarks import claims_mask_measure as measure  # noqa: E402
from benchmarks import claims_mask_plan as plan  # noqa: E402
from benchmarks import claims_mask_report as report  # noqa: E402
from benchmarks import claims_simcon_report, harness, selection  # noqa: E402
from launch import cli  # noqa: E402
from trm_jax.train import workdirs  # noqa: E402
from trm_jax.types import UserError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "claims_mask.json"
_KEYS = ("source", "name", "recipe", "seed", "lambda1", "lambda2", "depth")
_SHOWN = ("Rsum", "Rsum_best", "t2i_R@1", "i2t_R@1", "seconds")
_TAGGER_FILE = "nltk_data/taggers/averaged_perceptron_tagger.zip"


_JOBS = flags.DEFINE_integer("jobs", 1, "Worker processes, each with one thread", lower_bound=1)
_SEEDS = flags.DEFINE_integer(
    "seeds", 3, f"Seeds 0, 1, .. of {', '.join(plan.LOSSES)}", lower_bound=1
)
_SWEEP_SEEDS = flags.DEFINE_integer(
    "sweep_seeds", 1, "Seeds of weights and depths, at most --seeds", lower_bound=1
)
_RUNS = flags.DEFINE_string("runs", "runs/claims_mask", "Folder of the runs; kept to resume")
_DATA = flags.DEFINE_string(
    "data", os.environ.get("TRM_DATA", ""), "The folder of the data; '': sources that need none"
)
_TAGGER = flags.DEFINE_string(
    "tagger",
    selection.in_data(_TAGGER_FILE),
    "The file or folder of the perceptron tagger of nouns and adjectives; '': NLTK's own",
)
_BASE = flags.DEFINE_multi_string(
    "base", [], "[NAME=]FILE.npy: scores [images, captions] of another model, to be re-ranked"
)
_BASE_SOURCE = flags.DEFINE_string("base_source", "flickr8k", "What --base are scores of")
_TOP = flags.DEFINE_integer("top", 100, "Candidates that are re-ranked", lower_bound=1)
_ONLY = flags.DEFINE_string(
    "only", "", f"Which runs: KEY=VALUE[|VALUE],.. by {', '.join(_KEYS)}; 'recipe=' is no recipe"
)
_SET = flags.DEFINE_multi_string("set", [], "config.A.B=VALUE for every run that has the field")
_VALIDATION = flags.DEFINE_bool(
    "validation", False, "Measure on the validation images and print a table; writes no results"
)
_VARIANTS = flags.DEFINE_bool(
    "variants", True, "Match each run in all ways; --novariants is quicker where settings are tried"
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "List the runs, done or not, and stop")
_RESULTS = flags.DEFINE_string("results", "", f"The results file, default {RESULTS.name}")


def main(arguments: list[str]) -> None:
    """Plans, runs what is missing, re-ranks and writes the results."""
    cli.no_arguments(arguments)
    if (_SET.value or not _VARIANTS.value) and not (
        _VALIDATION.value or _RESULTS.value or _DRY_RUN.value
    ):
        raise UserError(
            "--set and --novariants change what is measured: use --validation, or name a --results"
        )
    if _BASE.value and _VALIDATION.value:
        raise UserError("--base are scores of the test images: leave out --validation")
    if _TAGGER.value and not Path(_TAGGER.value).exists():
        raise UserError(f"--tagger={_TAGGER.value} does not exist; --tagger= is NLTK's own")
    runs, bases = Path(_RUNS.value), read_bases(_BASE.value)
    tasks = plan.tasks(
        sources=_sources(_DATA.value),
        seeds=_SEEDS.value,
        sweep_seeds=_SWEEP_SEEDS.value,
        data=Path(_DATA.value),
        cache_dir=runs / "vectors",
        tagger=_TAGGER.value,
        overrides=selection.overrides(_SET.value),
        validation=_VALIDATION.value,
        variants=_VARIANTS.value,
    )
    before = workdirs.read_json(_results_file())
    stored = before.get("records", {})
    records = {t.folder: harness.record_of(t, runs) or stored.get(t.folder, {}) for t in tasks}
    chosen = selection.choose(tasks, _ONLY.value, _KEYS)
    if _DRY_RUN.value:
        for task in chosen:
            print("done" if records[task.folder] else "todo", task.folder)
        return
    todo = [task for task in chosen if not records[task.folder]]
    reranked = {
        key: found for key, found in before.get("reranked", {}).items() if found["run"] in records
    }
    kept = not _VALIDATION.value

    def write_results() -> None:
        if kept:
            write(tasks, records, reranked)

    harness.run_plan(todo, records, runs, jobs=_JOBS.value, shown=_SHOWN, write=write_results)
    if not kept:
        print(claims_simcon_report.validation_table(*plan.expanded(chosen, records)))
    elif bases:
        rerank(bases, tasks, records, runs, reranked)
        write_results()


def read_bases(words: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> scores, of words [NAME=]FILE.npy. Raises UserError for a file that is none."""
    found = {}
    for word in words:
        name, equals, file = word.rpartition("=")
        path = Path(file)
        try:
            scores = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"--base={word}: {path} cannot be read as an array: {error}") from None
        if not isinstance(scores, np.ndarray):
            raise UserError(f"--base={word}: {path} holds several arrays; save one as .npy")
        found[name if equals else path.stem] = scores
    return found


def rerank(
    bases: Mapping[str, np.ndarray],
    tasks: Sequence[harness.Task],
    records: Mapping[str, Mapping[str, Any]],
    runs: Path,
    reranked: dict[str, dict[str, Any]],
) -> None:
    """Fills `reranked` with {"name", "source", "seed", "run", "top", "values": {alpha: recalls}}.

    What is there already is not computed again: a key is of the scores, the run and --top.

    Raises:
      UserError: a base does not fit MASK's scores, or a run's scores are gone.
    """
    for task in tasks:
        source, name = task.conditions[0]["source"], task.config.matching.scores
        if not name or not records[task.folder] or source != _BASE_SOURCE.value:
            continue
        for base, scores in bases.items():
            digest = hashlib.sha256(np.ascontiguousarray(scores).tobytes()).hexdigest()[:8]
            key = f"{base}-{digest}-top{_TOP.value}-{task.folder}"
            if key in reranked:
                continue
            file = runs / task.folder / name
            if not file.is_file():
                raise UserError(
                    f"--base={base}: {file} is gone, which re-ranks it; measure this run again "
                    "with another --runs and another --results"
                )
            values = measure.reranked(scores, file, plan.ALPHAS, top=_TOP.value, name=base)
            print(f"{base} re-ranked, seed {task.seed}: Rsum " + _sums(values), flush=True)
            about = {"name": base, "source": source, "seed": task.seed, "run": task.folder}
            reranked[key] = {**about, "top": _TOP.value, "values": values}


def _sums(values: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{found['Rsum']:.1f} at alpha {alpha}" for alpha, found in values.items())


def write(
    tasks: Sequence[harness.Task],
    records: Mapping[str, dict[str, Any]],
    reranked: Mapping[str, dict[str, Any]],
) -> None:
    """The results file with the page and the chart beside it, from all records of the plan."""
    if not any(records.values()):
        return
    path, seeds = _results_file(), {"seeds": _SEEDS.value, "sweep_seeds": _SWEEP_SEEDS.value}
    harness.write_results(path, report.results(tasks, records, reranked, **seeds))
    report.write_pages(workdirs.read_json(path), path)


def _sources(data: str) -> dict[str, plan.Source]:
    """The sources whose files are there; all that need any if --data is given."""
    sources = {name: source for name, source in plan.SOURCES.items() if data or not source.files}
    if not sources:
        raise UserError("--data is empty; give the folder of coco_regions and flickr8k_precomp")
    for source in sources.values():
        for file in source.files:
            if not (Path(data) / file).exists():
                raise UserError(f"--data={data} has no {file}; give the folder that has")
    return sources


def _results_file() -> Path:
    return Path(_RESULTS.value or RESULTS)


if __name__ == "__main__":
    cli.run(main)

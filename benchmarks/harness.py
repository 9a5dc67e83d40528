"""What benchmarks of trained models share: runs in worker processes, resume, results files.

A task is one measurement of one row with one seed. Its record is a small JSON file below the runs
folder whose name carries a fingerprint of the config, so that a benchmark that is started again
measures only what is missing or what a changed config has made stale.
"""

import contextlib
import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import queue
import re
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from trm_jax.pretrained import registry
from trm_jax.train import workdirs
from trm_jax.train.preemption import Preempted

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
# One thread per worker: the workers are the parallelism, and sums do not depend on their number.
_ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
_TASKS_PER_WORKER = 8
# Fields that change where or how a run is watched, not what it computes. The weights count by
# their content.
_NOT_IN_FINGERPRINT = (
    "data.root",
    "data.options.annotations",
    "data.options.keep",
    "data.cache_dir",
    "data.workers",
    "model.architecture",
    "model.pretrained",
    "prompts.remat",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep",
    "evaluate.pictures",
    "model.options.block",
)
# Fields younger than the first records, which were measured with what is the default now. A
# section that is empty, such as data.test_options, never counts.
_LATER_FIELDS = {
    "data.batch_size_schedule": [],
    "model.knowledge": {},
    "words": {},
    "rows": {},
    "data.test_dataset": "",
    "data.test_root": "",
    "data.caption_shuffle": 0.0,
    "data.test_augment": "none",
    "data.length_buckets": [],
    "optimizer.end_rate": 0.0,
    "optimizer.drop_epochs": [],
    "optimizer.factors": [],
    "evaluate.folds": 1,
}


class Task(NamedTuple):
    """One measurement.

    name:       the row's name.
    conditions: of the results file; more than one where the same value stands in several places
                (zero-shot recognition does not change with the known labels).
    seed:       of training and label mask; None where nothing is drawn.
    config:     of the run, resolved.
    measure:    module-level function (config, folder) -> values; runs in a worker.
    sections:   the parts of the config that the measurement reads.
    """

    name: str
    conditions: tuple[Mapping[str, Any], ...]
    seed: int | None
    config: ConfigDict
    measure: Callable[[ConfigDict, Path], dict[str, float]]
    sections: tuple[str, ...] = ("",)

    @property
    def folder(self) -> str:
        """Where the run lies below the runs folder; unique for the row, seed and config."""
        condition = dict(self.conditions[0])
        if len(self.conditions) > 1:
            condition.pop("known", None)
        words = [str(condition.pop("source", ""))]
        words += [f"{key}{value}" for key, value in condition.items()]
        words += [self.name, "" if self.seed is None else f"seed{self.seed}"]
        label = "-".join(re.sub(r"[^\w.+]+", "_", word).strip("_") for word in words if word)
        return f"{label}-{self.fingerprint()}"

    def fingerprint(self) -> str:
        """8 hex digits that change with what the measurement reads of the config."""
        flat = _flat(json.loads(json.dumps(self.config.to_dict(), default=list)))
        read = {
            key: value
            for key, value in flat.items()
            if key.startswith(self.sections)
            and key not in _NOT_IN_FINGERPRINT
            and not (key in _LATER_FIELDS and value == _LATER_FIELDS[key])
        }
        read["weights"] = _weights_hash(self.config.model.pretrained)
        read["measure"] = self.measure.__name__
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:8]


def record_of(task: Task, runs: Path) -> dict[str, Any]:
    """The record of a finished task, {} if it is to be run."""
    return workdirs.read_json(runs / task.folder / "record.json")


def run_tasks(
    tasks: Sequence[Task], runs: Path, *, jobs: int, finished: Callable[[Task, dict], None]
) -> list[tuple[Task, BaseException]]:
    """Runs the tasks in `jobs` processes in the given order; returns those that failed.

    Args:
      tasks: without those that have a record.
      runs: gets a folder for each task.
      jobs: worker processes, each with one thread.
      finished: called in this process after every task, with its record.

    Raises:
      Preempted: a signal asked to stop; started runs have written a checkpoint and will resume.
    """
    for name, value in _ONE_THREAD.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((runs / "jax_cache").resolve()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    outcomes: queue.SimpleQueue[tuple[Task, Any]] = queue.SimpleQueue()
    stop = threading.Event()
    feeders = [
        threading.Thread(target=_feed, args=(waiting, outcomes, runs, stop)) for _ in range(jobs)
    ]
    failed: list[tuple[Task, BaseException]] = []
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for feeder in feeders:
            feeder.start()
        for _ in tasks:
            task, outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                failed.append((task, outcome))
                print(f"FAILED {task.folder}: {type(outcome).__name__}: {outcome}", flush=True)
            else:
                finished(task, outcome)
    except BaseException as error:
        stop.set()
        for child in multiprocessing.active_children():
            child.terminate()  # a run that trains answers with a checkpoint
        if isinstance(error, KeyboardInterrupt):
            raise Preempted("stopped; start the same command again to go on") from None
        raise
    finally:
        for feeder in feeders:
            feeder.join()
        signal.signal(signal.SIGTERM, previous)
    return failed


def run_plan(
    todo: Sequence[Task],
    records: dict[str, dict[str, Any]],
    runs: Path,
    *,
    jobs: int,
    shown: Sequence[str],
    write: Callable[[], None],
) -> None:
    """Measures `todo`, with a line each; `records` and the results follow every finished run.

    Args:
      todo, runs, jobs: as `run_tasks`.
      records: task.folder -> record; filled.
      shown: the values that a line tells.
      write: called after every run, and at the end.

    Raises:
      RuntimeError: a run failed; the others were measured.
    """
    print(f"{len(todo)} runs to do", flush=True)
    started, done = time.time(), 0

    def finished(task: Task, record: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        records[task.folder] = record
        left = (time.time() - started) / done * (len(todo) - done)
        values = record["values"]
        told = "  ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
        print(f"[{done}/{len(todo)}, {left / 60:.0f} min left] {task.folder}: {told}", flush=True)
        write()

    failed = run_tasks(todo, runs, jobs=jobs, finished=finished)
    write()
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} runs failed, see {runs}/*/log.txt")


def _feed(waiting: queue.SimpleQueue, outcomes: queue.SimpleQueue, runs: Path, stop) -> None:
    """One worker process at a time, renewed now and then, since compiled programs pile up.

    Not ProcessPoolExecutor(max_tasks_per_child=): in Python 3.11 it can hang when a worker has
    done its share. Spawned, since a forked JAX hangs.
    """
    context = multiprocessing.get_context("spawn")
    while not stop.is_set() and not waiting.empty():
        with ProcessPoolExecutor(1, mp_context=context) as worker:
            for _ in range(_TASKS_PER_WORKER):
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    outcomes.put((task, worker.submit(_work, task, runs).result()))
                except Exception as error:  # noqa: BLE001 (whatever a run died of, others go on)
                    outcomes.put((task, error))
                    break
                if stop.is_set():
                    return


def _work(task: Task, runs: Path) -> dict[str, Any]:
    """Measures one task in a worker and writes its record."""
    import jax

    folder = runs / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        values = task.measure(task.config, folder)
    values.setdefault("seconds", time.time() - started)
    record = {
        "name": task.name,
        "seed": task.seed,
        "values": values,
        "device": device_name(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
    }
    workdirs.write_json(folder / "record.json", record)
    # The numbers are what a benchmark keeps; a hundred checkpoints would fill a disk.
    for name in ("checkpoints", "frozen", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return record


def device_name(kind: str) -> str:
    """JAX's device kind; for "cpu" with the processor's model where Linux tells it."""
    if kind != "cpu":
        return kind
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"cpu ({line.partition(':')[2].strip()})"
    return f"cpu ({platform.machine()})"


def summarize(
    tasks: Iterable[Task],
    records: Mapping[str, Mapping[str, Any]],
    *,
    units: Mapping[str, str],
    paper: Callable[[str, Mapping[str, Any], str], float | None],
) -> list[dict[str, Any]]:
    """Rows of a results file: mean and sample standard deviation over the seeds that finished.

    Args:
      tasks: the plan; rows come in its order.
      records: task.folder -> record, of the finished ones.
      units: metric -> unit; metrics that are not in it are left out.
      paper: (name, condition, metric) -> the paper's figure or None.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for task in tasks:
        record = records.get(task.folder)
        if not record:
            continue
        for condition in task.conditions:
            place = (task.name, json.dumps(dict(condition)))
            row = rows.setdefault(place, {"condition": dict(condition), "values": {}})
            for metric, value in record["values"].items():
                row["values"].setdefault(metric, {})[task.seed] = value
    return [
        make_row(
            name,
            row["condition"],
            metric,
            values,
            units[metric],
            paper(name, row["condition"], metric),
        )
        for (name, _), row in rows.items()
        for metric, values in row["values"].items()
        if metric in units
    ]


def make_row(
    name: str,
    condition: Mapping[str, Any],
    metric: str,
    values: Mapping[int | None, float],
    unit: str,
    paper: float | None,
) -> dict[str, Any]:
    """One row; `values` by seed. The standard deviation is the sample's, None for one value."""
    numbers = list(values.values())
    return {
        "name": name,
        "condition": dict(condition),
        "metric": metric,
        "mean": round(statistics.fmean(numbers), 4),
        "std": round(statistics.stdev(numbers), 4) if len(numbers) > 1 else None,
        "seeds": len(numbers),
        "unit": unit,
        "paper": paper,
        "values": {str(seed): round(value, 4) for seed, value in values.items()},
    }


def write_results(path: Path, body: Mapping[str, Any]) -> None:
    """A results file, replaced atomically, with date and versions of now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in _PACKAGES}
    head = {
        "name": body["name"],
        "command": body["command"],
        "date": datetime.date.today().isoformat(),
    }
    workdirs.write_json(path, {**head, "versions": versions, **body})


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> set[str]:
    """Sets dotted fields that the config has; returns the names of those it had."""
    found = set()
    for name, value in overrides.items():
        *parents, last = name.split(".")
        node: Any = config
        for parent in parents:
            node = node.get(parent) if isinstance(node, ConfigDict) else None
        if isinstance(node, ConfigDict) and last in node:
            with node.ignore_type() if node[last] is None else contextlib.nullcontext():
                node[last] = value
            found.add(name)
    return found


_HASHES: dict[str, str] = {}


def _weights_hash(pretrained: str) -> str:
    """ "random", or the SHA-256 of the file; registry's UserError where there is none."""
    if pretrained == "random":
        return pretrained
    if pretrained not in _HASHES:
        content = registry.resolve(pretrained).read_bytes()
        _HASHES[pretrained] = hashlib.sha256(content).hexdigest()
    return _HASHES[pretrained]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat

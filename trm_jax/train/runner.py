"""A config on a workdir: what launch/train.py and launch/evaluate.py do, callable in a notebook."""

import json
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from trm_jax.data import partial_labels, tokenizers
from trm_jax.evaluate import pair_scores
from trm_jax.pretrained import registry
from trm_jax.train import distributed, experiment, metrics, pictures, sharding, workdirs
from trm_jax.train.experiment import Experiment
from trm_jax.train.loop import Run
from trm_jax.types import UserError

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml_collections")


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains or resumes; returns the final line of metrics.jsonl.

    Raises:
      UserError: the config or the data cannot be used, or the workdir is another config's.
      Preempted: a signal asked to stop; the checkpoint is written.
      FloatingPointError: no step of a log interval was finite.
    """
    folder = Path(workdir)
    done = workdirs.final_line(folder, config)
    _agree_on_config(config, done)
    if done:
        if distributed.is_first():
            print(f"{workdir} is finished at step {done['step']}; nothing to do")
        return done
    started = time.time()
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    built = experiment.build(config, cache_dir=_cache_dir(config, folder))
    distributed.agree("data", _data_report(built))
    distributed.check_shared(folder)
    run = Run(built.job, folder, mesh)
    state = run.prepare()
    step = int(state.step)
    report = _report(built, run, mesh, folder)
    if run.resumed_from is not None:
        _check_resumed(folder, report)
        workdirs.check_vocabulary(folder, built)
    # Claimed only now, so that a mistake found above leaves the workdir as it was.
    if distributed.is_first():
        workdirs.claim(folder, config, built)
    _announce(report, step, built.job.total_steps)
    writer = metrics.MetricsWriter(
        folder, step=step, total_steps=built.job.total_steps, active=distributed.is_first()
    )
    _write_report(folder, report, run, started)
    try:
        run.train(state, writer)
    finally:
        writer.close()
        _write_report(folder, report, run, started)
    pictures.write(folder, built.test, config.evaluate.pictures)
    distributed.barrier()  # until the last line is written
    lines = metrics.read_lines(folder / "metrics.jsonl")
    return lines[-1] if lines else {}  # a network disk may show the file late


def evaluate(config: ConfigDict, workdir: str, ensemble: Sequence[str] = ()) -> dict[str, float]:
    """The newest checkpoint's metrics by the config's evaluators; also written to eval.json.

    With the workdirs of an `ensemble` they are the recalls of the mean of all runs' pair scores,
    each by its own config, written to ensemble.json.
    """
    folder = Path(workdir)
    _agree_on_config(config, {})
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    built, params, extras, step = _restored(config, folder, mesh)
    name, runs = "eval.json", {}
    if ensemble:
        name, runs = "ensemble.json", {"runs": [workdir, *ensemble]}
        parts = [_pair_scores(config, built, params, extras, mesh)]
        for other in ensemble:
            theirs = workdirs.read_config(Path(other))
            parts.append(_pair_scores(theirs, *_restored(theirs, Path(other), mesh)[:3], mesh))
        values = pair_scores.metrics(pair_scores.ensemble(parts), folds=config.evaluate.folds)
    else:
        with jax.set_mesh(mesh):
            values = built.job.evaluate(params, extras)
    line = {"step": step, "split": built.eval_split, **values, **runs, "final": True}
    if distributed.is_first():
        (folder / name).write_text(json.dumps(line, indent=1) + "\n")
    return values


def _restored(config: ConfigDict, folder: Path, mesh) -> tuple[Experiment, Any, Any, int]:
    built = experiment.build(config, cache_dir=_cache_dir(config, folder))
    return built, *restore(built, folder, mesh)


def _pair_scores(config, built: Experiment, params, extras, mesh) -> pair_scores.Scores:
    with jax.set_mesh(mesh):
        return experiment.pair_scorer(config, built)(params, extras)


def restore(built: Experiment, folder: Path, mesh) -> tuple[Any, Any, int]:
    """(params, extras, step) of the newest checkpoint, for evaluation and prediction."""
    workdirs.check_vocabulary(folder, built)
    run = Run(built.job, folder, mesh, read_only=True)
    state = run.prepare()
    return run.weights(state), state.extras, int(state.step)


def _agree_on_config(config: ConfigDict, done: dict[str, Any]) -> None:
    """Raises UserError on a process with other flags, or that finds the run in another state."""
    leaves = jax.tree_util.tree_leaves_with_path(config.to_dict())
    fields = {jax.tree_util.keystr(path, simple=True, separator="."): v for path, v in leaves}
    distributed.agree("a config", fields)
    distributed.agree("a workdir", {"finished": bool(done)})


def _cache_dir(config: ConfigDict, folder: Path) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else folder / "features"


def _report(built: Experiment, run: Run, mesh, folder: Path) -> dict[str, Any]:
    before = workdirs.read_json(folder / "run.json")
    resumed = before.get("resumed_from", [])
    if run.resumed_from is not None:
        resumed = [*resumed, run.resumed_from]
    return {
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "devices": [str(d) for d in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "mesh": dict(mesh.shape),
        "parameters": run.counts,
        "frozen_sha256": run.frozen_hash,
        "pretrained": registry.provenance(built.pretrained),
        "initial": registry.provenance(built.initial),
        **_data_report(built),
        "names_with_unknown_words": tokenizers.names_with_unknown_words(
            built.tokenizer, built.info.class_names
        ),
        "resumed_from": resumed,
        "seconds_before": before.get("wall_seconds", 0.0),
        "skipped_before": before.get("skipped_samples", []),
    }


def _data_report(built: Experiment) -> dict[str, Any]:
    observed = built.observed
    return {
        "dataset": {
            "train": len(built.train),
            built.eval_split: len(built.test),
            "classes": len(built.info.class_names),
            "labels_positive": int((observed == 1).sum()) if observed is not None else None,
            "labels_negative": int((observed == -1).sum()) if observed is not None else None,
            "labels_unknown": int((observed == 0).sum()) if observed is not None else None,
            **built.counts,
        },
        "mixture": getattr(built.train, "counts", None),
        "label_mask_sha256": partial_labels.mask_sha256(observed) if observed is not None else None,
    }


def _check_resumed(folder: Path, report: dict[str, Any]) -> None:
    """Raises UserError if weights or data are not those that the run began with."""
    before = workdirs.read_json(folder / "run.json")
    fields = {"label_mask_sha256": "data.root", "dataset": "data.root"}
    if report["pretrained"]:  # random towers are drawn anew; the run's own are on its disk
        fields["frozen_sha256"] = "model.pretrained"
    for field, source in fields.items():
        old, new = before.get(field), report[field]
        if old and new and old != new:
            raise UserError(
                f"{folder} was started with another {field} than what {source} gives now; restore "
                "what it was started with or choose another --workdir"
            )


def _announce(report: dict[str, Any], step: int, total: int) -> None:
    if not distributed.is_first():
        return
    counts, data = report["parameters"], report["dataset"]
    print(
        f"parameters: {counts['trained']:,} trained, {counts['frozen']:,} frozen; "
        f"{len(report['devices'])} x {report['device_kind']}"
    )
    print("data: " + ", ".join(f"{k} {v:,}" for k, v in data.items() if v is not None))
    if report["label_mask_sha256"]:
        print(f"label mask SHA-256: {report['label_mask_sha256']}")
    if report["names_with_unknown_words"]:
        print(
            "the text tower does not know every word of these classes, so it may confuse them: "
            + ", ".join(report["names_with_unknown_words"])
        )
    if step:
        print(f"resuming from step {step} of {total}")


def _write_report(folder: Path, report: dict[str, Any], run: Run, started: float) -> None:
    if not distributed.is_first():
        return
    wall = report["seconds_before"] + time.time() - started
    bad = sorted({*report["skipped_before"], *run.bad.names()})
    body = {k: v for k, v in report.items() if not k.endswith("_before")}
    body |= {"skipped_samples": bad, "wall_seconds": round(wall, 2)}
    workdirs.write_json(folder / "run.json", body)

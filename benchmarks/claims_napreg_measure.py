"""What a worker measures of NAPReg: a training run that is evaluated after every epoch."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import claims_simcon_measure
from trm_jax.data import pipeline
from trm_jax.train import datasets, metrics, runner, workdirs

WAYS = ("t2i", "i2t")
RECALLS = tuple(f"{way}_R@{k}" for way in WAYS for k in (1, 5, 10))
QUALITY = (*RECALLS, *(f"{way}_Rsum" for way in WAYS), "Rsum", "Rsum_best")
# Pairs with a loss, the scores of a pair and of its hardest negative, the noun term, captions with
# a kept noun, and steps whose gradient was clipped.
WATCHED = ("active", "score_matched", "score_hardest", "loss_nouns", "named", "clipped")


def training(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Trains by the config and evaluates after every epoch.

    Returns:
      QUALITY after the last step, "Rsum_best" of the best evaluation, in per cent; WATCHED, means
      over the last epoch; "proxies", the nouns that have one; "steps", "seconds", and "curve":
      {"step": [..], "epoch": [..], metric: [.. after them]}.
    """
    config = config.copy_and_resolve_references()
    train, _, _ = datasets.open_data(config.data)
    captions = sum(len(train.captions(index)) for index in range(len(train)))
    per_epoch = pipeline.steps_per_epoch(captions, config.data.batch_size)
    total = config.train.steps or config.train.epochs * per_epoch
    every = min(per_epoch, total)
    config.train.update({"log_every": every, "eval_every": every, "checkpoint_every": every})
    config.evaluate.pictures = 0
    final = runner.train(config, str(folder))
    lines = metrics.read_lines(folder / "metrics.jsonl")
    curve = claims_simcon_measure.read_curve(lines)
    curve["epoch"] = [round(step / per_epoch, 3) for step in curve["step"]]
    last = [line for line in lines if line["split"] == "train"][-1]
    values: dict[str, Any] = {name: final[name] for name in (*RECALLS, "Rsum", "Rsum_best")}
    for way in WAYS:
        values[f"{way}_Rsum"] = sum(final[name] for name in RECALLS if name.startswith(way))
    values |= {name: last[name] for name in WATCHED if last.get(name) is not None}
    nouns = workdirs.read_json(folder / "vocabulary.json")["nouns"]
    if nouns:
        values["proxies"] = len(nouns["nouns"])
    seconds = workdirs.read_json(folder / "run.json")["wall_seconds"]
    return values | {"steps": total, "seconds": seconds, "curve": curve}

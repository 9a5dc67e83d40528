"""What a worker measures of SimCon: a training run with its curve; and a run's mined positives."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from trm_jax.data import pipeline
from trm_jax.data.sources.base import Source
from trm_jax.train import datasets, metrics, predictor, runner, workdirs
from trm_jax.types import BadSampleError, UserError
from trm_jax.visualize import positives

POINTS = 6  # evaluations of a run
QUALITY = ("mIoU", "Rsum", *(f"{way}_R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)))
# |P^I|, |P^T|, the own pair's weight, 1/tau and the share of clipped steps.
WATCHED = ("positives_image", "positives_text", "own_weight", "logit_scale", "clipped")
_BATCH = 64


def training_curve(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Trains by the config and evaluates `POINTS` times.

    Returns:
      The QUALITY metrics of the config's evaluators after the last step and, as NAME_best, at the
      best evaluation; the WATCHED ones, means over the last interval between evaluations;
      "steps", "seconds", and "curve": {"step": [..], metric: [.. at these steps]}.
    """
    config = config.copy_and_resolve_references()
    source, _, _ = datasets.open_data(config.data)
    per_epoch = pipeline.steps_per_epoch(len(source), config.data.batch_size)
    total = config.train.steps or config.train.epochs * per_epoch
    every = -(-total // POINTS)
    config.train.update({"log_every": every, "eval_every": every, "checkpoint_every": 0})
    config.evaluate.pictures = 0
    final = runner.train(config, str(folder))
    curve = read_curve(metrics.read_lines(folder / "metrics.jsonl"))
    values: dict[str, Any] = {name: final[name] for name in QUALITY if name in final}
    values |= {f"{name}_best": max(curve[name]) for name in QUALITY if name in curve}
    values |= {name: curve[name][-1] for name in WATCHED if name in curve}
    seconds = workdirs.read_json(folder / "run.json")["wall_seconds"]
    return values | {"steps": total, "seconds": seconds, "curve": curve}


def read_curve(lines: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """QUALITY and WATCHED metrics at the steps of the evaluations, of the lines of metrics.jsonl.

    A metric that a step's lines lack is left out of the curve.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        if not line.get("final"):
            by_step.setdefault(line["step"], {}).update(line)
    points = [{**values, "step": step} for step, values in sorted(by_step.items())]
    points = [point for point in points if any(name in point for name in QUALITY)]
    names = [name for name in (*QUALITY, *WATCHED) if all(name in point for point in points)]
    curve = {name: [float(f"{point[name]:.6g}") for point in points] for name in names}
    return {"step": [point["step"] for point in points], **curve}


def positives_picture(workdir: Path, *, images: int = 512, anchors: int = 4) -> Path:
    """Writes WORKDIR/pictures/positives.png: what the run's last threshold takes for positives.

    Args:
      workdir: a run of launch/train.py with `method` "simcon" on images.
      images: training images among which positives are looked for, each with one caption.
      anchors: rows of the picture.

    Raises:
      UserError: the run's data has no images, or no pair of it is similar enough.
    """
    model = predictor.load(workdir)
    if model.config.method != "simcon" or "image" not in model.inputs:
        raise UserError(f"--positives={workdir} is no run of the method simcon on images")
    source, _, _ = datasets.open_data(model.config.data)
    pairs = list(itertools.islice(_pairs(source), images))
    threshold = model.config.loss.thresholds[-1]
    pictures, captions = [image for image, _ in pairs], [caption for _, caption in pairs]
    tokens = model.tokenizer(captions, model.config.data.text_length)
    tokens = np.pad(tokens, ((0, -len(tokens) % _BATCH), (0, 0)))
    parts = {
        "image": model.run("embed_image", model.images(pictures, _BATCH)),
        "text": model.run(
            "embed_text", ({"tokens": rows} for rows in np.split(tokens, len(tokens) // _BATCH))
        ),
    }
    rows = {
        name: np.concatenate([part["embedding"] for part in found])[: len(pairs)]
        for name, found in parts.items()
    }
    chosen = positives.choose_anchors(rows["image"], rows["text"], threshold, anchors)
    if not chosen:
        raise UserError(
            f"no two of {len(pairs)} training images or captions have a cosine of {threshold} "
            f"after {model.step} steps; train longer"
        )
    mined = [
        positives.Anchor(
            index,
            positives.mine(rows["image"], index, threshold),
            positives.mine(rows["text"], index, threshold),
        )
        for index in chosen
    ]
    return positives.render_positives(
        mined,
        pictures,
        captions,
        path=workdir / "pictures" / "positives.png",
        note=f"among {len(pairs)} training images, cosine ≥ {threshold:g}, step {model.step:,}",
    )


def _pairs(source: Source) -> Iterator[tuple[np.ndarray, str]]:
    """Image and first caption of every readable example that has both."""
    for index in range(len(source)):
        try:
            captions, sample = source.captions(index), source.read(index)
        except BadSampleError:
            continue
        if captions:
            yield sample["image"], captions[0]

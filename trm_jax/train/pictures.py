"""Heat maps of a few evaluation images, left in WORKDIR/pictures when a run ends."""

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trm_jax.data.feature_cache import CachedFeatures
from trm_jax.data.sources.base import Source
from trm_jax.train import predictor
from trm_jax.types import BadSampleError
from trm_jax.visualize.regions import render_heatmaps


def write(folder: Path, source: Source, count: int) -> list[Path]:
    """Writes pictures of the first `count` readable images of `source`; returns their paths.

    None for a method without regions and for a source without images (precomputed features).

    Args:
      folder: a workdir with a checkpoint.
      source: evaluation images; a feature cache gives those it was made from.
      count: how many, 0 for none.
    """
    if isinstance(source, CachedFeatures):
        source = source.source
    chosen = list(itertools.islice(_images(source), count))
    if not chosen:
        return []
    model = predictor.load(folder)
    if "regions" not in model.method.predict:
        return []
    images = [image for _, image in chosen]
    outputs = model.run("regions", model.images(images, size=len(images)))
    written = []
    for (index, image), (scores, maps) in zip(chosen, _rows(outputs), strict=False):
        name = re.sub(r"[^\w.-]+", "_", str(source.ids[index]))
        by_name = functools.partial(zip, model.class_names, strict=True)
        path = folder / "pictures" / f"{name}.png"
        render_heatmaps(
            image,
            dict(by_name(maps)),
            dict(by_name(scores)),
            path=path,
            truth=dict(by_name(source.labels[index].tolist())),
            scaling="map",
        )
        written.append(path)
    return written


def _images(source: Source) -> Iterator[tuple[int, np.ndarray]]:
    for index in range(len(source)):
        try:
            sample = source.read(index)
        except BadSampleError:
            continue
        if "image" not in sample:
            return
        yield index, sample["image"]


def _rows(outputs) -> Iterator[tuple[list[float], list[np.ndarray]]]:
    for part in outputs:
        for scores, maps in zip(part["scores"], part["maps"], strict=True):
            yield scores.tolist(), list(maps)

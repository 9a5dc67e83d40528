"""Heat maps of a few evaluation images, left in WORKDIR/pictures when a run ends."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trm_jax.data.feature_cache import CachedFeatures
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.subset import Subset
from trm_jax.train import distributed, predictor
from trm_jax.types import BadSampleError
from trm_jax.visualize.regions import render_heatmaps


def write(folder: Path, source: Source, count: int) -> list[Path]:
    """Writes pictures of the first `count` readable images of `source`; returns their paths.

    All processes of a run must call it. None for a source without images (precomputed features).

    Args:
      folder: a workdir with a checkpoint of a method that predicts "regions".
      source: evaluation images; a feature cache gives those it was made from.
      count: how many, 0 for none.
    """
    if isinstance(source, CachedFeatures):
        source = source.source
    elif isinstance(source, Subset) and isinstance(source.source, CachedFeatures):
        source = Subset(source.source.source, source.indices)
    chosen = list(itertools.islice(_images(source), count))
    if not chosen:
        return []
    model = predictor.load(folder)
    batches = model.images([image for _, image in chosen], size=len(chosen))
    written = []
    found = model.regions(batches, len(chosen))
    for (index, image), (scores, maps) in zip(chosen, found, strict=True):
        if not distributed.is_first():
            continue  # all processes compute, one draws
        name = re.sub(r"[^\w.-]+", "_", str(source.ids[index]))
        truth = dict(zip(model.class_names, source.labels[index].tolist(), strict=True))
        path = folder / "pictures" / f"{name}.png"
        written.append(render_heatmaps(image, maps, scores, path=path, truth=truth, scaling="map"))
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

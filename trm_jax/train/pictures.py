"""Pictures of a few evaluation images, left in WORKDIR/pictures when a run ends."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from trm_jax.data.feature_cache import CachedFeatures
from trm_jax.data.sources.base import MaskedSource, Source
from trm_jax.data.sources.subset import Subset, has_masks
from trm_jax.train import distributed, predictor
from trm_jax.types import BadSampleError
from trm_jax.visualize.regions import render_heatmaps
from trm_jax.visualize.segmentation import render_segmentation


def write(folder: Path, source: Source, count: int) -> list[Path]:
    """Writes pictures of the first `count` readable images of `source`; returns their paths.

    Heat maps of a method that predicts "regions"; label maps of one that predicts "segments", if
    `source` has masks. None for other methods and for a source without images. All processes of a
    run must call it.

    Args:
      folder: a workdir with a checkpoint.
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
    if "regions" in model.method.predict:
        drawn = _heat_maps(model, source, chosen)
    elif "segments" in model.method.predict and has_masks(source):
        drawn = _label_maps(model, source, chosen)
    else:
        return []
    written = []
    for (index, _), draw in zip(chosen, drawn, strict=True):
        if distributed.is_first():  # all processes compute, one draws
            name = re.sub(r"[^\w.-]+", "_", str(source.ids[index]))
            written.append(draw(path=folder / "pictures" / f"{name}.png"))
    return written


def _heat_maps(model: predictor.Predictor, source: Source, chosen) -> Iterator[Callable]:
    batches = model.images([image for _, image in chosen], size=len(chosen))
    found = model.regions(batches, len(chosen))
    for (index, image), (scores, maps) in zip(chosen, found, strict=True):
        truth = dict(zip(model.class_names, source.labels[index].tolist(), strict=True))
        yield functools.partial(render_heatmaps, image, maps, scores, truth=truth, scaling="map")


def _label_maps(model: predictor.Predictor, source: MaskedSource, chosen) -> Iterator[Callable]:
    names = source.class_names
    for (index, image), labels in zip(
        chosen, model.segment((image for _, image in chosen), names), strict=True
    ):
        try:
            truth = source.semantic_mask(index)
            if not model.protocol.has_background:
                truth = np.where(truth == -1, -2, truth)  # not counted, as in the metrics
        except BadSampleError:
            truth = None
        yield functools.partial(render_segmentation, image, labels, names, truth=truth)


def _images(source: Source) -> Iterator[tuple[int, np.ndarray]]:
    for index in range(len(source)):
        try:
            sample = source.read(index)
        except BadSampleError:
            continue
        if "image" not in sample:
            return
        yield index, sample["image"]

"""The table of datasets: a name of `data.dataset` to the source that reads it."""

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trm_jax.data.sources.base import Source
from trm_jax.data.sources.captions import open_flickr8k
from trm_jax.data.sources.coco_object import open_coco_object
from trm_jax.data.sources.features import CaptionedFeatures, open_coco_features
from trm_jax.data.sources.image_folder import ImageFolder
from trm_jax.data.sources.karpathy import open_karpathy
from trm_jax.data.sources.manifest import open_manifest
from trm_jax.data.sources.mixture import Mixture, open_mixture
from trm_jax.data.sources.pairs import PairRecords
from trm_jax.data.sources.prepared import open_coco, open_voc
from trm_jax.data.sources.segmentation import (
    open_mask_folder,
    open_pascal_context,
    open_voc_segmentation,
)
from trm_jax.data.sources.tfds import TfdsImages
from trm_jax.data.sources.webdataset import WebDataset
from trm_jax.types import UserError


def open_source(dataset: str, split: str, *, root: str = "", **options) -> Source:
    """Opens one split of a dataset.

    dataset: a key of `DATASETS`. split: "train" or "test"; "dev" where the dataset has one.
    root:    the folder (manifest: the file; tfds: its data_dir) of the data; glyphs needs none, nor
      does a mixture.
    options: keyword arguments of the dataset's opener.
    Raises UserError for an unknown dataset, split or option, and for missing or broken files.
    """
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1, cutoff=0.0)
        raise UserError(
            f"data.dataset '{dataset}' is unknown; did you mean '{near[0]}'? "
            f"(it is one of {', '.join(DATASETS)})"
        )
    if split not in _SPLITS.get(dataset, ("train", "test")):
        raise UserError(f"dataset '{dataset}' has no split '{split}'")
    opener = DATASETS[dataset]
    check_options(dataset, opener, options)
    if dataset not in _ROOTLESS and not root:
        raise UserError(f"data.root is empty; dataset '{dataset}' needs the place of its files")
    return opener(os.path.expanduser(root), split, **options)


def check_options(dataset: str, opener: Callable, options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that is no argument of `opener` behind its first."""
    first, *others = inspect.signature(opener).parameters
    accepted = [name for name in others if name not in _FIXED and name != first]
    for name in options:
        if name not in accepted:
            known = ", ".join(accepted) or "none"
            raise UserError(f"dataset '{dataset}' has no option '{name}'; it has {known}")


def _open_glyphs(
    root: str | Path,
    split: str,
    *,
    train_size: int = 10_000,
    test_size: int = 2_000,
    image_size: int = 96,
    caption_noise: float = 0.0,
    clutter: float = 1.0,
    max_objects: int = 6,
    object_scale: float = 1.0,
    typical_color: float = 0.0,
    attributes: bool = True,
    categories: int = 40,
    seed: int = 0,
    keep: bool = False,
) -> Source:
    """The endless glyph scenes made finite; train and test come from different streams."""
    del root
    # Matplotlib's font rendering is only paid for by those who use it.
    from trm_jax.data.sources.glyphs import GlyphScenes

    stream = 0 if split == "train" else 1
    # Pyright does not take a cached_property for the property of a protocol.
    return GlyphScenes(  # pyright: ignore[reportReturnType]
        seed=int(np.random.SeedSequence([seed, stream]).generate_state(1)[0]),
        size=train_size if split == "train" else test_size,
        image_size=image_size,
        caption_noise=caption_noise if split == "train" else 0.0,
        clutter=clutter,
        max_objects=max_objects,
        object_scale=object_scale,
        typical_color=typical_color,
        attributes=attributes,
        categories=categories,
        keep=keep,
    )


def _open_mixture(root: str | Path, split: str, *, parts: Any = ()) -> Mixture:
    """Image-text pairs of several datasets; `root` is where the parts' relative roots start."""
    return open_mixture(parts, split, root=root, open_part=open_source)


DATASETS: dict[str, Callable[..., Source]] = {
    "glyphs": _open_glyphs,
    "coco": open_coco,
    "voc": open_voc,
    "tfds": TfdsImages,
    "manifest": open_manifest,
    "coco_features": open_coco_features,
    "flickr8k": open_flickr8k,
    "flickr8k_features": CaptionedFeatures,
    "karpathy": open_karpathy,
    "voc_segmentation": open_voc_segmentation,
    "pascal_context": open_pascal_context,
    "coco_object": open_coco_object,
    "masks": open_mask_folder,
    "image_folder": ImageFolder,
    "webdataset": WebDataset,
    "pairs": PairRecords,
    "mixture": _open_mixture,
}
_SPLITS = {
    "flickr8k": ("train", "dev", "test"),
    "flickr8k_features": ("train", "dev", "test"),
    "karpathy": ("train", "dev", "test"),
}
_ROOTLESS = ("glyphs", "mixture")
_FIXED = ("root", "split")

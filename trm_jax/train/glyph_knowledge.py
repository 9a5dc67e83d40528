"""Glyph scenes for MASK: regions with words, captioned regions and a corpus, made once in a cache.

The regions are the true boxes of the objects, an oracle's detections, encoded by the bundled CLIP.
Three streams of scenes: regions with words to learn from, captioned ones to match, and texts alone
from which word vectors are made.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from trm_jax.data.sources import glyph_regions
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.glyphs import GlyphScenes
from trm_jax.data.sources.labelled_regions import CaptionedRegions, LabelledRegions
from trm_jax.models.clip import towers
from trm_jax.pretrained import registry
from trm_jax.train import distributed, workdirs
from trm_jax.types import UserError

_ENCODER = "glyphs"
_TRAIN, _TEST, _TEXTS = range(3)


class GlyphKnowledge(NamedTuple):
    """train: regions with words. test: other scenes with captions. texts: a file, one a line."""

    train: LabelledRegions
    test: Source
    texts: Path


def open_all(data: ConfigDict, cache_dir: Path) -> GlyphKnowledge:
    """What a config's data section describes, from the cache or made now.

    `data.options`: seed; held_out, the share of synonyms that only captions use; colors, whether an
    object's colour is its second word; texts, the scenes whose captions make word vectors.

    Raises:
      UserError: an option cannot be.
    """
    options = {"seed": 0, "held_out": 0.5, "colors": False, "texts": 6000, **data.options.to_dict()}
    for name in options:
        if name not in ("seed", "held_out", "colors", "texts"):
            raise UserError(f"data.options.{name}: glyph_regions has seed, held_out, colors, texts")
    if data.train_size < 1 or data.test_size < 1:
        raise UserError("data.train_size and data.test_size must be at least 1: scenes are endless")
    seed, folder = options["seed"], cache_dir / "glyph_regions"
    # Pyright does not take a cached_property for the property of a protocol.
    scenes: list[Any] = [
        GlyphScenes(seed=_seed(seed, stream), size=size, image_size=data.image_size)
        for stream, size in ((_TRAIN, data.train_size), (_TEST, data.test_size))
    ]
    held_out = glyph_regions.held_out_synonyms(options["held_out"], seed)
    files = [folder / "train.npz", folder / "test.npz"]
    texts = folder / "texts.txt"
    if distributed.is_first():
        for path, part in zip(files, scenes, strict=True):
            _write(path, part, held_out, options, data.image_size)
        others = GlyphScenes(seed=_seed(seed, _TEXTS), size=options["texts"], image_size=32)
        lines = [text for index in range(len(others)) for text in others.captions(index)]
        workdirs.write_text(texts, "\n".join(lines) + "\n")  # another run may be reading it
    distributed.barrier()
    return GlyphKnowledge(LabelledRegions(files[0]), CaptionedRegions(files[1], scenes[1]), texts)


def _seed(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence([seed, 77, stream]).generate_state(1)[0])


def _write(path: Path, scenes: GlyphScenes, held_out, options: dict[str, Any], size: int) -> None:
    """The regions of scenes, unless the file was made of just these."""
    located = registry.locate(_ENCODER)
    made_of = {
        "seed": scenes.seed, "scenes": len(scenes), "image_size": size, "held_out": held_out,
        "colors": options["colors"], "encoder": registry.provenance(located),
    }  # fmt: skip
    if glyph_regions.is_made_of(path, made_of):
        return
    config = towers.validate(registry.read_metadata(_ENCODER)["config"])
    variables: Any = registry.load(located, config)
    model = towers.build(config, dtype=jnp.float32)

    @jax.jit
    def encode(images):
        return model.apply(variables, images, method="encode_image")[0]

    regions = glyph_regions.scene_regions(scenes, held_out=held_out, colors=options["colors"])
    side = config["image"]["image_size"]
    glyph_regions.write_regions(
        path, regions, lambda batch: np.asarray(encode(batch)), size=side, made_of=made_of
    )

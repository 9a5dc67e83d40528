"""Which CLIP a state dict is, told from the names and shapes of its tensors alone."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from trm_jax.models.clip.config import validate
from trm_jax.pretrained import convert, convert_groupvit
from trm_jax.pretrained.architectures import ARCHITECTURES, GELU, architecture
from trm_jax.types import UserError

Shapes = Mapping[str, tuple[int, ...]]


class Difference(NamedTuple):
    """How tensors differ from those of an architecture; each a list of names, sorted.

    Attributes:
      missing: the architecture has them.
      left_over: it does not have them.
      reshaped: it has them in another shape.
    """

    missing: list[str]
    left_over: list[str]
    reshaped: list[str]


def infer(shapes: Shapes) -> dict[str, Any]:
    """The validated configuration of the towers that a state dict belongs to.

    Three things leave no trace in shapes and are taken to be as in OpenAI's models: heads of 64
    channels (one head, where 64 does not divide the width), QuickGELU (see `stated`; in the image
    tower of a GroupViT, GELU), and the end of text as the last word of the vocabulary.

    Args:
      shapes: of the tensors by OpenCLIP's names, or transformers' of a GroupViT.

    Raises:
      UserError: a tensor is missing without which the architecture cannot be told.
    """
    try:
        if convert_groupvit.is_groupvit(shapes):
            return validate(_groupvit(shapes))
        image = _vit(shapes) if "visual.class_embedding" in shapes else _resnet(shapes)
        text = _text(
            shapes,
            "token_embedding.weight",
            "positional_embedding",
            "transformer.resblocks",
        )
        return validate({"embed_dim": shapes["text_projection"][1], "image": image, "text": text})
    except KeyError as error:
        raise UserError(f"these are no towers of CLIP: {error.args[0]} is missing") from None
    except (IndexError, ValueError):
        raise UserError("these are no towers of CLIP: a tensor has other axes than there") from None


def _text(shapes: Shapes, tokens: str, positions: str, blocks: str) -> dict[str, Any]:
    vocabulary, width = shapes[tokens]
    return {
        "vocab_size": vocabulary,
        "context_length": shapes[positions][0],
        "width": width,
        "heads": _heads(width),
        "layers": _count(shapes, blocks),
        "eos_id": vocabulary - 1,
    }


def _groupvit(shapes: Shapes) -> dict[str, Any]:
    embeddings, stages = "vision_model.embeddings.", "vision_model.encoder.stages"
    width, _, patch_size, _ = shapes[f"{embeddings}patch_embeddings.projection.weight"]
    numbers = range(_count(shapes, stages))
    groups = [shapes.get(f"{stages}.{i}.downsample.mlp_inter.fc2.bias", (0,))[0] for i in numbers]
    image = {
        "kind": "groupvit",
        "patch_size": patch_size,
        "width": width,
        "heads": _heads(width),
        "depths": tuple(_count(shapes, f"{stages}.{i}.layers") for i in numbers),
        "group_tokens": tuple(shapes.get(f"{stages}.{i}.group_token", (1, 0))[1] for i in numbers),
        "output_groups": tuple(groups),
        "image_size": patch_size * _side(shapes[f"{embeddings}position_embeddings"][1] + 1),
    }
    text = "text_model.embeddings."
    return {
        "embed_dim": shapes["visual_projection.3.weight"][0],
        "projector_hidden": shapes["visual_projection.0.weight"][0],
        "image": image,
        "text": _text(
            shapes,
            f"{text}token_embedding.weight",
            f"{text}position_embedding.weight",
            "text_model.encoder.layers",
        ),
    }


def _vit(shapes: Shapes) -> dict[str, Any]:
    width, _, patch_size, _ = shapes["visual.conv1.weight"]
    return {
        "kind": "vit",
        "patch_size": patch_size,
        "width": width,
        "layers": _count(shapes, "visual.transformer.resblocks"),
        "heads": _heads(width),
        "image_size": patch_size * _side(shapes["visual.positional_embedding"][0]),
    }


def _resnet(shapes: Shapes) -> dict[str, Any]:
    positions, channels = shapes["visual.attnpool.positional_embedding"]
    stages = _count(shapes, "visual.layer", "")
    return {
        "kind": "resnet",
        "layers": tuple(_count(shapes, f"visual.layer{i + 1}") for i in range(stages)),
        "width": 2 * shapes["visual.conv1.weight"][0],
        "heads": _heads(channels),
        "image_size": 4 * 2 ** (stages - 1) * _side(positions),
    }


def _heads(width: int) -> int:
    return width // 64 if width % 64 == 0 else 1


def _side(positions: int) -> int:
    """The side of a square grid of positions, of which one more is the class or the mean."""
    side = math.isqrt(max(positions - 1, 0))
    if side * side + 1 != positions:
        raise ValueError
    return side


def _count(shapes: Shapes, prefix: str, dot: str = ".") -> int:
    """How many numbers follow a prefix: the blocks of a transformer or a stage, or the stages."""
    pattern = re.compile(re.escape(prefix + dot) + r"(\d{1,6})\.")
    found = {match[1] for name in shapes if (match := pattern.match(name))}
    if not found:
        raise KeyError(f"{prefix}{dot}*")
    return len(found)


def named(config: dict[str, Any]) -> str | None:
    """The name, perhaps with "-gelu", of the architecture with this validated configuration."""
    names = (*ARCHITECTURES, *(name + GELU for name in ARCHITECTURES))
    return next((name for name in names if architecture(name) == config), None)


@functools.cache
def shapes_of(name: str) -> Shapes:
    """The shapes of a named architecture, by OpenCLIP's names (a GroupViT's: transformers')."""
    return convert.openclip_shapes(ARCHITECTURES[name])


def compare(shapes: Shapes, wanted: Shapes) -> Difference:
    """How `shapes` differ from those that are wanted, both by OpenCLIP's names."""
    return Difference(
        sorted(wanted.keys() - shapes.keys()),
        sorted(shapes.keys() - wanted.keys()),
        sorted(name for name in wanted.keys() & shapes.keys() if wanted[name] != shapes[name]),
    )


def nearest(shapes: Shapes) -> tuple[str, Difference] | None:
    """The named architecture that shares most tensors, and the rest; None if none shares half."""
    best, most = None, 0.5
    kind = "vit" if "visual.class_embedding" in shapes else "resnet"
    if convert_groupvit.is_groupvit(shapes):
        kind = "groupvit"
    for name, known in ARCHITECTURES.items():
        if known["image"]["kind"] != kind:
            continue
        difference = compare(shapes, shapes_of(name))
        odd = len(difference.left_over) + len(difference.reshaped)
        total = len(shapes) + len(difference.missing)
        share = (len(shapes) - odd) / max(total, 1)
        if share > most:
            best, most = (name, difference), share
    return best

"""Which CLIP a state dict is, told from the names and shapes of its tensors alone."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from trm_jax.models.clip.config import validate
from trm_jax.pretrained import convert
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
    channels (one head, where 64 does not divide the width), QuickGELU (see `stated`), and the end
    of text as the last word of the vocabulary.

    Args:
      shapes: of the tensors by OpenCLIP's names.

    Raises:
      UserError: a tensor is missing without which the architecture cannot be told.
    """
    try:
        image = _vit(shapes) if "visual.class_embedding" in shapes else _resnet(shapes)
        vocabulary, width = shapes["token_embedding.weight"]
        return validate(
            {
                "embed_dim": shapes["text_projection"][1],
                "image": image,
                "text": {
                    "vocab_size": vocabulary,
                    "context_length": shapes["positional_embedding"][0],
                    "width": width,
                    "heads": _heads(width),
                    "layers": _count(shapes, "transformer.resblocks"),
                    "eos_id": vocabulary - 1,
                },
            }
        )
    except KeyError as error:
        raise UserError(f"these are no towers of CLIP: {error.args[0]} is missing") from None
    except (IndexError, ValueError):
        raise UserError("these are no towers of CLIP: a tensor has other axes than there") from None


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
    """The shapes of a named architecture, by OpenCLIP's names."""
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

"""What no tensor tells of weights that others made: activations, and the scaling of pixels.

OpenAI's and NVIDIA's are known. Of others the config file beside them says it: OpenCLIP's where the
tensors have OpenCLIP's names, transformers' where they have transformers'.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trm_jax.models.clip.config import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    validate,
)
from trm_jax.models.clip.transformer import ACTIVATIONS
from trm_jax.pretrained import files, hub, identify
from trm_jax.pretrained.architectures import HUB, OTHER_WEIGHTS, PUBLISHED, published_as
from trm_jax.types import UserError

_OPENAI = {
    "image.activation": "quick_gelu",
    "text.activation": "quick_gelu",
    "image.mean": CLIP_MEAN,
    "image.std": CLIP_STD,
}
# What NVlabs' program trained with. The hub's preprocessor_config.json says otherwise: it is that
# of CLIP, with which the weights were converted.
_NVIDIA = {
    "image.activation": "gelu",
    "text.activation": "quick_gelu",
    "image.mean": IMAGENET_MEAN,
    "image.std": IMAGENET_STD,
}
_NVIDIA_REPOSITORIES = {PUBLISHED["groupvit"].repository, *OTHER_WEIGHTS}
# Activations (image, text) where transformers' config does not say them, by model type.
_DEFAULTS = {"clip": ("quick_gelu", "quick_gelu"), "groupvit": ("gelu", "quick_gelu")}


class Stated(NamedTuple):
    """What is stated of weights.

    Attributes:
      source: who says so.
      fields: by "tower.field" of the towers' config; what is not stated is absent.
    """

    source: str
    fields: dict[str, Any]


def read(weights: files.Weights) -> Stated | None:
    """What is stated of weights in a format other than ours; None if nothing is.

    Raises:
      UserError: a config file lies beside them and is no JSON.
    """
    path = weights.path
    # What lies in OpenAI's repositories is OpenAI's at whatever commit.
    repository = hub.commit(path).get("repository")
    if repository in _NVIDIA_REPOSITORIES:
        return Stated("NVIDIA's publication", _NVIDIA)
    if repository in HUB.values() or published_as(files.sha256(path)):
        return Stated("OpenAI's publication", _OPENAI)
    if any(name.startswith("vision_model.") for name in weights.tensors):
        source, fields = hub.TRANSFORMERS_CONFIG, _transformers(path.parent)
    else:
        source, fields = hub.OPENCLIP_CONFIG, _openclip(path.parent)
    return Stated(f"{source} beside it", fields) if fields else None


def _openclip(folder: Path) -> dict[str, Any]:
    content = _json(folder / hub.OPENCLIP_CONFIG)
    model = content.get("model_cfg")
    if not isinstance(model, dict):
        return {}
    # OpenCLIP leaves the field out for GELU.
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return {
        "image.activation": activation,
        "text.activation": activation,
        **_pixels(_section(content, "preprocess_cfg"), "mean", "std"),
    }


def _transformers(folder: Path) -> dict[str, Any]:
    content = _json(folder / hub.TRANSFORMERS_CONFIG)
    kind = content.get("model_type")
    if kind not in _DEFAULTS:
        return {}  # of another library, such as timm, or of another model
    fields = {}
    towers = (("image", "vision_config"), ("text", "text_config"))
    for (tower, section), default in zip(towers, _DEFAULTS[kind], strict=True):
        # Old files have a second section, which transformers prefers as a whole.
        is_old = content.get(f"{section}_dict") is not None
        found = _section(content, f"{section}_dict" if is_old else section)
        fields[f"{tower}.activation"] = found.get("hidden_act", default)
    pixels = _pixels(_json(folder / hub.PREPROCESSOR_CONFIG), "image_mean", "image_std")
    if kind == "groupvit" and pixels.get("image.mean") == CLIP_MEAN:
        pixels = {}  # copied from CLIP, see _NVIDIA
    return fields | pixels


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    return content if isinstance(content, dict) else {}


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def _pixels(section: Mapping[str, Any], mean: str, std: str) -> dict[str, Any]:
    found = {"image.mean": section.get(mean), "image.std": section.get(std)}
    return {
        field: tuple(values)
        for field, values in found.items()
        if isinstance(values, list)
        and len(values) == 3
        and all(isinstance(value, int | float) for value in values)
    }


def applied(stated: Stated | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The towers' config with what is stated in place of what it says.

    Args:
      stated: activations that we do not have are passed over.
      config: validated.
    """
    towers = {tower: dict(config[tower]) for tower in ("image", "text")}
    for field, value in _fields(stated, config).items():
        tower, name = field.split(".")
        if name != "activation" or value in ACTIVATIONS:
            towers[tower][name] = value
    return validate({**config, **towers})


def check(stated: Stated, config: Mapping[str, Any], path: Path) -> None:
    """Raises a UserError that says what to set if the config contradicts what is stated.

    Args:
      stated: of the weights.
      config: of the towers, validated.
      path: of the weights.
    """
    wrong = {
        field: value
        for field, value in _fields(stated, config).items()
        if not _same(value, _get(config, field))
    }
    if not wrong:
        return
    need = ", ".join(
        f"{field} {value}, not {_get(config, field)}" for field, value in wrong.items()
    )
    unknown = [v for f, v in wrong.items() if f.endswith("activation") and v not in ACTIVATIONS]
    if unknown:
        remedy = f"{unknown[0]} is none of {', '.join(ACTIVATIONS)}: take other weights"
    else:
        remedy = f"set {_remedy(wrong, applied(stated, config))}"
    raise UserError(f"{path} needs {need} (says {stated.source}); {remedy}")


def _fields(stated: Stated | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """What is stated of fields that the config has: a ResNet has no image.activation."""
    fields = stated.fields if stated else {}
    return {k: v for k, v in fields.items() if k.split(".")[1] in config[k.split(".")[0]]}


def _get(config: Mapping[str, Any], field: str) -> Any:
    tower, name = field.split(".")
    return config[tower][name]


def _same(stated: Any, configured: Any) -> bool:
    if isinstance(stated, str):
        return stated == configured
    # Numbers may have been through float32; a 255th is a thousand times more.
    return all(abs(a - b) < 5e-6 for a, b in zip(stated, configured, strict=True))


def _remedy(wrong: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    settings = [f"model.clip.{f}={v}" for f, v in wrong.items() if not f.endswith("activation")]
    activations = [f"model.clip.{f}={v}" for f, v in wrong.items() if f.endswith("activation")]
    # The name says nothing of what a run may choose, nor of the scaling of pixels.
    image = {**wanted["image"], "mean": CLIP_MEAN, "std": CLIP_STD}
    if image["kind"] == "groupvit":
        image |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    plain = {**wanted, "dense_pos_embed": False, "attention": "xla", "image": image}
    if activations and (name := identify.named(plain)):
        activations = [f"model.architecture={name}"]
    return " and ".join(activations + settings)


def assumption(config: Mapping[str, Any], path: Path) -> str:
    """The line on what is assumed of weights of which nothing is stated."""
    sections = (config["image"], config["text"])
    used = {section["activation"] for section in sections if "activation" in section}
    if len(used) > 1:
        listed = ", ".join(s["activation"] for s in sections)
        return (
            f"note: no config file beside {path} says its activations; {listed} (image, text) are "
            "assumed, as configured"
        )
    assumed, other, change = "QuickGELU", "GELU", "add -gelu to"
    if used == {"gelu"}:
        assumed, other, change = "GELU", "QuickGELU", "take -gelu off"
    return (
        f"note: no config file beside {path} says its activation; {assumed} is assumed, as "
        f"configured; if it was trained with {other}, {change} model.architecture"
    )

"""The plain-dictionary configuration of a pair of CLIP towers, checked and completed."""

from collections.abc import Mapping
from typing import Any

from trm_jax.models import checks
from trm_jax.models.clip.transformer import ACTIVATIONS
from trm_jax.types import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Image kinds whose features may go through an MLP projector in place of their own projection.
PROJECTED = ("groupvit", "vit", "resnet")

_PIXELS = {"image_size": checks.REQUIRED, "mean": CLIP_MEAN, "std": CLIP_STD}
_IMAGE_FIELDS: dict[str, dict[str, Any]] = {
    "resnet": {"layers": checks.REQUIRED, "width": checks.REQUIRED, "heads": checks.REQUIRED}
    | _PIXELS,
    "vit": {
        "patch_size": checks.REQUIRED,
        "width": checks.REQUIRED,
        "layers": checks.REQUIRED,
        "heads": checks.REQUIRED,
        "activation": "quick_gelu",
    }
    | _PIXELS,
    "groupvit": {
        "patch_size": checks.REQUIRED,
        "width": 384,
        "heads": 6,
        "depths": (6, 3, 3),
        "group_tokens": (64, 8, 0),
        "output_groups": (64, 8, 0),
        "drop_path": 0.1,
        "activation": "gelu",
        "initializer_range": 0.02,
        "image_size": checks.REQUIRED,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    },
    "features": {"width": checks.REQUIRED, "hidden": checks.REQUIRED, "skip": True, "pool": "mean"},
}
_TEXT_FIELDS: dict[str, Any] = {
    "vocab_size": checks.REQUIRED,
    "context_length": checks.REQUIRED,
    "width": checks.REQUIRED,
    "heads": checks.REQUIRED,
    "layers": checks.REQUIRED,
    "activation": "quick_gelu",
    "eos_id": checks.REQUIRED,
}
_TOP_FIELDS = {
    "embed_dim": checks.REQUIRED,
    "projector_hidden": 0,
    "dense_pos_embed": False,
    "attention": "xla",
    "image": checks.REQUIRED,
    "text": checks.REQUIRED,
}


def _check_image(image: Mapping[str, Any]) -> None:
    where = "model.clip.image"
    if image["kind"] == "features":
        checks.positive(image, ("width",), where)
        checks.one_of(image, "pool", ("mean", "max_mean"), where)
        return
    checks.positive(image, ("width", "heads", "image_size"), where)
    for name in ("mean", "std"):
        if len(image[name]) != 3:
            raise UserError(f"{where}.{name} must have three values, not {image[name]!r}")
    if image["kind"] in ("vit", "groupvit"):
        checks.positive(image, ("patch_size",), where)
        checks.one_of(image, "activation", ACTIVATIONS, where)
        checks.multiple(image["width"], image["heads"], f"{where}.width", "heads")
        checks.multiple(
            image["image_size"], image["patch_size"], f"{where}.image_size", "patch_size"
        )
        if image["kind"] == "vit":
            checks.positive(image, ("layers",), where)
        else:
            _check_stages(image, where)
        return
    layers = image["layers"]
    if not isinstance(layers, tuple) or not layers or not all(depth >= 1 for depth in layers):
        raise UserError(f"{where}.layers must list the blocks of each stage, not {layers!r}")
    stages = 2 ** (len(layers) - 1)
    checks.multiple(image["width"] * 4 * stages, image["heads"], "the ResNet's last width", "heads")
    checks.multiple(image["image_size"], 4 * stages, f"{where}.image_size", "the total stride")
    checks.multiple(image["width"], 2, f"{where}.width", "two")


def _check_stages(image: Mapping[str, Any], where: str) -> None:
    if not image["initializer_range"] > 0:
        raise UserError(f"{where}.initializer_range must be positive")
    depths = image["depths"]
    if not _counts(depths, least=1) or len(depths) < 2:
        raise UserError(f"{where}.depths must list the blocks of two or more stages, not {depths}")
    for name in ("group_tokens", "output_groups"):
        counts = image[name]
        if not _counts(counts, least=0) or len(counts) != len(depths):
            raise UserError(f"{where}.{name} must list one number for each stage, not {counts}")
        if counts[-1] != 0 or 0 in counts[:-1]:
            raise UserError(
                f"{where}.{name} = {counts} must be positive but for a 0 at its end: the last "
                "stage groups nothing"
            )
    checks.rate(image, "drop_path", where)


def _counts(values: Any, least: int) -> bool:
    return isinstance(values, tuple) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= least
        for value in values
    )


def _check_projector(top: Mapping[str, Any]) -> None:
    hidden, kind = top["projector_hidden"], top["image"]["kind"]
    if not _counts((hidden,), least=0):
        raise UserError(f"model.clip.projector_hidden must be a width or 0, not {hidden!r}")
    if hidden and kind not in PROJECTED:
        raise UserError(
            f"model.clip.projector_hidden = {hidden} is for the image kinds "
            f"{', '.join(PROJECTED)}; the kind {kind!r} projects by itself: set it to 0"
        )


def validate(config: Any) -> dict[str, Any]:
    """Checks a towers configuration and fills in defaults.

    Args:
      config: any nested mapping (dict, ConfigDict, parsed JSON) with "embed_dim", "image",
        "text" and optionally "projector_hidden", "dense_pos_embed" and "attention"; image kinds
        are "resnet", "vit", "groupvit" and "features". A "projector_hidden" of 0 means that the
        towers project linearly by themselves; else it is the hidden width of the MLP projectors
        of both towers.

    Returns:
      Nested dicts with every field present and tuples for sequences, equal for equal models.

    Raises:
      UserError: a field is missing, unknown or out of range.
    """
    top = checks.complete(checks.plain(config), _TOP_FIELDS, "model.clip")
    checks.positive(top, ("embed_dim",), "model.clip")
    checks.one_of(top, "attention", ("xla", "cudnn"), "model.clip")
    kind = top["image"].get("kind") if isinstance(top["image"], dict) else None
    if kind not in _IMAGE_FIELDS:
        raise UserError(
            f"model.clip.image.kind = {kind!r} must be one of {', '.join(_IMAGE_FIELDS)}"
        )
    top["image"] = checks.complete(
        top["image"], {"kind": checks.REQUIRED} | _IMAGE_FIELDS[kind], "model.clip.image"
    )
    _check_image(top["image"])
    _check_projector(top)
    top["text"] = text = checks.complete(top["text"], _TEXT_FIELDS, "model.clip.text")
    checks.positive(
        text, ("vocab_size", "context_length", "width", "heads", "layers"), "model.clip.text"
    )
    checks.one_of(text, "activation", ACTIVATIONS, "model.clip.text")
    checks.multiple(text["width"], text["heads"], "model.clip.text.width", "heads")
    if not 0 <= text["eos_id"] < text["vocab_size"]:
        raise UserError(f"model.clip.text.eos_id = {text['eos_id']} lies outside the vocabulary")
    return top

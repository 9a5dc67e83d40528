"""The plain-dictionary configuration of a matching model, checked and completed."""

from typing import Any

from trm_jax.models import checks
from trm_jax.types import UserError

_SCORERS: dict[str, dict[str, Any]] = {
    # A scale of 0 is the direction's own, see scan.py.
    "scan": {"direction": "i2t", "pooling": "mean", "attention_scale": 0.0, "lse_scale": 0.0},
    "sgraf": {
        "module": "sgr",
        "sim_dim": 256,
        "steps": 3,
        "dropout": 0.4,
        "attention_scale": 9.0,
        "precision": "highest",
    },
    "naaf": {"attention_scale": 20.0, "mixing_scale": 5.0, "threshold_update": "batch"},
}
_TEXTS: dict[str, dict[str, Any]] = {
    "gru": {"vocab_size": checks.REQUIRED, "embedding": 300, "dropout": 0.0},
    # `bert` is the encoder's own configuration, see models/matching/bert.py.
    "bert": {"vocab_size": checks.REQUIRED, "bert": checks.REQUIRED, "dropout": 0.0},
}
_WHERE = "model.matching"


def validate(config: Any) -> dict[str, Any]:
    """Checks a matching model's configuration and fills in defaults.

    Args:
      config: any nested mapping with "kind" ("scan", "sgraf" or "naaf"), "embed_dim", "image"
        (regions, width), "text" (kind "gru" or "bert" ..) and "scorer".

    Returns:
      Nested dicts with every field present, equal for equal models.

    Raises:
      UserError: a field is missing, unknown or out of range.
    """
    fields = dict.fromkeys(("kind", "embed_dim", "image", "text"), checks.REQUIRED)
    top = checks.complete(checks.plain(config), {**fields, "scorer": {}}, _WHERE)
    checks.one_of(top, "kind", _SCORERS, _WHERE)
    checks.positive(top, ("embed_dim",), _WHERE)
    sizes = {"regions": checks.REQUIRED, "width": checks.REQUIRED}
    top["image"] = checks.complete(top["image"], sizes, f"{_WHERE}.image")
    checks.positive(top["image"], ("regions", "width"), f"{_WHERE}.image")
    top["text"] = _text(top["text"])
    top["scorer"] = checks.complete(top["scorer"], _SCORERS[top["kind"]], f"{_WHERE}.scorer")
    _check_scorer(top["kind"], top["scorer"], f"{_WHERE}.scorer")
    return top


def _text(given: Any) -> dict[str, Any]:
    where, kind = f"{_WHERE}.text", given.get("kind") if isinstance(given, dict) else None
    if kind not in _TEXTS:
        raise UserError(f"{where}.kind = {kind!r} must be one of {', '.join(_TEXTS)}")
    text = checks.complete(given, {"kind": checks.REQUIRED, **_TEXTS[kind]}, where)
    checks.positive(text, ("vocab_size",), where)
    checks.rate(text, "dropout", where)
    if kind == "gru":
        checks.positive(text, ("embedding",), where)
    return text


def _check_scorer(kind: str, scorer: dict[str, Any], where: str) -> None:
    if kind == "scan":
        checks.one_of(scorer, "direction", ("t2i", "i2t"), where)
        checks.one_of(scorer, "pooling", ("mean", "lse"), where)
        for name in ("attention_scale", "lse_scale"):
            if scorer[name]:
                checks.above_zero(scorer, (name,), where)
        return
    checks.above_zero(scorer, ("attention_scale",), where)
    if kind == "sgraf":
        checks.one_of(scorer, "module", ("sgr", "saf"), where)
        checks.one_of(scorer, "precision", ("highest", "high", "default"), where)
        checks.positive(scorer, ("sim_dim", "steps"), where)
        checks.rate(scorer, "dropout", where)
    else:
        checks.above_zero(scorer, ("mixing_scale",), where)
        checks.one_of(scorer, "threshold_update", ("batch", "sequential"), where)

"""The towers and the weights of a config: their architecture, what they start from, their dtype."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from trm_jax.data import tokenizers
from trm_jax.models.clip.config import validate
from trm_jax.pretrained import files, registry
from trm_jax.train import matching, paths
from trm_jax.types import PyTree, UserError

_TOKEN_EMBEDDING = "clip/params/text/token_embedding"


def resolve(model: ConfigDict, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The validated model: that of `model.matching`, or else the towers of `model.clip`."""
    if model.matching:
        return matching.resolve(model, tokenizer)
    return resolve_clip(model, tokenizer)


def restored(saved: dict[str, Any]) -> dict[str, Any]:
    """The validated model of a workdir, for prediction, which needs no kernel of one device."""
    if "scorer" in saved:
        return matching.validate(saved)
    return {**validate(saved), "attention": "xla"}


def resolve_clip(model: ConfigDict, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The towers' config: `model.clip` over the named architecture, if there is one.

    A vocabulary of 0 becomes the tokenizer's.
    """
    named = registry.architecture(model.architecture) if model.architecture else {}
    resolved = {**named, **model.clip.to_dict()}
    for tower in ("image", "text"):
        resolved[tower] = {**named.get(tower, {}), **resolved.get(tower, {})}
    text = resolved["text"]
    for field, value in (("vocab_size", tokenizer.vocab_size), ("eos_id", tokenizer.eos_id)):
        text[field] = text.get(field) or value
    return validate({**resolved, "text": text})


def compute_dtype(name: str) -> np.dtype:
    """The dtype of `precision.compute`: "auto" is float32 on a CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise UserError(f"precision.compute={name!r} is none of auto, float32, bfloat16")
    return jnp.dtype(name)


def check_attention(clip: dict[str, Any], dtype: np.dtype) -> None:
    """Raises UserError where the cuDNN kernel is asked for and cannot be used."""
    if clip["attention"] != "cudnn":
        return
    kind, backend = clip["image"]["kind"], jax.default_backend()
    if not (kind in ("vit", "groupvit") and backend == "gpu" and dtype == jnp.bfloat16):
        raise UserError(
            "model.clip.attention='cudnn' is for a ViT on an NVIDIA GPU with bfloat16; this is a "
            f"{kind} on {backend} with {dtype}: use 'xla'"
        )


def locate_initial(name: str) -> registry.Located:
    """The file of `model.initial_from`; one without a path for ""."""
    if not name:
        return registry.locate("random")
    path = registry.PACKAGED.get(name) or Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"model.initial_from={name}: there is no such file; give the model.safetensors or "
            f"clip.safetensors of an export, or {', '.join(registry.PACKAGED)}"
        )
    return registry.Located(name, path)


def warm_start(
    params: PyTree, patterns, initial: registry.Located, tokenizer: tokenizers.Tokenizer
) -> PyTree:
    """Params that match `patterns` replaced by those of `initial`, if that is a file."""
    path = initial.path
    if path is None:
        return params
    given = files.read(path).tensors
    flat = paths.flatten(params)
    hits = paths.matches(params, patterns, field="model.initial_params")
    for name in (n for n, hit in hits.items() if hit):
        # A file of towers alone calls clip/params/.. params/..
        value = given.get(name, given.get(name.removeprefix("clip/")))
        if value is None or value.shape != flat[name].shape:
            raise UserError(f"model.initial_from={path}: '{name}' is missing or of another shape")
        flat[name] = jnp.asarray(np.asarray(value), flat[name].dtype)
    words = registry.tokenizer_config(initial)
    if hits.get(_TOKEN_EMBEDDING) and words not in (None, tokenizer.to_config()):
        raise UserError(
            f"model.initial_from={path}: its words are not those of this run's captions, so the "
            "token embeddings would be mixed up; leave them out of model.initial_params"
        )
    return jax.tree.unflatten(jax.tree.structure(params), list(flat.values()))

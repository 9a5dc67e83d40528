"""A run as files that need no checkpoint reader: safetensors, config, model card, StableHLO."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from trm_jax.pretrained import registry
from trm_jax.train import experiment, metrics, paths, workdirs
from trm_jax.train.predictor import Predictor
from trm_jax.types import DataInfo

_SIDES = ("embed_image", "embed_text")


def export(model: Predictor, workdir: Path, out: Path) -> list[Path]:
    """Writes the model of a run; returns the files.

    model.safetensors: all params and extras by path. clip.safetensors: the towers alone, in the
    form that `model.pretrained` reads, if the run has any. config.json, vocabulary.json, README.md:
    what made it. predict.stablehlo: the prediction function with its weights, for any batch size;
    of a run that scores pairs, from features and tokens to scores.
    """
    out.mkdir(parents=True, exist_ok=True)
    provenance = _provenance(model, workdir)
    arrays = {k: np.asarray(v) for k, v in paths.flatten(model.params).items()}
    arrays |= {f"extras/{k}": np.asarray(v) for k, v in paths.flatten(model.extras).items()}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, out / "model.safetensors")
    if "clip" in model.params:
        variables = model.params["clip"]
        if "batch_stats" in model.extras:
            variables = {**variables, "batch_stats": model.extras["batch_stats"]}
        registry.save(
            out / "clip.safetensors",
            jax.device_get(variables),
            config=model.clip,
            tokenizer=model.tokenizer.to_config(),
            provenance=provenance,
        )
    for name in ("config.json", "vocabulary.json"):
        (out / name).write_text((workdir / name).read_text())
    (out / "README.md").write_text(_card(model, provenance))
    (out / "predict.stablehlo").write_bytes(_stablehlo(model))
    return sorted(out.iterdir())


def _stablehlo(model: Predictor) -> bytes:
    if "pair_scores" in model.method.predict:
        return _pair_stablehlo(model)
    name = "scores" if "scores" in model.method.predict else "embed_image"
    (size,) = jax.export.symbolic_shape("n")
    batch = {
        key: jax.ShapeDtypeStruct((size, *spec.shape[1:]), spec.dtype)
        for key, spec in model.inputs.items()
    }
    params, extras = jax.device_get((model.params, model.extras))
    function = jax.jit(lambda batch: model.method.predict[name](params, extras, batch))
    return bytes(jax.export.export(function)(batch).serialize())


def _pair_stablehlo(model: Predictor) -> bytes:
    """features [n, r, D], tokens [m, T] -> scores [n, m]; T is the longest of the run's lengths."""
    config = model.config.copy_and_resolve_references()
    config.model.options.block = 0  # a loop over blocks needs a known number of captions
    info = DataInfo(num_proxies=len(model.nouns))
    method = experiment.make_method(
        config, info, model.tokenizer, model.clip, model.inputs, grid=(1, 1)
    )
    images, texts = jax.export.symbolic_shape("n, m")
    length = config.data.length_buckets[-1]
    batch = {
        name: jax.ShapeDtypeStruct((images, *spec.shape[1:]), spec.dtype)
        for name, spec in model.inputs.items()
    }
    batch["tokens"] = jax.ShapeDtypeStruct((texts, length), np.int32)
    params, extras = jax.device_get((model.params, model.extras))

    def scores(batch):
        sides = [method.predict[name](params, extras, batch) for name in _SIDES]
        return method.predict["pair_scores"](params, extras, {**sides[0], **sides[1]})

    return bytes(jax.export.export(jax.jit(scores))(batch).serialize())


def _provenance(model: Predictor, workdir: Path) -> dict[str, Any]:
    run = workdirs.read_json(workdir / "run.json")
    lines = metrics.read_lines(workdir / "metrics.jsonl")
    return {
        "method": model.config.method,
        "step": model.step,
        "seed": model.config.seed,
        "dataset": model.config.data.dataset,
        "versions": run.get("versions", {}),
        "devices": run.get("devices", []),
        "wall_seconds": run.get("wall_seconds"),
        "metrics": lines[-1] if lines else {},
    }


def _card(model: Predictor, provenance: dict[str, Any]) -> str:
    spec = "\n".join(
        f"- `{k}`: {np.dtype(s.dtype)} {list(s.shape)}" for k, s in model.inputs.items()
    )
    last = "\n".join(f"- {k}: {v}" for k, v in provenance["metrics"].items())
    return (
        f"# {provenance['method']} on {provenance['dataset']}\n\n"
        f"Trained by trm_jax, step {provenance['step']}, seed {provenance['seed']}.\n\n"
        f"## Input\n{spec}\n\n## Classes\n{', '.join(model.class_names) or 'none'}\n\n"
        f"## Last metrics\n{last}\n"
    )

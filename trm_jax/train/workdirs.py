"""The files of a workdir that are not checkpoints: its config, its vocabulary, its last line."""

import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from trm_jax.train import metrics
from trm_jax.types import UserError

# Fields that change where or how fast a run goes, not what it computes.
_MAY_DIFFER = (
    "mesh.",
    "data.workers",
    "data.root",
    "data.cache_dir",
    "data.options.index_dir",
    "data.test_root",
    "prompts.remat",
    "model.clip.attention",
    "model.options.block",
    "nouns.tagger",
    "words.vectors",
    "words.tagger",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
)

# Fields that came later: a workdir without them was made with these values.
_ADDED = {
    "data.batch_size_schedule": [],
    "data.caption_shuffle": 0.0,
    "data.length_buckets": [],
    "data.test_augment": "none",
    "data.test_dataset": "",
    "data.test_options": {},
    "evaluate.folds": 1,
    "evaluate.segmentation": {},
    "model.knowledge": {},
    "model.matching": {},
    "nouns": {},
    "optimizer.drop_epochs": [],
    "optimizer.end_rate": 0.0,
    "optimizer.factors": [],
    "rows": {},
    "words": {},
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_text(path: Path, text: str) -> None:
    """Writes atomically: a killed run, or one beside it, leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Writes an object, as `write_text` does."""
    write_text(path, json.dumps(body, indent=1, default=str) + "\n")


def read_config(folder: Path) -> ConfigDict:
    """The resolved config of a run, later fields as they were then; UserError for no run."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is no workdir of a run: it has no config.json")
    body = json.loads(path.read_text())
    for name, value in _ADDED.items():
        section, _, field = name.rpartition(".")
        part = body.get(section) if section else body
        if part is not None and field not in part:
            part[field] = value
    return ConfigDict(_tuples(body))


def final_line(folder: Path, config: ConfigDict) -> dict[str, Any]:
    """The last line of a finished run of the same config, {} otherwise; see `check`."""
    check(folder, config)
    lines = metrics.read_lines(folder / "metrics.jsonl")
    return lines[-1] if lines and lines[-1].get("final") else {}


def check(folder: Path, config: ConfigDict) -> None:
    """Raises UserError if the workdir belongs to another config; it names the fields."""
    path = folder / "config.json"
    if not path.exists():
        return
    old, new = _flat(json.loads(path.read_text())), _flat(_plain(config))
    old = {**{name: value for name, value in _ADDED.items() if name in new}, **old}
    differing = sorted(
        name
        for name in old.keys() | new.keys()
        if old.get(name) != new.get(name) and not name.startswith(_MAY_DIFFER)
    )
    if differing:
        shown = ", ".join(f"{n} ({old.get(n)} there, {new.get(n)} now)" for n in differing[:6])
        raise UserError(
            f"--workdir={folder} belongs to another config; it differs in {shown}. "
            "Choose another --workdir or the old values"
        )


def claim(folder: Path, config: ConfigDict, built) -> None:
    """Writes config.json and vocabulary.json of a new run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _plain(config))
    write_json(
        folder / "vocabulary.json",
        {
            "class_names": list(built.info.class_names),
            "tokenizer": built.tokenizer.to_config(),
            "clip": built.clip,
            "nouns": built.nouns.vocabulary.to_config() if built.nouns else None,
            "inputs": {name: list(spec.shape[1:]) for name, spec in built.inputs.items()},
        },
    )


def check_vocabulary(folder: Path, built) -> None:
    """Raises UserError if the words or nouns of the data are not those the run was trained with."""
    saved = read_json(folder / "vocabulary.json")
    nouns = built.nouns.vocabulary.to_config() if built.nouns else None
    for name, field, new in (
        ("words", "tokenizer", built.tokenizer.to_config()),
        ("nouns", "nouns", nouns),
    ):
        old = saved.get(field, new)
        if old != json.loads(json.dumps(new)):
            raise UserError(
                f"{folder} was trained with other {name} than the captions of data.root give now: "
                "restore the training data that it was started with"
            )


def _plain(config: ConfigDict) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(), default=list))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def _tuples(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(_tuples(value) for value in tree) if isinstance(tree, list) else tree

"""Pretrained towers by name or path, and our own weight format.

`locate` finds the file once, for `tokenizer_config`, `load` and `provenance`; `load` turns it into
variables; `save` and `save_openclip` write one.

Our format is one safetensors file: tensors by their "/"-joined variable path
("params/image/conv1/kernel") and metadata {"format": "trm_jax", "config", "tokenizer",
"provenance"}, the last three as JSON, so that a file says by itself how to use it.

Hashes are checked where they mean something: a file that was found by a model's name (in OpenAI's
cache, or on the hub at the listed commit), and a TorchScript archive that bears the name of one of
OpenAI's, must be the published one. State dicts saved anew under such a name, and all other files,
are judged by their content, and by the config file beside them (see `stated`).
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trm_jax.models.clip import towers
from trm_jax.pretrained import convert, convert_groupvit, files, hub, stated
from trm_jax.pretrained.architectures import (
    ARCHITECTURES,
    GELU,
    HUB,
    PUBLISHED,
    architecture,
    known_name,
    published_as,
)
from trm_jax.types import PyTree, UserError

__all__ = [
    "ARCHITECTURES",
    "HUB",
    "PACKAGED",
    "Located",
    "architecture",
    "load",
    "locate",
    "provenance",
    "read_metadata",
    "resolve",
    "save",
    "save_openclip",
    "tokenizer_config",
]

_FORMAT = "trm_jax"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Packaged weights: name -> file beside this module.
PACKAGED = {"glyphs": Path(__file__).parent / "weights" / "glyphs_clip.safetensors"}


class Located(NamedTuple):
    """Weights that were looked for once, so that all who ask see the same file.

    Attributes:
      name: as it was given.
      path: the local file; None for "random".
    """

    name: str
    path: Path | None


NameOrPath = str | os.PathLike | Located


def locate(name_or_path: NameOrPath) -> Located:
    """The weights of a name or path: "random", or what `resolve` accepts.

    Raises:
      UserError: as `resolve`.
    """
    if isinstance(name_or_path, Located):
        return name_or_path
    name = str(name_or_path)
    return Located(name, None if name == "random" else resolve(name))


def resolve(name_or_path: str | os.PathLike) -> Path:
    """The local file of packaged, local or hub weights; downloads the latter if need be.

    Args:
      name_or_path: "glyphs"; a name of ARCHITECTURES, which means OpenAI's file in ~/.cache/clip
        if it is there, else the hub; a file; a directory that holds one; or a hub repository
        "owner/name" or "owner/name@revision".

    Raises:
      UserError: nothing is there, or the hub cannot be reached and has no cached copy.
    """
    name = str(name_or_path)
    if name in PACKAGED:
        if not PACKAGED[name].exists():
            raise UserError(
                f"model.pretrained: the packaged weights {name!r} are missing from this "
                f"installation ({PACKAGED[name].name}); use 'random' or a path"
            )
        return PACKAGED[name]
    path = Path(name).expanduser()
    if path.is_dir():
        for candidate in hub.FILES:
            if (path / candidate).exists():
                return path / candidate
        raise UserError(f"model.pretrained: {name} holds none of {', '.join(hub.FILES)}")
    if path.exists():
        return path
    known = known_name(name)
    if known is not None:
        openai = Path("~/.cache/clip").expanduser() / PUBLISHED[known].openai_file
        if name not in HUB.values() and openai.is_file():
            return openai
        return hub.fetch(PUBLISHED[known].repository, PUBLISHED[known].revision)
    if known_name(name.removesuffix(GELU)):
        raise UserError(
            f"model.pretrained: {name!r} names towers, for model.architecture; OpenAI's weights "
            "have QuickGELU, so give a hub repository or the path of a file"
        )
    repository, _, revision = name.partition("@")
    looks_local = path.suffix in _SUFFIXES or path.is_absolute() or name.startswith(".")
    if looks_local or repository.count("/") != 1:
        raise UserError(
            f"model.pretrained: {name!r} does not exist; give 'random', an existing file, a hub "
            f"repository owner/name or one of {', '.join([*PACKAGED, *HUB])}"
        )
    path = hub.fetch(repository, revision or None)
    hub.fetch_beside(path)
    return path


def _check_hash(name: str, weights: files.Weights) -> None:
    path = weights.path
    known = None if Path(name).expanduser().exists() else known_name(name)  # as in `resolve`
    if known is not None and path.name == hub.FILES[0]:
        wanted = PUBLISHED[known].sha256
    elif known is not None or weights.container == files.TORCHSCRIPT:
        wanted = {p.openai_file: p.openai_sha256 for p in PUBLISHED.values()}.get(path.name)
    else:
        wanted = None
    if wanted and (found := files.sha256(path)) != wanted:
        raise UserError(
            f"{path} is not the published file of this name: its SHA-256 is {found[:12]}..., not "
            f"{wanted[:12]}...; fetch it again, or give the path of a file of another name"
        )


def provenance(name_or_path: NameOrPath) -> dict[str, str]:
    """Where weights come from, for the record of a run; {} for "random".

    Returns:
      "path" and "sha256" of the file; "published": what it was published as, if it is one of the
      listed files; "repository" and "commit" if it lies in the hub's cache.

    Raises:
      UserError: as `resolve`.
    """
    path = locate(name_or_path).path
    if path is None:
        return {}
    sha256 = files.sha256(path)
    published = published_as(sha256)
    return {
        "path": str(path),
        "sha256": sha256,
        **({"published": published} if published else {}),
        **hub.commit(path),
    }


def is_own(metadata: Mapping[str, str]) -> bool:
    """Whether a file with this metadata was written by `save`."""
    return metadata.get("format") == _FORMAT


def parse_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """{"config" (validated), "tokenizer", "provenance"} from the texts in a file of our format.

    Raises:
      UserError: it is in another format.
    """
    if not is_own(metadata):
        raise UserError(f"{path} carries no trm_jax metadata; it is not a file written by save()")
    parsed = {key: json.loads(metadata[key]) for key in ("config", "tokenizer", "provenance")}
    parsed["config"] = towers.validate(parsed["config"])
    return parsed


def read_metadata(name_or_path: str | os.PathLike) -> dict[str, Any]:
    """{"config" (validated), "tokenizer", "provenance"} of a file in our format.

    Raises:
      UserError: the file is missing or is in another format.
    """
    path = resolve(name_or_path)
    return parse_metadata(files.read_metadata(path), path)


def tokenizer_config(name_or_path: NameOrPath) -> dict[str, Any] | None:
    """The tokenizer's config that a file in our format carries; None for "random" and others.

    Raises:
      UserError: as `resolve`.
    """
    path = locate(name_or_path).path
    if path is None:
        return None
    metadata = files.read_metadata(path)
    return json.loads(metadata["tokenizer"]) if is_own(metadata) else None


def _differing(found: Any, wanted: Any, where: str = "model.clip") -> list[str]:
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return [] if found == wanted else [f"{where} ({found!r}, not {wanted!r})"]
    return [
        line
        for key in sorted(found.keys() | wanted.keys())
        for line in _differing(found.get(key), wanted.get(key), f"{where}.{key}")
    ]


def _unpinned(located: Located) -> str | None:
    """The line on weights that came from whatever commit the hub's main branch was at."""
    name, path = located
    found = hub.commit(path) if path and not Path(name).expanduser().exists() else {}
    known = known_name(name)
    if not found or (PUBLISHED[known].revision if known else "@" in name):
        return None
    repository, commit = found["repository"], found["commit"]
    origin = "is" if name == repository else f"comes from {repository}"
    return (
        f"note: {name} {origin} at commit {commit}; no commit is {'listed' if known else 'given'}, "
        f"give model.pretrained={repository}@{commit} to pin it"
    )


def load(
    name_or_path: NameOrPath, config: Any, *, say: Callable[[str], object] | None = None
) -> dict[str, PyTree] | None:
    """Variables (numpy float32) for the towers `config` describes; None for "random".

    Tensors are read one by one, so that memory holds little more than the result.

    Args:
      name_or_path: "random", or what `resolve` accepts. The format (safetensors, or torch's zip
        archives) and the naming (ours, OpenCLIP's or transformers') are found out from the file.
      config: see `trm_jax.models.clip.config.validate`.
      say: gets a line on what a run should know of weights that load: no commit is pinned, or an
        activation is assumed.

    Raises:
      UserError: the weights are missing, unreadable, not those that were published under their
        name, or made for another configuration.
    """
    located = locate(name_or_path)
    if located.path is None:
        return None
    weights = files.read(located.path)
    _check_hash(located.name, weights)
    notes = [_unpinned(located)]
    config = towers.validate(config)
    if is_own(weights.metadata):
        variables = _from_own(weights, config)
    else:
        variables = _from_others(weights, config)
        # After names and shapes: towers of another size are the greater mistake.
        if found := stated.read(weights):
            stated.check(found, config, weights.path)
        else:
            notes.append(stated.assumption(config, weights.path))
    if say is not None:
        for note in filter(None, notes):
            say(note)
    return variables


def _from_others(weights: files.Weights, config: dict[str, Any]) -> dict[str, PyTree]:
    state = convert.openclip_names(weights.tensors)
    if "visual.conv1.weight" not in state and not convert_groupvit.is_groupvit(state):
        raise UserError(
            f"model.pretrained: the tensor names of {weights.path} are neither trm_jax's, "
            "OpenCLIP's nor transformers' CLIP or GroupViT; convert the file first"
        )
    return convert.from_openclip(state, config, f"the weights of {weights.path}")


def _from_own(weights: files.Weights, config: dict[str, Any]) -> dict[str, PyTree]:
    # Where dense features add positions, by which kernel attention runs, and how often training
    # drops a branch are choices of the reader, not of the weights.
    chosen = {field: config[field] for field in ("dense_pos_embed", "attention")}
    stored = parse_metadata(weights.metadata, weights.path)["config"] | chosen
    for field in ("drop_path", "initializer_range"):  # of training, not of the weights
        if field in config["image"]:
            stored["image"] = stored["image"] | {field: config["image"][field]}
    if differing := _differing(stored, config):
        raise UserError(f"{weights.path} was made for another model: it has {', '.join(differing)}")
    wanted = {
        "/".join(key): spec
        for key, spec in convert.flatten(towers.abstract_variables(config)).items()
    }
    what = f"the weights of {weights.path}"
    convert.check_names(set(weights.tensors), set(wanted), what)
    leaves = {}
    for name, spec in wanted.items():
        convert.check_tensor(name, weights.tensors[name], spec.shape, what)
        array = np.asarray(weights.tensors[name], np.float32)
        convert.check_finite(name, array, what)
        leaves[tuple(name.split("/"))] = array
    return convert.unflatten(leaves)


def save(
    path: str | os.PathLike,
    variables: PyTree,
    *,
    config: Any,
    tokenizer: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Writes tower variables in our format, atomically (a reader sees the old file or the new).

    Args:
      path: of the .safetensors file; its directory is made if need be.
      variables: {"params": ..., "batch_stats": ...}.
      config: of the towers.
      tokenizer: JSON-able description of the tokenizer (its `to_config()`).
      provenance: JSON-able: the command, data, metrics and versions that made the weights.
    """
    tensors = {"/".join(key): leaf for key, leaf in convert.flatten(variables).items()}
    metadata = {
        "format": _FORMAT,
        "config": json.dumps(towers.validate(config), sort_keys=True),
        "tokenizer": json.dumps(dict(tokenizer), sort_keys=True),
        "provenance": json.dumps(dict(provenance), sort_keys=True),
    }
    files.write(Path(path), tensors, metadata)


def save_openclip(path: str | os.PathLike, variables: PyTree) -> None:
    """Writes tower variables as a safetensors file with OpenCLIP's names, atomically.

    OpenCLIP, and whoever reads its files, can load it; `load` gives back the same bits.

    Raises:
      UserError: as `convert.to_openclip`.
    """
    files.write(Path(path), convert.to_openclip(variables), {"format": "pt"})

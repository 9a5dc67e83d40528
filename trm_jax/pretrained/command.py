"""What `python -m trm_jax.pretrained` does: lists models, looks into files, converts them."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import safetensors

from trm_jax.data.tokenizers import ClipTokenizer
from trm_jax.models.clip import towers
from trm_jax.pretrained import convert, files, identify, registry, stated
from trm_jax.pretrained.architectures import ARCHITECTURES, GELU, PUBLISHED, published_as
from trm_jax.types import UserError

_DESCRIPTION = """Lists the known CLIP models; with files, says what they are; with --out, converts
one. Reads safetensors and torch's zip archives (OpenAI's .pt, state dicts), needs no torch and
executes nothing from a file."""
_CLIP_VOCABULARY = 49408
# See `identify.infer`; what is stated of weights may tell the first.
_ASSUMED = ("QuickGELU", "heads of 64 channels", "the last word ends a text; no shape tells")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows the usage")


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code: 0, or 2 after one line on stderr."""
    parser = _Parser(
        prog="python -m trm_jax.pretrained", description=_DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="a file of weights, or its folder")
    parser.add_argument("--out", metavar="F.safetensors", help="convert FILE to this file, float32")
    parser.add_argument(
        "--format",
        choices=("openclip", "trm_jax"),
        default="openclip",
        help="of --out: OpenCLIP's names, or ours, which carries its configuration",
    )
    try:
        options = parser.parse_args(arguments)
        if options.out is not None:
            if len(options.files) != 1:
                raise UserError(f"--out converts one FILE; {len(options.files)} are given")
            print(_convert(_local(options.files[0]), Path(options.out), options.format))
        elif not options.files:
            print(_table())
    except UserError as error:
        return _refuse(error)
    code = 0
    for name in options.files if options.out is None else ():
        try:
            print(_report(_local(name)))
        except UserError as error:
            code = _refuse(error)  # the other files are looked at all the same
    return code


def _refuse(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _local(name: str) -> Path:
    if name not in registry.PACKAGED and not Path(name).expanduser().exists():
        raise UserError(f"{name} does not exist; give the path of a file of weights")
    return registry.resolve(name)


def _table() -> str:
    rows = [("name", "parameters", "width", "input", "OpenAI's file", "hub repository")]
    for name, config in ARCHITECTURES.items():
        known = PUBLISHED[name]
        size = str(config["image"]["image_size"])
        where = known.repository + (f"@{known.revision[:12]}" if known.revision else "")
        width = str(config["embed_dim"])
        rows.append((name, f"{known.parameters:,}", width, size, known.openai_file, where))
    return _aligned(rows, right=(1, 2, 3)) + (
        f"\nwith {GELU} at its end, as in ViT-B/32{GELU}, a name means the same towers with GELU "
        "in place of QuickGELU"
    )


def _aligned(rows: Sequence[Sequence[str]], right: tuple[int, ...] = ()) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _report(path: Path) -> str:
    weights = files.read(path)
    sha256 = files.sha256(path)
    dtypes = Counter(str(tensor.dtype) for tensor in weights.tensors.values())
    rows = [
        ("format", f"{weights.container}, {_naming(weights)} names"),
        ("sha256", sha256),
        ("published", _published(path, sha256)),
        ("tensors", str(len(weights.tensors))),
        ("dtype", ", ".join(f"{name} ({count})" for name, count in dtypes.most_common())),
        ("parameters", f"{_parameters(weights):,}"),
        *_architecture(weights),
    ]
    return f"{path}\n" + _aligned([("", *row) for row in rows])


def _naming(weights: files.Weights) -> str:
    if registry.is_own(weights.metadata):
        return "trm_jax's"
    if any(name.startswith("vision_model.") for name in weights.tensors):
        return "transformers'"
    return "OpenCLIP's" if "visual.conv1.weight" in weights.tensors else "unknown"


def _published(path: Path, sha256: str) -> str:
    if published := published_as(sha256):
        return f"yes, {published}"
    if path.name in {known.openai_file for known in PUBLISHED.values()}:
        return f"no: it is not the {path.name} that OpenAI published"
    return "no: none of the files whose hashes are known"


def _shapes(weights: files.Weights) -> dict[str, tuple[int, ...]]:
    state = convert.openclip_names(weights.tensors)
    return {name: tuple(array.shape) for name, array in state.items()}


def _parameters(weights: files.Weights) -> int:
    if registry.is_own(weights.metadata):
        shapes = {k: v.shape for k, v in weights.tensors.items() if k.startswith("params/")}
    else:
        shapes = {k: v for k, v in _shapes(weights).items() if ".running_" not in k}
    return sum(math.prod(shape) for shape in shapes.values())


def _architecture(weights: files.Weights) -> list[tuple[str, str]]:
    """Rows on which architecture fits, and on what is missing or too much."""
    if registry.is_own(weights.metadata):
        config = registry.parse_metadata(weights.metadata, weights.path)["config"]
        return [("architecture", _title(config))]
    shapes = _shapes(weights)
    rows, difference = [], None
    try:
        config, known = _inferred(weights, shapes)
    except UserError as error:
        rows.append(("architecture", f"none: {error}"))
    else:
        difference = identify.compare(shapes, convert.openclip_shapes(config))
        rows += [("architecture", _title(config)), ("assumed", _assumed(known))]
        if known:
            rows.append(("activation", f"{config['text']['activation']}, says {known.source}"))
        if identify.named(config) or not any(difference):
            return rows + _difference(difference)
    if near := identify.nearest(shapes):
        return [*rows, ("nearest", near[0]), *_difference(near[1])]
    return rows + (_difference(difference) if difference else [])


def _inferred(
    weights: files.Weights, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Any], stated.Stated | None]:
    """The configuration by shapes and by what is stated, and the latter."""
    config, known = identify.infer(shapes), stated.read(weights)
    return stated.applied(known, config), known


def _assumed(known: stated.Stated | None) -> str:
    return ", ".join(_ASSUMED[1:] if known else _ASSUMED)


def _title(config: dict[str, Any]) -> str:
    if name := identify.named(config):
        return name
    fields = [("embed_dim", config["embed_dim"])]
    if config["projector_hidden"]:
        fields.append(("projector_hidden", config["projector_hidden"]))
    for tower in ("image", "text"):
        hidden = ("kind", "mean", "std", "activation", "eos_id", "drop_path")
        fields += [(f"{tower}.{k}", v) for k, v in config[tower].items() if k not in hidden]
        if config[tower].get("activation") == "gelu":
            fields.append((f"{tower}.activation", "gelu"))
    kinds = {"vit": "ViT", "resnet": "ResNet", "groupvit": "GroupViT"}
    kind = kinds.get(config["image"]["kind"], "feature projection")
    listed = ", ".join(f"{name} {value}" for name, value in fields)
    return f"a CLIP {kind}, none of the named ones: {listed}"


def _difference(difference: identify.Difference) -> list[tuple[str, str]]:
    return [
        ("missing", _some(difference.missing)),
        ("left over", _some(difference.left_over)),
        ("other shape", _some(difference.reshaped)),
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more or "nothing"


def _convert(path: Path, out: Path, form: str) -> str:
    if out.suffix != ".safetensors":
        raise UserError(f"--out={out} must end in .safetensors")
    described = _described(files.read(path))
    config, assumed = described["config"], described.pop("assumed")
    if form == "trm_jax" and described["tokenizer"] is None:
        raise UserError(
            f"{path} has a vocabulary of {config['text']['vocab_size']} words, not CLIP's "
            f"{_CLIP_VOCABULARY}: its tokenizer is unknown; use --format=openclip"
        )
    variables = registry.load(path, config)
    assert variables is not None
    try:
        if form == "trm_jax":
            registry.save(out, variables, **described)
        else:
            registry.save_openclip(out, variables)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"--out={out} cannot be written ({error})") from None
    count = towers.count_parameters(variables["params"])
    note = f"; assumed: {assumed}" if assumed and form == "trm_jax" else ""
    return f"{out}: {_title(config)}, {count:,} parameters, float32, {form} names{note}"


def _described(weights: files.Weights) -> dict[str, Any]:
    """What `registry.save` wants to know, and which parts of the config are "assumed"."""
    if registry.is_own(weights.metadata):
        return registry.parse_metadata(weights.metadata, weights.path) | {"assumed": ""}
    shapes = _shapes(weights)
    try:
        config, known = _inferred(weights, shapes)
    except UserError as error:
        raise UserError(f"{weights.path} cannot be converted: {error}") from None
    difference = identify.compare(shapes, convert.openclip_shapes(config))
    if any(difference):
        rows = ", ".join(f"{key} {value}" for key, value in _difference(difference))
        raise UserError(f"{weights.path} is not quite {_title(config)}: {rows}; take a whole file")
    provenance = registry.provenance(weights.path)
    is_clip = config["text"]["vocab_size"] == _CLIP_VOCABULARY
    return {
        "config": config,
        "tokenizer": ClipTokenizer().to_config() if is_clip else None,
        "provenance": provenance,
        "assumed": "" if "published" in provenance else _assumed(known),
    }

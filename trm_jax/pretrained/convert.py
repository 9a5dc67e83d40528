"""Torch-named CLIP state dicts (numpy arrays) to and from the variables of ClipTowers.

Two namings are read: OpenAI's, which OpenCLIP kept ("visual.layer1.0.conv1.weight",
"transformer.resblocks.0.attn.in_proj_weight"), and transformers' CLIPModel ("vision_model.encoder
.layers.0.self_attn.q_proj.weight"; ViT only). The first is also written. Both directions move
numbers without arithmetic, so a float32 round trip is bit-exact.

Names map one to one, but for in_proj, which stacks q_proj, k_proj and v_proj of our blocks.

A GroupViT goes by the names of transformers' GroupViTModel throughout (see `convert_groupvit`).
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from trm_jax.models.clip import towers
from trm_jax.pretrained import convert_groupvit
from trm_jax.pretrained.lazy import LazyArray
from trm_jax.types import PyTree, UserError

Path = tuple[str, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_IGNORED = re.compile(
    r"(.*\.)?(num_batches_tracked|position_ids|attn_mask|input_resolution|context_length"
    r"|vocab_size)"
)
_TRANSFORMERS = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def flatten(variables: PyTree) -> dict[Path, Any]:
    """Leaves of nested dicts by their key path, in a fixed order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, PyTree]:
    """The nested dicts that `flatten` took apart."""
    tree: dict[str, PyTree] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _torch_name(path: Path) -> str:
    """OpenCLIP's name of a variable; q_proj, k_proj and v_proj of a block have one in common."""
    parts = [
        {"image": "visual", "downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}.get(
            part, re.sub(r"^(layer\d+)_", r"\1.", part)
        )
        for part in path[1:]
        if part != "text"
    ]
    parts = [re.sub(r"^resblocks_", "transformer.resblocks.", part) for part in parts]
    parts[-1] = _LEAVES.get(parts[-1], parts[-1])
    name = ".".join(parts)
    name = re.sub(r"(\.resblocks\.\d+\.attn\.)[qkv]_proj\.", r"\1in_proj_", name)
    return name + ".weight" if name == "token_embedding" else name


def _places(leaves: Mapping[Path, Any]) -> dict[str, list[Path]]:
    """OpenCLIP's names -> the variables they are made of: one, or query, key and value."""
    if convert_groupvit.has_groups(leaves):
        return {convert_groupvit.name_of(path): [path] for path in leaves}
    places: dict[str, list[Path]] = {}
    for path in leaves:
        places.setdefault(_torch_name(path), []).append(path)
    return {
        name: sorted(paths, key=lambda path: "qkv".index(path[-2][0])) if len(paths) > 1 else paths
        for name, paths in places.items()
    }


def _to_ours(name: str, path: Path, array: np.ndarray) -> np.ndarray:
    if convert_groupvit.has_batch_axis(name):
        array = array[0]
    if path[-1] == "kernel":
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused
        return np.array(array, np.float32, order="C")


def _to_torch(name: str, path: Path, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if convert_groupvit.has_batch_axis(name):
        array = array[None]
    if path[-1] == "kernel":
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return np.array(array, order="C")


def _torch_shape(name: str, paths: list[Path], shape: tuple[int, ...]) -> tuple[int, ...]:
    if convert_groupvit.has_batch_axis(name):
        return (1, *shape)
    if paths[0][-1] == "kernel":
        shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
    return (len(paths) * shape[0], *shape[1:]) if len(paths) > 1 else shape


def _some(names: set[str]) -> str:
    shown = sorted(names)[:4]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def check_names(found: set[str], wanted: set[str], what: str) -> None:
    """Raises one UserError that lists the missing and the unexpected names."""
    problems = []
    if wanted - found:
        problems.append(f"lack {_some(wanted - found)}")
    if found - wanted:
        problems.append(f"have the unexpected {_some(found - wanted)}")
    if problems:
        raise UserError(
            f"{what} {' and '.join(problems)}; set model.architecture to that of the "
            "weights (python -m trm_jax.pretrained FILE tells it)"
        )


def check_tensor(name: str, tensor: Any, shape: tuple[int, ...], what: str) -> None:
    """Raises a UserError that names the tensor if it has another shape or holds no floats."""
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{what}: {name} is {list(tensor.shape)}, the configured model needs {list(shape)}; "
            "set model.architecture to that of the weights (python -m trm_jax.pretrained FILE says "
            "which)"
        )
    if not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype == ml_dtypes.bfloat16):
        raise UserError(
            f"{what}: {name} is {tensor.dtype}, not floating-point; take weights that are not "
            "quantised"
        )


def check_finite(name: str, array: np.ndarray, what: str) -> None:
    """Raises a UserError that names the tensor if it holds an infinite number or NaN."""
    if not np.isfinite(array).all():
        raise UserError(
            f"{what}: {name} has numbers that are not finite; the file is damaged or its training "
            "diverged, take another"
        )


def openclip_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` under OpenCLIP's names, whether it had those or transformers', without counters.

    A GroupViT keeps transformers' names.

    Args:
      state: name -> array, or anything with shape and dtype that `numpy.asarray` reads.
    """
    is_clip = not convert_groupvit.is_groupvit(state)
    if is_clip and any(name.startswith("vision_model.") for name in state):
        state = _renamed(state)
    return {name: array for name, array in state.items() if not _IGNORED.fullmatch(name)}


def _renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {}
    for name, array in state.items():
        new = name
        for pattern, replacement in _TRANSFORMERS:
            new = re.sub(pattern, replacement, new)
        # CLIPModel keeps both projections as Linear weights [d, w], CLIP as matrices [w, d].
        is_projection = name in ("visual_projection.weight", "text_projection.weight")
        renamed[new] = np.asarray(array).T if is_projection else array
    for name in list(renamed):
        match = re.fullmatch(r"(.*\.resblocks\.\d+\.attn\.)q_proj\.(weight|bias)", name)
        parts = [f"{match[1]}{letter}_proj.{match[2]}" for letter in "qkv"] if match else []
        if match and all(part in renamed for part in parts):
            arrays = [renamed.pop(part) for part in parts]
            renamed[f"{match[1]}in_proj_{match[2]}"] = _stacked(arrays)
    return renamed


def _stacked(arrays: list[Any]) -> LazyArray:
    shape = (sum(array.shape[0] for array in arrays), *arrays[0].shape[1:])
    return LazyArray(
        shape, arrays[0].dtype, lambda: np.concatenate([np.asarray(array) for array in arrays])
    )


def openclip_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the OpenCLIP state dict of the towers that `config` describes.

    Of a GroupViT: of transformers' state dict.
    """
    specs = flatten(towers.abstract_variables(config))
    return {
        name: _torch_shape(name, paths, specs[paths[0]].shape)
        for name, paths in _places(specs).items()
    }


def from_openclip(
    state: Mapping[str, Any], config: Any, what: str = "the weights"
) -> dict[str, PyTree]:
    """Variables of the towers `config` describes, float32, from a published state dict.

    Names, shapes and dtypes are checked first; then one array after the other is read, so that
    memory holds little more than the result.

    Args:
      state: name -> array of any float dtype, or anything with shape and dtype that
        `numpy.asarray` reads, by OpenAI's and OpenCLIP's names, or transformers' of a GroupViT;
        counters and buffers are ignored.
      config: see `trm_jax.models.clip.config.validate`.
      what: how messages call the weights.

    Raises:
      UserError: names are missing or unexpected, a shape differs, a tensor holds integers or
        numbers that are not finite.
    """
    state = {name: array for name, array in state.items() if not _IGNORED.fullmatch(name)}
    specs = flatten(towers.abstract_variables(config))
    places = _places(specs)
    if convert_groupvit.is_groupvit(state) and not convert_groupvit.has_groups(specs):
        raise UserError(f"{what} are those of a GroupViT; set model.architecture=groupvit")
    check_names(set(state), set(places), what)
    for name, paths in places.items():
        check_tensor(name, state[name], _torch_shape(name, paths, specs[paths[0]].shape), what)
    leaves = {}
    for name, paths in places.items():
        array = np.asarray(state[name])
        parts = np.split(array, len(paths)) if len(paths) > 1 else [array]
        for path, part in zip(paths, parts, strict=True):
            leaves[path] = _to_ours(name, path, part)
            check_finite(name, leaves[path], what)
    return unflatten({path: leaves[path] for path in specs})


def from_transformers(state: Mapping[str, Any], config: Any) -> dict[str, PyTree]:
    """Variables of ViT towers, float32, from the names of transformers' CLIPModel.

    Raises:
      UserError: as `from_openclip`, whose names the message has.
    """
    return from_openclip(_renamed(state), config)


def to_openclip(variables: PyTree) -> dict[str, np.ndarray]:
    """The OpenCLIP state dict (names, layouts) of tower variables; the dtype is kept.

    Raises:
      UserError: OpenCLIP has no names for the image tower (a feature projection, a GroupViT).
    """
    leaves = flatten(variables)
    kind = None
    if ("params", "image", "ln", "scale") in leaves:
        kind = "features"
    elif convert_groupvit.has_groups(leaves):
        kind = "groupvit"
    if kind:
        raise UserError(
            f"model.clip.image.kind '{kind}' has no OpenCLIP form; save in our own format"
        )
    return _to_state(leaves)


def to_transformers(variables: PyTree) -> dict[str, np.ndarray]:
    """The state dict of transformers' GroupViTModel, without counters; the dtype is kept.

    Raises:
      UserError: these are no towers of a GroupViT with projectors.
    """
    leaves = flatten(variables)
    is_groupvit = convert_groupvit.has_groups(leaves)
    if not is_groupvit or ("params", "image_projector", "bn", "scale") not in leaves:
        raise UserError(
            "only a GroupViT with model.clip.projector_hidden has the form of transformers' "
            "GroupViTModel; save in our own format"
        )
    return _to_state(leaves)


def _to_state(leaves: Mapping[Path, Any]) -> dict[str, np.ndarray]:
    state = {}
    for name, paths in _places(leaves).items():
        arrays = [_to_torch(name, path, leaves[path]) for path in paths]
        state[name] = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    return state

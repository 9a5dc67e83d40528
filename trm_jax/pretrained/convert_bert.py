"""Published weights of a BERT, by the names of transformers' BertModel, to those of BertEncoder.

Files of larger models (BertForPreTraining and its like) hold the same under the prefix "bert.";
their heads, and the pooler, are passed over. Numbers are moved without arithmetic.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from trm_jax.models.matching.bert import BertEncoder
from trm_jax.pretrained import files
from trm_jax.pretrained.convert import check_finite, flatten, unflatten
from trm_jax.pretrained.hub import TRANSFORMERS_CONFIG
from trm_jax.types import PyTree, UserError

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
# What we compute; a config that leaves a field out means the same.
_KIND = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
}
_FILES = ("model.safetensors", "pytorch_model.bin")
_LEAVES = {"kernel": "weight", "scale": "weight"}
_MODULES = {
    "word_embedding": "embeddings.word_embeddings.weight",
    "position_embedding": "embeddings.position_embeddings.weight",
    "type_embedding": "embeddings.token_type_embeddings.weight",
    "norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_PREFIX = "bert."
_IGNORED = re.compile(r"(pooler|cls|classifier|qa_outputs)\..*|embeddings\.position_ids")
_REMEDY = f"take the weights and the {TRANSFORMERS_CONFIG} of one BERT"


def read_config(path: Path) -> dict[str, int]:
    """The sizes of a BERT, `config` of BertEncoder, from the config.json of transformers.

    Args:
      path: of the weights, beside which it lies, or of their folder.

    Raises:
      UserError: there is none, a size is missing, or it is of a model that BertEncoder is not.
    """
    file = (path if path.is_dir() else path.parent) / TRANSFORMERS_CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file}, which says the sizes of a BERT, cannot be read ({error.strerror}); put it "
            "beside the weights"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is no {TRANSFORMERS_CONFIG} of transformers; fetch it again")
    for field, wanted in _KIND.items():
        if (found := content.get(field, wanted)) != wanted:
            raise UserError(
                f"{file}: {field} {found!r} is not supported, a BERT with {wanted!r} is; take "
                "other weights"
            )
    for field in _SIZES:
        size = content.get(field)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"{file}: {field} is {size!r}, not a number from 1; fetch it again")
    return {field: content[field] for field in _SIZES}


def read(path: Path) -> dict[str, PyTree]:
    """The parameters (numpy float32) of a BertEncoder, whose sizes config.json beside it says.

    Args:
      path: of a safetensors file or a zip archive of torch, or of the folder that holds it as
        transformers names it.

    Raises:
      UserError: nothing is there, it cannot be read, or weights and sizes do not belong together.
    """
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).exists()]
        if not found:
            raise UserError(f"{path} holds none of {', '.join(_FILES)}")
        path = found[0]
    return from_transformers(files.read(path).tensors, read_config(path), str(path))


def from_transformers(
    state: Mapping[str, Any], config: Mapping[str, int], what: str = "the weights"
) -> dict[str, PyTree]:
    """The parameters (numpy float32) of a BertEncoder from a state dict of transformers.

    Names, shapes and dtypes are checked first; then one array after the other is read.

    Args:
      state: name -> array, or anything with shape and dtype that `numpy.asarray` reads.
      config: the sizes, see `read_config`.
      what: names the weights in errors.

    Raises:
      UserError: a tensor is missing, unexpected, of another shape, no floats or not finite.
    """
    state = _encoder_part(state)
    specs = _specs(config)
    names = {_name_of(path): path for path in specs}
    _check_names(set(state), set(names), what)
    for name, path in names.items():
        shape = specs[path].shape
        _check_tensor(name, state[name], shape[::-1] if path[-1] == "kernel" else shape, what)
    leaves = {}
    for name, path in names.items():
        array = np.asarray(state[name])
        array = array.T if path[-1] == "kernel" else array
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            leaves[path] = np.array(array, np.float32, order="C")
        check_finite(name, leaves[path], what)
    return unflatten(leaves)


def _specs(config: Mapping[str, int]) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shapes of the parameters by path; nothing is computed."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = jax.eval_shape(BertEncoder(config).init, jax.random.key(0), tokens, tokens == 0)
    return flatten(variables["params"])


def _name_of(path: tuple[str, ...]) -> str:
    """transformers' name of a parameter."""
    if len(path) == 1:
        return _MODULES[path[0]]
    leaf = _LEAVES.get(path[-1], path[-1])
    if block := re.fullmatch(r"blocks_(\d+)", path[0]):
        return f"encoder.layer.{block[1]}.{_MODULES['.'.join(path[1:-1])]}.{leaf}"
    return f"{_MODULES[path[0]]}.{leaf}"


def _encoder_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the encoder by BertModel's names, without what lies around it."""
    if any(name.startswith(_PREFIX) for name in state):
        state = {
            name.removeprefix(_PREFIX): array
            for name, array in state.items()
            if name.startswith(_PREFIX)
        }
    # The first published weights call scale and shift of a LayerNorm as TensorFlow does.
    return {
        re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name)): array
        for name, array in state.items()
        if not _IGNORED.fullmatch(name)
    }


def _check_names(found: set[str], wanted: set[str], what: str) -> None:
    problems = []
    if wanted - found:
        problems.append(f"lack {_some(wanted - found)}")
    if found - wanted:
        problems.append(f"have the unexpected {_some(found - wanted)}")
    if problems:
        raise UserError(f"{what}: the tensors {' and '.join(problems)}; {_REMEDY}")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:4]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _check_tensor(name: str, tensor: Any, shape: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{what}: {name} is {list(tensor.shape)}, the sizes in {TRANSFORMERS_CONFIG} need "
            f"{list(shape)}; {_REMEDY}"
        )
    if not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype == ml_dtypes.bfloat16):
        raise UserError(
            f"{what}: {name} is {tensor.dtype}, not floating-point; take weights that are not "
            "quantised"
        )

"""Files of weights, whatever wrote them: found out by content, read lazily, written atomically."""

import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (makes numpy know "bfloat16", which safetensors asks it for)
import numpy as np
import safetensors
import safetensors.numpy

from trm_jax.pretrained import torch_archive
from trm_jax.pretrained.lazy import LazyArray
from trm_jax.types import UserError

SAFETENSORS = "safetensors"
TORCHSCRIPT = "TorchScript archive"
STATE_DICT = "torch state dict"

_DTYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    **{f"{kind}{bits}": f"{word}{bits}"
       for kind, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}  # fmt: skip
_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_AGAIN = "fetch it again"


class Weights(NamedTuple):
    """An open file of weights.

    Attributes:
      path: where it lies.
      container: SAFETENSORS, TORCHSCRIPT or STATE_DICT.
      tensors: by the names in the file; `numpy.asarray` reads one.
      metadata: texts that a safetensors file may carry.
    """

    path: Path
    container: str
    tensors: dict[str, LazyArray]
    metadata: dict[str, str]


def read(path: Path) -> Weights:
    """Opens a safetensors file or a zip archive of torch; reads names and shapes only.

    Raises:
      UserError: the file is something else, or is damaged.
    """
    head = _head(path)
    if head.startswith(b"PK\x03\x04"):
        archive = torch_archive.read(path)
        container = TORCHSCRIPT if archive.is_script else STATE_DICT
        return Weights(path, container, archive.tensors, {})
    file = _open_safetensors(path, head)
    tensors = {}
    for name in file.keys():  # noqa: SIM118 (it is no dict)
        part = file.get_slice(name)
        code = part.get_dtype()
        if code not in _DTYPES:
            raise UserError(f"{path}: tensor {name!r} has the dtype {code}, which is not supported")
        read_one = functools.partial(_read_safetensor, file, name, path)
        tensors[name] = LazyArray(tuple(part.get_shape()), _DTYPES[code], read_one)
    return Weights(path, SAFETENSORS, tensors, file.metadata() or {})


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries; none if the file is an archive of torch.

    Raises:
      UserError: as `read`.
    """
    head = _head(path)
    if head.startswith(b"PK\x03\x04"):
        return {}
    return _open_safetensors(path, head).metadata() or {}


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file so that a reader sees the old file or the new one, never a part.

    Args:
      path: of the file; its directory is made if need be.
      tensors: by name; contiguous ones are not copied.
      metadata: texts for the header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.close(handle)
        contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
        safetensors.numpy.save_file(contiguous, temporary, metadata=metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits; read once as long as the file stays as it is."""
    try:
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=8)
def _sha256(path: Path, size: int, changed: int) -> str:
    del size, changed  # they tell apart what lies at one path
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _head(path: Path) -> bytes:
    """The first bytes of a file, after a look for what is saved as weights by mistake."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if not head:
        raise UserError(f"{path} is empty; {_AGAIN}")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of git-lfs, not the weights; run `git lfs pull`")
    # The first byte of a safetensors file, which belongs to a length, may be "<" as well.
    if head[8:9] != b"{" and head.lstrip().startswith(b"<"):
        raise UserError(f"{path} is a web page, perhaps of a failed download; {_AGAIN}")
    if head.startswith(_LEGACY_TORCH) or head[257:262] == b"ustar":
        raise UserError(
            f"{path} is in torch's format of before 1.6, which is not read; load it with torch and "
            "save its state_dict() with torch.save or safetensors"
        )
    return head


def _open_safetensors(path: Path, head: bytes) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        if head[8:9] == b"{":
            raise UserError(f"{path} is cut off or damaged ({error}); {_AGAIN}") from None
        raise UserError(
            f"{path} is neither a safetensors file nor a zip archive of torch; {_AGAIN}"
        ) from None


def _read_safetensor(file: Any, name: str, path: Path) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged at {name!r} ({error}); {_AGAIN}") from None

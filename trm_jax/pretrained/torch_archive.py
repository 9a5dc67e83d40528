"""Torch's zip archives as named arrays, without torch.

torch.jit.save (OpenAI's RN50.pt ... ViT-L-14-336px.pt) and torch.save (state dicts) both write a
zip file: NAME/data.pkl is a pickle of the objects (see torch_pickle.py), NAME/data/0, 1, ... are
the raw storages that its tensors view, NAME/byteorder says in which order their bytes are.
"""

import functools
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trm_jax.pretrained.lazy import LazyArray
from trm_jax.pretrained.torch_pickle import Module, Refused, Tensor, interpret
from trm_jax.types import UserError

# Far above any model: the data.pkl of RN50x64 has a few hundred kilobytes.
_MAX_PICKLE = 8 << 20
_MAX_NAMES = 100_000
_MAX_DEPTH = 32


class Archive(NamedTuple):
    """What a file of torch holds.

    Attributes:
      is_script: it is a TorchScript module; otherwise a state dict.
      tensors: by the names that torch's state_dict() gives them.
    """

    is_script: bool
    tensors: dict[str, LazyArray]


def read(path: Path) -> Archive:
    """The tensors of a torch zip archive; their numbers are read when they are asked for.

    Args:
      path: a file written by torch.jit.save, or by torch.save (torch 1.6 and later) of a state
        dict, alone or as the "state_dict" of a training checkpoint. "module.", which
        DataParallel puts before every name, is dropped.

    Raises:
      UserError: the file is no such archive, is damaged, or its pickle holds more than tensors.
    """
    try:
        reader = _Reader(path)
        root = interpret(reader.pickle())
        tensors = {name: reader.tensor(tensor) for name, tensor in _names(root)}
    except Refused as refused:
        raise UserError(f"{path} {refused}") from None
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; save the model's state_dict() in it")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return Archive(isinstance(root, Module), tensors)


def _names(root: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for all tensors of a module and its submodules, or of a state dict."""
    if isinstance(root, dict):
        state = root.get("state_dict")
        left = [("", state if isinstance(state, dict) else root, 0)]
    elif isinstance(root, Module):
        left = [("", root.state, 0)]
    else:
        raise Refused("holds neither a TorchScript module nor a state dict")
    seen = 0
    while left:
        prefix, attributes, depth = left.pop()
        for name, value in attributes.items() if isinstance(attributes, dict) else ():
            seen += 1
            # Modules may share or even hold each other: the number of names is what is bounded.
            if not isinstance(name, str) or seen > _MAX_NAMES or depth > _MAX_DEPTH:
                raise Refused("nests or names its tensors as no model does")
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, Module) and isinstance(root, Module):
                left.append((f"{prefix}{name}.", value.state, depth + 1))


class _Reader:
    """The records of an archive."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            raise Refused(f"cannot be read ({error.strerror})") from None
        except (zipfile.BadZipFile, ValueError, RuntimeError, struct.error):
            raise Refused("is a cut off or damaged zip archive; fetch it again") from None
        self._records = {info.filename: info for info in self._zip.infolist()}
        pickles = [name for name in self._records if name.endswith("/data.pkl")]
        if not pickles:
            raise Refused("is a zip archive, but not one of torch: it holds no data.pkl")
        self._root = min(pickles, key=len).removesuffix("data.pkl")
        self._is_swapped = self._byte_order() != sys.byteorder
        self._last: tuple[str, bytes] = ("", b"")

    def pickle(self) -> bytes:
        """The bytes of data.pkl."""
        if self._record("data.pkl").file_size > _MAX_PICKLE:
            raise Refused(f"has a data.pkl of more than {_MAX_PICKLE >> 20} MiB; it is no model")
        return self._content("data.pkl")

    def tensor(self, tensor: Tensor) -> LazyArray:
        """The array of a tensor, if its storage is there in full."""
        storage = tensor.storage
        if self._record(f"data/{storage.key}").file_size < storage.count * storage.dtype.itemsize:
            raise Refused(f"is damaged: data/{storage.key[:80]} is shorter than its tensors")
        return LazyArray(tensor.shape, storage.dtype, functools.partial(self._view, tensor))

    def _view(self, tensor: Tensor) -> np.ndarray:
        storage = tensor.storage
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, storage.dtype)
        size = storage.dtype.itemsize
        unsigned = np.frombuffer(self._storage(storage.key), f"u{size}", storage.count)
        numbers = (unsigned.byteswap() if self._is_swapped else unsigned).view(storage.dtype)
        # The stride of an axis of length one means nothing and may be any number.
        pairs = zip(tensor.shape, tensor.strides, strict=True)
        strides = [stride * size if length > 1 else 0 for length, stride in pairs]
        return np.lib.stride_tricks.as_strided(
            numbers[tensor.offset :], tensor.shape, strides, writeable=False
        )

    def _storage(self, key: str) -> bytes:
        # Several tensors may view one storage; they follow each other in the file.
        if self._last[0] != key:
            try:
                self._last = (key, self._content(f"data/{key}"))
            except Refused as refused:
                raise UserError(f"{self._path} {refused}") from None
        return self._last[1]

    def _byte_order(self) -> str:
        if f"{self._root}byteorder" not in self._records:
            return "little"  # files older than this record
        order = self._content("byteorder").decode("latin-1").strip()
        if order not in ("little", "big"):
            raise Refused(f"has the unknown byte order {order[:20]!r}")
        return order

    def _record(self, name: str) -> zipfile.ZipInfo:
        record = self._records.get(self._root + name)
        if record is None:
            raise Refused(f"lacks the record {name[:80]!r}; fetch it again")
        # torch compresses nothing but code; a compressed record could unpack to any size.
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise Refused(f"has a compressed record {name[:80]!r}, torch writes none; save it anew")
        if record.file_size != record.compress_size:
            raise Refused(f"is damaged in the record {name[:80]!r}; fetch it again")
        return record

    def _content(self, name: str) -> bytes:
        try:
            return self._zip.read(self._record(name))
        except (OSError, EOFError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile):
            raise Refused(f"is damaged in the record {name[:80]!r}; fetch it again") from None

"""The objects that a pickle of torch describes, without unpickling it.

A pickle is a program. Here it is read, never run: the interpreter below knows only the opcodes that
put together numbers, strings, lists, dicts, modules and references to storages, on values of its
own. It imports nothing, calls nothing that the file names and sets no attribute; whatever else a
file asks for is refused with one line.
"""

import math
import pickletools
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "ShortStorage": np.dtype(np.int16),
}
_MAX_COUNT = 1 << 40  # of any length, stride or number of values


class Refused(Exception):
    """Why an archive is not read, as the end of a sentence that begins with its path."""


class Module:
    """An object of a TorchScript class: its attributes by name, once they are known."""

    def __init__(self):
        self.state: Any = None


class Storage:
    """`count` raw numbers, kept in the record data/KEY."""

    def __init__(self, key: str, dtype: np.dtype, count: int):
        self.key = key
        self.dtype = dtype
        self.count = count


class Tensor:
    """A strided view of a storage; offset and strides count numbers, not bytes."""

    def __init__(
        self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ):
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.strides = strides


class _Global:
    """The name of something that the pickle would import."""

    def __init__(self, name: str):
        self.name = name


class _Mark:
    """Where a group of values begins on the stack."""


def interpret(pickle: bytes) -> Any:
    """The object that `pickle` describes: dicts, lists, tuples, plain values and the classes here.

    Raises:
      Refused: the pickle is damaged, or needs more than tensors need.
    """
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of genops, about names with odd backslashes
            for opcode, argument, _ in pickletools.genops(pickle):
                machine.step(opcode.name, argument)
        return machine.pop()
    except (ValueError, IndexError, KeyError, TypeError, OverflowError):
        # genops raises ValueError for bytes that are no pickle; the others come from a program
        # that takes what it did not put.
        raise Refused("has a damaged pickle; fetch it again") from None


class _Machine:
    """The stack and the memo of a pickle under way."""

    def __init__(self):
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Follows one opcode of `pickletools`."""
        stack = self._stack
        if opcode in _ARGUMENTS:
            stack.append(argument)
        elif opcode in _NEW:
            stack.append(_NEW[opcode]())
        elif opcode in _TUPLES:
            stack.append(tuple([self.pop() for _ in range(_TUPLES[opcode])][::-1]))
        elif opcode in _STEPS:
            _STEPS[opcode](self)
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode == "GLOBAL":
            self._import(*argument.split(" ", 1))
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"uses {opcode} in its pickle, which no weights need")

    def pop(self) -> Any:
        """The value on top, which is taken off."""
        return self._stack.pop()

    def _group(self) -> list[Any]:
        """The values above the last mark, which is taken off with them."""
        group = []
        while not isinstance(value := self.pop(), _Mark):
            group.append(value)
        return group[::-1]

    def memoize(self) -> None:
        """MEMOIZE."""
        self._memo[len(self._memo)] = self._stack[-1]

    def tuple(self) -> None:
        """TUPLE."""
        self._stack.append(tuple(self._group()))

    def append(self) -> None:
        """APPEND."""
        self._extend([self.pop()])

    def appends(self) -> None:
        """APPENDS."""
        self._extend(self._group())

    def set_item(self) -> None:
        """SETITEM."""
        value, key = self.pop(), self.pop()
        self._update([key, value])

    def set_items(self) -> None:
        """SETITEMS."""
        self._update(self._group())

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise Refused("fills something that is no list")
        self._stack[-1].extend(values)

    def _update(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict):
            raise Refused("fills something that is no dict")
        self._stack[-1].update(_rebuild_dict(zip(items[::2], items[1::2], strict=True)))

    def stack_global(self) -> None:
        """STACK_GLOBAL."""
        name, module = self.pop(), self.pop()
        self._import(module, name)

    def _import(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        is_storage = module in ("torch", "torch.cuda") and name in _DTYPES
        if not (is_storage or full in _REBUILD or _is_script_class(full)):
            raise Refused(
                f"names {full[:80]!r}, which no weights need; nothing was run: if you trust the "
                "file, save its state_dict() alone"
            )
        self._stack.append(_Global(full))

    def new(self) -> None:
        """NEWOBJ."""
        arguments, made = self.pop(), self.pop()
        if not (isinstance(made, _Global) and _is_script_class(made.name)) or arguments != ():
            raise Refused("makes an object that is no TorchScript module")
        self._stack.append(Module())

    def build(self) -> None:
        """BUILD."""
        state, target = self.pop(), self._stack[-1]
        if isinstance(target, Module):
            target.state = state
        elif not isinstance(target, dict):  # a state dict carries versions of modules: no matter
            raise Refused("sets attributes of something that is no module")

    def reduce(self) -> None:
        """REDUCE."""
        arguments, called = self.pop(), self.pop()
        rebuild = _REBUILD.get(called.name) if isinstance(called, _Global) else None
        if rebuild is None or not isinstance(arguments, tuple):
            raise Refused("calls something that makes no tensor")
        self._stack.append(rebuild(*arguments))

    def persistent(self) -> None:
        """BINPERSID."""
        kind, type_, key, _, count = self.pop()
        name = type_.name.rpartition(".")[2] if isinstance(type_, _Global) else ""
        if kind != "storage" or name not in _DTYPES or not isinstance(key, str):
            raise Refused("refers to something that is no storage")
        if not _is_count(count):
            raise Refused("has a storage of an impossible size")
        self._stack.append(Storage(key, _DTYPES[name], count))


def _is_script_class(name: str) -> bool:
    return name.startswith("__torch__.")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > 32:
        raise Refused("describes a tensor in an impossible way")
    if not all(_is_count(number) for number in (offset, *shape, *strides)):
        raise Refused("has a tensor of an impossible size")
    if 0 in shape:
        inside = math.prod(max(length, 1) for length in shape) <= _MAX_COUNT
    else:
        pairs = zip(shape, strides, strict=True)
        last = offset + sum((length - 1) * stride for length, stride in pairs)
        inside = last < storage.count and math.prod(shape) <= storage.count
    if not inside:
        raise Refused("has a tensor larger than its storage")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_dict(pairs: Any = ()) -> dict[Any, Any]:
    rebuilt = {}
    for key, value in pairs:
        # No tuples: nested deep enough, the hash of one overflows the stack of the process.
        if not isinstance(key, str | int):
            raise Refused("has a dict whose keys are no names")
        rebuilt[key] = value
    return rebuilt


def _rebuild_same(value: Any, *_: Any) -> Any:
    return value


# All that a pickle may call: functions of ours that look at the arguments and call nothing.
_REBUILD: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _rebuild_dict,
    "torch._utils._rebuild_parameter": _rebuild_same,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch.jit._pickle.build_boollist": _rebuild_same,
    "torch.jit._pickle.build_doublelist": _rebuild_same,
    "torch.jit._pickle.build_intlist": _rebuild_same,
    "torch.jit._pickle.build_tensorlist": _rebuild_same,
    "torch.jit._pickle.restore_type_tag": _rebuild_same,
}
_ARGUMENTS = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    )
)
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": _Mark,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STEPS: dict[str, Callable[[_Machine], None]] = {
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "BINPERSID": _Machine.persistent,
    "BUILD": _Machine.build,
    "MEMOIZE": _Machine.memoize,
    "NEWOBJ": _Machine.new,
    "REDUCE": _Machine.reduce,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "STACK_GLOBAL": _Machine.stack_global,
    "TUPLE": _Machine.tuple,
}

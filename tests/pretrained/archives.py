"""Archives as torch writes them, made without torch, opcode by opcode (protocol 2)."""

import pickle
import zipfile

import numpy as np

STORAGES = {
    "bfloat16": "BFloat16Storage",
    "bool": "BoolStorage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
}
NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"


def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def integer(value):
    """Whatever opcode Python takes: K, M, J or a long one."""
    return pickle.dumps(value, protocol=2)[2:-1]


def group(*items):
    return b"(" + b"".join(items) + b"t"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + group(*arguments) + b"R"


def items(pairs):
    return b"(" + b"".join(text(key) + value for key, value in pairs.items()) + b"u"


ORDERED_DICT = name("collections", "OrderedDict") + b")R"


def storage(key, dtype, count):
    """A persistent id."""
    kind = name("torch", STORAGES[str(dtype)])
    return group(text("storage"), kind, text(key), text("cpu"), integer(count)) + b"Q"


def tensor(key, dtype, count, shape, strides, offset=0):
    numbers = (integer(offset), *(group(*map(integer, axes)) for axes in (shape, strides)))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage(key, dtype, count), *numbers, FALSE, ORDERED_DICT)


def script_module(kind, attributes):
    """An object of the TorchScript class `kind`, whose attributes are pickled values."""
    return name("__torch__", kind) + b")\x81}" + items(attributes) + b"b"


def program(body):
    return b"\x80\x02" + body + b"."


class Storages:
    """Numbers storages as torch does and pickles the arrays that view them."""

    def __init__(self, order="little"):
        self.records = {}
        self.order = order

    def add(self, array):
        """The pickled tensor of a contiguous array in a storage of its own."""
        array = np.asarray(array, order="C")
        key = str(len(self.records))
        swapped = array.dtype.itemsize > 1 and self.order == "big"
        raw = array.reshape(-1).view(f"u{array.dtype.itemsize}")
        self.records[key] = (raw.byteswap() if swapped else raw).tobytes()
        strides = [stride // array.itemsize for stride in array.strides]
        return tensor(key, array.dtype, array.size, array.shape, strides)


def write(path, body, storages, *, script=False, compression=zipfile.ZIP_STORED, order="little"):
    """A torch.save file, or with `script` a torch.jit.save file."""
    root = path.stem
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", program(body))
        for key, raw in storages.items():
            archive.writestr(f"{root}/data/{key}", raw, compression)
        if script:
            code = "class Module(Module):\n  __parameters__ = []\n"
            archive.writestr(f"{root}/code/__torch__.py", code, zipfile.ZIP_DEFLATED)
            archive.writestr(f"{root}/constants.pkl", b"\x80\x02).")
        archive.writestr(f"{root}/version", "3\n")
        if order is not None:
            archive.writestr(f"{root}/byteorder", order)
    return path


def state_dict(state, storages):
    """The pickled OrderedDict of arrays by name, with the _metadata that torch puts on it."""
    filled = ORDERED_DICT + items({key: storages.add(array) for key, array in state.items()})
    return filled + b"}" + text("_metadata") + ORDERED_DICT + b"sb"


def script_tree(state, storages):
    """Nested TorchScript modules whose dotted names are those of `state`."""
    attributes = {}
    children = {}
    for key, array in state.items():
        head, _, rest = key.partition(".")
        if rest:
            children.setdefault(head, {})[rest] = array
        else:
            attributes[head] = storages.add(array)
    attributes |= {"training": FALSE, "_is_full_backward_hook": NONE}
    attributes |= {head: script_tree(child, storages) for head, child in children.items()}
    return script_module("Module", attributes)


def write_state_dict(path, state):
    storages = Storages()
    return write(path, state_dict(state, storages), storages.records)


def write_script(path, state):
    storages = Storages()
    body = script_tree(state, storages)
    return write(path, body, storages.records, script=True)

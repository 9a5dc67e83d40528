"""Pickles that want more than tensors: nothing runs, and one line says why."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pretrained import archives
from tests.pretrained.archives import TRUE, call, group, items, name, program, text
from tests.pretrained.refusals import refused
from trm_jax.pretrained import torch_pickle

STATE = {"visual.layer1.0.conv1.weight": np.zeros((2, 3)), "logit_scale": np.float16(1)}


def _shout(canary):
    return text(f"touch {canary}")


def _tensor(**changed):
    given = {"key": "0", "dtype": "float32", "count": 4, "shape": (4,), "strides": (1,)}
    return archives.tensor(**given | changed)


def _deep(depth):
    return b"(" * depth + b"t" * depth


def _loop():
    """A module that holds itself."""
    return name("__torch__", "M") + b")\x81q\x00}" + items({"m": b"h\x00", "w": _tensor()}) + b"b"


def _laughs():
    """Forty modules, each twice inside the next: 2^40 names."""
    module = archives.script_module("M", {"w": _tensor()})
    for level in range(40):
        memo = bytes([level])
        module = archives.script_module("M", {"a": module + b"q" + memo, "b": b"h" + memo})
    return module


# kind -> (pickled value, part of the message); all of them are put into an otherwise good archive.
HOSTILE = {
    "system": (lambda c: call(name("posix", "system"), _shout(c)), "names 'posix.system'"),
    "eval": (lambda c: call(name("builtins", "eval"), text("1")), "names 'builtins.eval'"),
    "getattr": (lambda c: name("builtins", "getattr"), "names 'builtins.getattr'"),
    "protocol 4": (
        lambda c: b"\x8c\x05posix\x8c\x06system\x93" + group(_shout(c)) + b"R",
        "names 'posix.system'",
    ),
    "line breaks": (lambda c: text("a\nb") + text("c\nd") + b"\x93", r"names 'a\nb.c\nd'"),
    "attribute path": (lambda c: name("torch._utils", "os.system"), "names 'torch._utils.os"),
    "inst": (lambda c: b"(" + _shout(c) + b"iposix\nsystem\n", "uses INST"),
    "obj": (lambda c: b"(" + name("collections", "OrderedDict") + b"o", "uses OBJ"),
    "extension": (lambda c: b"\x82\x01", "uses EXT1"),
    "text id": (lambda c: b"Psecret\n", "uses PERSID"),
    "call of a script class": (lambda c: call(name("__torch__", "M"), _shout(c)), "calls some"),
    "call of a storage": (lambda c: call(name("torch", "FloatStorage"), _shout(c)), "calls some"),
    "call of a text": (lambda c: call(text("os.system"), _shout(c)), "calls something"),
    "new ordered dict": (
        lambda c: name("collections", "OrderedDict") + b")\x81",
        "makes an object",
    ),
    "new with arguments": (lambda c: name("__torch__", "M") + group(TRUE) + b"\x81", "makes an"),
    "dict of a text": (
        lambda c: call(name("collections", "OrderedDict"), text("abc")),
        "damaged pickle",
    ),
    "dict of odd keys": (
        lambda c: call(name("collections", "OrderedDict"), group(group(b")", b"N"))),
        "keys are no names",
    ),
    "too many arguments": (
        lambda c: call(name("collections", "OrderedDict"), b")", b")"),
        "damaged pickle",
    ),
    "rebuild of a text": (
        lambda c: call(name("torch._utils", "_rebuild_tensor_v2"), *[_shout(c)] * 6),
        "impossible",
    ),
    "rebuild of dicts": (
        lambda c: call(
            name("torch._utils", "_rebuild_tensor_v2"), archives.storage("0", "int64", 1), b"}}}"
        ),
        "impossible size",
    ),
    "class attribute": (
        lambda c: name("__torch__", "M") + b"}" + items({"__init__": _shout(c)}) + b"b",
        "sets attributes",
    ),
    "slots": (
        lambda c: name("torch", "FloatStorage") + group(b"N", b"}" + items({"a": b"N"})) + b"b",
        "sets attributes",
    ),
    "attribute of a tensor": (lambda c: _tensor() + b"}" + items({"a": b"N"}) + b"b", "sets attr"),
    "append to a dict": (lambda c: b"}Na", "fills something that is no list"),
    "item of a list": (lambda c: b"]" + text("a") + b"Ns", "fills something that is no dict"),
    "tuple key": (lambda c: b"}" + _deep(20_000) + b"Ns", "keys are no names"),
    "huge tensor": (lambda c: _tensor(shape=(2**62,)), "impossible size"),
    "negative shape": (lambda c: _tensor(shape=(-4,)), "impossible size"),
    "large tensor": (lambda c: _tensor(shape=(5,)), "larger than its storage"),
    "far stride": (lambda c: _tensor(strides=(2,)), "larger than its storage"),
    "repeated values": (lambda c: _tensor(shape=(10**6,), strides=(0,)), "larger than its"),
    "beyond the end": (lambda c: _tensor(offset=1), "larger than its storage"),
    "negative offset": (lambda c: _tensor(offset=-1), "impossible size"),
    "other axes": (lambda c: _tensor(strides=(1, 1)), "impossible way"),
    "many axes": (lambda c: _tensor(shape=(1,) * 99, strides=(1,) * 99), "impossible way"),
    "huge storage": (lambda c: _tensor(count=2**60), "impossible size"),
    "large storage": (lambda c: _tensor(count=2**30), "shorter than its tensors"),
    "path as key": (lambda c: _tensor(key="../../etc/passwd"), "lacks the record"),
    "odd storage": (lambda c: group(text("storage"), *[b"N"] * 4) + b"Q", "no storage"),
    "short id": (lambda c: group(text("storage")) + b"Q", "damaged pickle"),
    "empty stack": (lambda c: b"000R", "uses POP"),
    "no mark": (lambda c: b"t", "damaged pickle"),
    "no memo": (lambda c: b"h\x09", "damaged pickle"),
    "long text": (lambda c: b"X\xff\xff\xff\x7fabc", "damaged pickle"),
    "long number": (lambda c: b"\x8b\xff\xff\xff\x7f", "damaged pickle"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_run_nothing_and_make_one_line(tmp_path, capsys, kind):
    canary = tmp_path / "canary"
    make, expected = HOSTILE[kind]
    body = b"}" + items({"good": _tensor(), "bad": make(canary)})
    archives.write(tmp_path / "weights.pt", body, {"0": bytes(16)})
    assert expected in refused(tmp_path / "weights.pt", capsys)
    assert not canary.exists()
    assert torch_pickle.Module().state is None  # nothing was left on our own classes


@pytest.mark.parametrize("make", [_loop, _laughs])
def test_modules_without_end_arerefused(tmp_path, capsys, make):
    archives.write(tmp_path / "weights.pt", make(), {"0": bytes(16)}, script=True)
    assert "nests or names its tensors" in refused(tmp_path / "weights.pt", capsys)


def test_the_trap_would_snap_in_an_unpickler(tmp_path):
    canary = tmp_path / "canary"
    body = call(name(os.system.__module__, "system"), _shout(canary))
    pickle.loads(program(body))
    assert canary.exists()


def test_a_pickle_of_any_size_is_not_read(tmp_path, capsys):
    archives.write(tmp_path / "weights.pt", b"}" + b"N0" * (5 << 20), {})
    assert "more than 8 MiB" in refused(tmp_path / "weights.pt", capsys)


GOOD = program(archives.script_tree(STATE, archives.Storages()))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4))
def test_no_change_of_bytes_makes_anything_but_a_refusal(changes):
    content = bytearray(GOOD)
    for position, value in changes:
        content[position] = value
    try:
        torch_pickle.interpret(bytes(content))
    except torch_pickle.Refused as refused:
        assert "\n" not in str(refused)

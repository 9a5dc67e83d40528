"""Files of weights: dtypes, damage, and a write that leaves the old file or the new one."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from trm_jax.pretrained import files
from trm_jax.types import UserError

TENSORS = {
    "half": np.float16([[1.5, -2], [0, 3]]),
    "brain": np.array([1.5, 1e30], ml_dtypes.bfloat16),
    "double": np.array(2.5),
    "whole": np.int64([-(2**40)]),
    "flags": np.array([True, False]),
}
CODES = {"half": "F16", "brain": "BF16", "double": "F64", "whole": "I64", "flags": "BOOL"}


def _by_hand(path, tensors, codes, pad=0):
    """A safetensors file: the length of a JSON header, the header, the numbers."""
    header, content = {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        where = [len(content), len(content) + len(raw)]
        header[name] = {"dtype": codes[name], "shape": array.shape, "data_offsets": where}
        content += raw
    text = json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def test_every_dtype_is_read_as_stored(tmp_path):
    weights = files.read(_by_hand(tmp_path / "a.safetensors", TENSORS, CODES))
    assert weights.container == files.SAFETENSORS
    assert set(weights.tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        found = weights.tensors[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.asarray(found).tobytes() == array.tobytes()
    np.testing.assert_array_equal(np.asarray(weights.tensors["half"], np.float32), TENSORS["half"])


def test_a_header_length_that_looks_like_a_web_page_is_no_web_page(tmp_path):
    path = tmp_path / "a.safetensors"
    length = int.from_bytes(_by_hand(path, TENSORS, CODES).read_bytes()[:8], "little")
    _by_hand(path, TENSORS, CODES, pad=(ord("<") - length) % 256)
    assert path.read_bytes().startswith(b"<")
    assert set(files.read(path).tensors) == set(TENSORS)


def test_an_unknown_dtype_is_named(tmp_path):
    small = {"tiny": np.zeros(2, np.uint8)}
    path = _by_hand(tmp_path / "a.safetensors", small, {"tiny": "F8_E4M3"})
    with pytest.raises(UserError, match=r"a\.safetensors: tensor 'tiny' has the dtype F8_E4M3"):
        files.read(path)


@pytest.mark.parametrize("kept", [30, -3])
def test_a_truncated_file_is_said_to_be_cut_off(tmp_path, kept):
    path = _by_hand(tmp_path / "a.safetensors", TENSORS, CODES)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="is cut off or damaged .*; fetch it again"):
        files.read(path)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read .No such file"):
        files.read(tmp_path / "missing")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        files.sha256(tmp_path)


def test_write_keeps_bits_layout_and_metadata(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    turned = {**TENSORS, "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    files.write(path, turned, {"format": "pt"})
    loaded = safetensors.numpy.load_file(path)
    assert set(loaded) == set(turned)
    for name, array in turned.items():
        assert (loaded[name].shape, loaded[name].tobytes()) == (array.shape, array.tobytes())
    assert files.read_metadata(path) == {"format": "pt"}
    assert os.listdir(path.parent) == ["a.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    files.write(path, TENSORS, {})
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write(path, {}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_hash_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "a") == expected

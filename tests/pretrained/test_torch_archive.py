"""Torch's zip archives, made by hand and by torch: every number, every damage."""

import pickletools
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.pretrained import archives
from tests.pretrained.archives import call, integer, items, name, text
from tests.pretrained.refusals import refused
from trm_jax.pretrained import torch_archive
from trm_jax.types import UserError

RNG = np.random.default_rng(0)
STATE = {
    "visual.conv1.weight": RNG.normal(size=(4, 3, 2, 2)).astype(np.float16),
    "visual.layer1.0.bn1.running_var": RNG.normal(size=4).astype(np.float64),
    "visual.half": RNG.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    "positional_embedding": RNG.normal(size=(5, 2)).astype(np.float32),
    "logit_scale": np.float32(2.5),
    "input_resolution": np.int64(224),
    "mask": np.array([True, False]),
    "empty": np.zeros((0, 3), np.int32),
}


def _assert_equal(tensors, expected):
    assert set(tensors) == set(expected)
    for key, array in expected.items():
        found = np.asarray(tensors[key])
        assert (found.dtype, found.shape) == (array.dtype, array.shape), key
        assert (tensors[key].dtype, tensors[key].shape) == (array.dtype, array.shape), key
        assert found.tobytes() == array.tobytes(), key


def test_a_script_archive_gives_the_dotted_names_and_the_bytes(tmp_path):
    archive = torch_archive.read(archives.write_script(tmp_path / "RN.pt", STATE))
    assert archive.is_script
    _assert_equal(archive.tensors, STATE)


@pytest.mark.parametrize("form", ["plain", "checkpoint", "parallel"])
def test_state_dicts_alone_in_a_checkpoint_and_of_data_parallel(tmp_path, form):
    storages = archives.Storages()
    prefix = "module." if form == "parallel" else ""
    body = archives.state_dict({prefix + key: v for key, v in STATE.items()}, storages)
    if form != "plain":
        body = b"}" + items({"epoch": integer(3), "state_dict": body, "name": text("run")})
    archive = torch_archive.read(archives.write(tmp_path / "a.pt", body, storages.records))
    assert not archive.is_script
    _assert_equal(archive.tensors, STATE)


def test_views_with_offsets_and_strides_of_one_storage(tmp_path):
    numbers = np.arange(24, dtype=np.float32)
    views = {
        "whole": ((4, 6), (6, 1), 0),
        "transposed": ((6, 4), (1, 6), 0),
        "part": ((2, 3), (12, 2), 7),
        "one_long_axis": ((1, 3), (10**9, 1), 20),
    }
    pickled = {
        key: archives.tensor("0", "float32", 24, shape, strides, offset)
        for key, (shape, strides, offset) in views.items()
    }
    body = b"}" + items(pickled)
    path = archives.write(tmp_path / "a.pt", body, {"0": numbers.tobytes()})
    tensors = torch_archive.read(path).tensors
    whole = numbers.reshape(4, 6)
    np.testing.assert_array_equal(tensors["whole"], whole)
    np.testing.assert_array_equal(tensors["transposed"], whole.T)
    np.testing.assert_array_equal(tensors["part"], [[7, 9, 11], [19, 21, 23]])
    np.testing.assert_array_equal(tensors["one_long_axis"], [[20, 21, 22]])


@pytest.mark.parametrize("order", ["big", "little", None])
def test_the_byte_order_is_obeyed(tmp_path, order):
    storages = archives.Storages(order or "little")
    body = archives.state_dict(STATE, storages)
    path = archives.write(tmp_path / "a.pt", body, storages.records, order=order)
    _assert_equal(torch_archive.read(path).tensors, STATE)


def test_modules_may_be_shared_and_attributes_typed(tmp_path):
    storages = archives.Storages()
    shared = archives.script_module("A", {"w": storages.add(np.float32([1, 2]))})
    tagged = call(name("torch.jit._pickle", "restore_type_tag"), b"]", text("List[int]"))
    body = archives.script_module(
        "B", {"a": shared + b"q\x00", "b": b"h\x00", "sizes": tagged, "scale": b"G" + bytes(8)}
    )
    path = archives.write(tmp_path / "a.pt", body, storages.records, script=True)
    both = np.float32([1, 2])
    _assert_equal(torch_archive.read(path).tensors, {"a.w": both, "b.w": both})


def _small(path, **options):
    storages = archives.Storages()
    body = archives.state_dict({"a": np.arange(9, dtype=np.float32)}, storages)
    return archives.write(path, body, storages.records, **options)


def _truncate(path):
    content = _small(path).read_bytes()
    path.write_bytes(content[:-40])


def _flip(path):
    content = bytearray(_small(path).read_bytes())
    content[content.index(np.float32(5).tobytes())] ^= 1
    path.write_bytes(content)


def _other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")


def _without_storage(path):
    archives.write(path, b"}" + items({"a": archives.tensor("7", "int64", 2, (2,), (1,))}), {})


def _short_storage(path):
    body = b"}" + items({"a": archives.tensor("0", "int64", 2, (2,), (1,))})
    archives.write(path, body, {"0": bytes(15)})


DAMAGED = {
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"), "is a web page"),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "pointer of git-lfs",
    ),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "noise": (lambda path: path.write_bytes(bytes(range(256))), "is neither a safetensors"),
    "legacy": (
        lambda path: path.write_bytes(bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + bytes(99)),
        "before 1.6",
    ),
    "tar": (lambda path: path.write_bytes(bytes(257) + b"ustar" + bytes(300)), "before 1.6"),
    "truncated": (_truncate, "cut off or damaged zip"),
    "flipped bit": (_flip, "is damaged in the record 'data/0'"),
    "other zip": (_other_zip, "not one of torch"),
    "missing storage": (_without_storage, "lacks the record 'data/7'"),
    "short storage": (_short_storage, "data/0 is shorter than its tensors"),
    "compressed": (lambda p: _small(p, compression=zipfile.ZIP_DEFLATED), "compressed record"),
    "byte order": (lambda path: _small(path, order="middle"), "unknown byte order 'middle'"),
    "no pickle": (lambda path: archives.write(path, b"\xff", {}), "damaged pickle"),
    "nothing": (lambda path: archives.write(path, b"N", {}), "neither a TorchScript module nor"),
    "no tensors": (lambda path: archives.write(path, b"}", {}), "holds no tensors"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_and_foreign_files_make_one_line(tmp_path, capsys, kind):
    make, expected = DAMAGED[kind]
    make(tmp_path / "weights.pt")
    assert expected in refused(tmp_path / "weights.pt", capsys)


def _torch_modules(torch):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj_weight = torch.nn.Parameter(torch.randn(24, 8).half())
            self.register_buffer("turned", torch.randn(3, 4).double().T)

        def forward(self, x):
            return x

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Block()
            self.norms = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.BatchNorm1d(8))
            self.tied = self.attn
            self.logit_scale = torch.nn.Parameter(torch.tensor(1.5))
            self.large = torch.nn.Parameter(torch.randn(40, 8).bfloat16())
            self.register_buffer("view", self.large.detach()[3:9, ::2])
            self.register_buffer("input_resolution", torch.tensor(224))
            self.register_buffer("mask", torch.tensor([True, False]))
            self.width = 8

        def forward(self, x):
            return self.attn(x)

    return Block, Model


def _numpy(torch, state):
    bfloat16 = {k: v.view(torch.int16) for k, v in state.items() if v.dtype == torch.bfloat16}
    arrays = {k: v.detach().numpy() for k, v in (state | bfloat16).items()}
    return {k: v.view(ml_dtypes.bfloat16) if k in bfloat16 else v for k, v in arrays.items()}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["traced", "scripted", "state dict", "checkpoint", "4"])
def test_files_of_torch_itself(tmp_path, form):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = _torch_modules(torch)[1]().eval()
    path = tmp_path / "model.pt"
    is_script = form in ("traced", "scripted")
    if is_script:
        traced = torch.jit.trace(model, torch.randn(4, 8))
        torch.jit.save(traced if form == "traced" else torch.jit.script(model), path)
        expected = torch.jit.load(path).state_dict()
    else:
        expected = model.state_dict()
        saved = {"epoch": 1, "state_dict": expected} if form == "checkpoint" else expected
        torch.save(saved, path, pickle_protocol=4 if form == "4" else 2)
    archive = torch_archive.read(path)
    assert archive.is_script == is_script
    assert {"tied.turned", "norms.1.num_batches_tracked", "view"} <= set(archive.tensors)
    _assert_equal(archive.tensors, _numpy(torch, expected))


@pytest.mark.parity
def test_torch_reads_our_hand_made_state_dicts(tmp_path):
    torch = pytest.importorskip("torch")
    path = archives.write_state_dict(tmp_path / "a.pt", STATE)
    state = _numpy(torch, torch.load(path, weights_only=True))
    assert set(state) == set(STATE)
    for key, array in STATE.items():
        assert state[key].tobytes() == array.tobytes(), key


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_our_hand_made_script_archives_have_the_opcodes_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    block = _torch_modules(torch)[0]()
    torch.jit.save(torch.jit.trace(block, torch.randn(1)), tmp_path / "torch.pt")
    state = _numpy(torch, block.state_dict())
    archives.write_script(tmp_path / "ours.pt", state)
    found = {}
    for stem in ("torch", "ours"):
        with zipfile.ZipFile(tmp_path / f"{stem}.pt") as archive:
            content = archive.read(f"{stem}/data.pkl")
        opcodes = [opcode.name for opcode, _, _ in pickletools.genops(content)]
        found[stem] = {name for name in opcodes if not name.startswith(("BINPUT", "BINGET"))}
    assert found["torch"] - {"NEWTRUE"} == found["ours"]


@pytest.mark.parity
def test_whole_models_are_refused_with_the_remedy(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"names 'torch\.nn\..*Linear'.*state_dict\(\) alone"):
        torch_archive.read(tmp_path / "model.pt")

"""One model, however it was saved, is one function; and back to OpenCLIP's file bit for bit."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.oracles.random_variables import random_variables
from tests.pretrained import archives, checkpoints
from trm_jax.models.clip import towers
from trm_jax.pretrained import convert, registry
from trm_jax.types import UserError

CONFIGS = checkpoints.CONFIGS


def _embeddings(variables, config):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    tokens = np.array([[0, 3, 1, 8, 0, 0, 0], [0, 5, 8, 0, 0, 0, 0]], np.int32)
    return jax.device_get(jax.jit(towers.build(config).apply)(variables, images, tokens))


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_formats_load_to_the_same_numbers_and_the_same_function(tmp_path, kind):
    paths = checkpoints.write_all(tmp_path, kind)
    loaded = {form: registry.load(path, CONFIGS[kind]) for form, path in paths.items()}
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(np.float16).astype(np.float32), random_variables(CONFIGS[kind])
    )
    expected = _embeddings(rounded, CONFIGS[kind])
    assert len(loaded) == (4 if kind == "vit" else 3)
    for variables in loaded.values():
        jax.tree.map(np.testing.assert_array_equal, variables, rounded)
        found = _embeddings(variables, CONFIGS[kind])
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_through_an_openclip_file_and_back_is_bit_exact(tmp_path, kind):
    variables = random_variables(CONFIGS[kind])
    path = tmp_path / "new" / "clip.safetensors"
    registry.save_openclip(path, variables)
    stored = safetensors.numpy.load_file(path)
    assert stored.keys() == convert.openclip_shapes(CONFIGS[kind]).keys()
    back = registry.load(path, CONFIGS[kind])
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.tobytes(), b.tobytes()), back, variables)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("visual.proj"), r"bad\.pt lack visual\.proj; set model\.architecture"),
        (lambda s: s.update(extra=np.float16([1])), r"have the unexpected extra; set"),
        (lambda s: s.update({"ln_final.bias": np.zeros(9, np.float16)}), r"bias is \[9\].*\[8\]"),
        (lambda s: s.update({"ln_final.bias": np.zeros(8, np.int64)}), "bias is int64, not float"),
        (lambda s: s.update({"ln_final.bias": np.full(8, np.nan, np.float16)}), "not finite"),
        (lambda s: s.update({"ln_final.bias": np.full(8, 1e300)}), "ln_final.bias has numbers"),
    ],
    ids=["missing", "unexpected", "shape", "integers", "nan", "beyond float32"],
)
def test_a_wrong_file_gets_one_line(tmp_path, change, message):
    state = checkpoints.half_state("vit")
    change(state)
    path = archives.write_script(tmp_path / "bad.pt", state)
    with pytest.raises(UserError, match=message) as error:
        registry.load(path, CONFIGS["vit"])
    assert "\n" not in str(error.value)


def test_shapes_are_checked_before_any_number_is_read(tmp_path, monkeypatch):
    path = checkpoints.write_all(tmp_path, "vit")["openai"]
    wide = CONFIGS["vit"] | {"embed_dim": 7}

    def unread(*_):
        raise AssertionError("read")

    monkeypatch.setattr(convert, "_to_ours", unread)
    with pytest.raises(UserError, match="needs"):
        registry.load(path, wide)


def _torch_tree(torch, state):
    """A module whose state_dict() is `state`, names with dots included."""
    root = torch.nn.Module()
    for name, array in state.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, torch.nn.Module())
            node = getattr(node, parent)
        tensor = torch.from_numpy(np.array(array))
        if tensor.is_floating_point():
            node.register_parameter(leaf, torch.nn.Parameter(tensor))
        else:
            node.register_buffer(leaf, tensor)
    return root


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", CONFIGS)
def test_archives_of_torch_load_to_the_same_numbers(tmp_path, kind):
    torch = pytest.importorskip("torch")
    state = checkpoints.half_state(kind)
    module = _torch_tree(torch, state | checkpoints.SCALARS)
    module.forward = lambda x: x
    torch.jit.save(torch.jit.trace_module(module, {"forward": torch.ones(1)}), tmp_path / "jit.pt")
    torch.save(_torch_tree(torch, state).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    expected = convert.from_openclip(state, CONFIGS[kind])
    for source in (tmp_path / "jit.pt", tmp_path):
        jax.tree.map(np.testing.assert_array_equal, registry.load(source, CONFIGS[kind]), expected)


@pytest.mark.parity
def test_our_openclip_files_load_into_torch(tmp_path):
    torch = pytest.importorskip("torch")
    variables = random_variables(CONFIGS["resnet"])
    registry.save_openclip(tmp_path / "clip.safetensors", variables)
    state = safetensors.numpy.load_file(tmp_path / "clip.safetensors")
    module = _torch_tree(torch, {name: np.zeros_like(array) for name, array in state.items()})
    module.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    expected = convert.to_openclip(variables)
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name])

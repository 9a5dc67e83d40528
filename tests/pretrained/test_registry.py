"""Architectures, the search for weights, their hashes, and our own file format."""

import hashlib
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.oracles.random_variables import random_variables
from tests.pretrained import archives, checkpoints
from trm_jax.models.clip import towers
from trm_jax.pretrained import architectures, convert, registry
from trm_jax.types import UserError

CONFIG = {
    "embed_dim": 6,
    "image": {"kind": "resnet", "layers": (1,), "width": 4, "heads": 2, "image_size": 8},
    "text": {
        "vocab_size": 9,
        "context_length": 7,
        "width": 8,
        "heads": 2,
        "layers": 1,
        "eos_id": 3,
    },
}
# Published totals of both towers and the logit scale.
COUNTS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14-336": 427_944_193,
    "groupvit": 55_726_609,
}


@pytest.fixture
def variables():
    return random_variables(CONFIG)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home, so that no cache of the person who runs the tests is looked at."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _save(path, variables, config=CONFIG):
    registry.save(
        path, variables, config=config, tokenizer={"kind": "clip"}, provenance={"mAP": 1.5}
    )


def _assert_loads(source, variables, config=CONFIG):
    jax.tree.map(np.testing.assert_array_equal, registry.load(source, config), variables)


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", COUNTS)
def test_architectures_have_the_published_parameter_counts(name):
    spec = towers.abstract_variables(registry.architecture(name))
    assert towers.count_parameters(spec["params"]) == COUNTS[name]
    assert architectures.PUBLISHED[name].parameters == COUNTS[name]


def test_every_architecture_has_a_home_and_is_found_by_it():
    assert set(registry.HUB) == set(registry.ARCHITECTURES) == set(architectures.PUBLISHED)
    assert registry.architecture("timm/resnet101_clip.openai") == registry.architecture("RN101")
    large = registry.architecture("ViT-L/14-336")
    assert registry.architecture("ViT-L/14@336px") == large
    with pytest.raises(UserError, match="'RN34' must be one of RN50, RN101"):
        registry.architecture("RN34")


def test_listed_hashes_are_hashes_and_no_two_are_the_same():
    hashes = [p.openai_sha256 for p in architectures.PUBLISHED.values() if p.openai_file]
    hashes += [p.sha256 for p in architectures.PUBLISHED.values() if p.revision]
    assert len(set(hashes)) == len(hashes) == 14
    assert all(len(bytes.fromhex(digits)) == 32 for digits in hashes)
    commits = [p.revision for p in architectures.PUBLISHED.values() if p.revision]
    assert all(len(bytes.fromhex(digits)) == 20 for digits in commits)
    known = architectures.PUBLISHED["ViT-B/32"]
    assert architectures.published_as(known.openai_sha256) == "OpenAI's ViT-B-32.pt"
    assert architectures.published_as(known.sha256).endswith("vit_base_patch32_clip_224.openai")
    assert architectures.published_as("0" * 64) is None


def test_own_format_round_trips_with_its_metadata(tmp_path, variables):
    path = tmp_path / "new" / "clip.safetensors"
    _save(path, variables)
    _assert_loads(path, variables)
    assert registry.read_metadata(path) == {
        "config": towers.validate(CONFIG),
        "tokenizer": {"kind": "clip"},
        "provenance": {"mAP": 1.5},
    }
    assert registry.tokenizer_config(path) == {"kind": "clip"}
    assert "params/image/conv1/kernel" in safetensors.numpy.load_file(path)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_files_are_found_in_folders_and_recognised_by_their_content(tmp_path, variables, name):
    state = convert.to_openclip(variables)
    if name.endswith(".bin"):
        archives.write_state_dict(tmp_path / name, state)
    else:
        safetensors.numpy.save_file(state, tmp_path / name)
    for source in (tmp_path / name, tmp_path):
        _assert_loads(source, variables)
    assert registry.tokenizer_config(tmp_path) is None


@pytest.mark.parity
def test_transformers_directories_are_recognised(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shared = {
        "hidden_size": 8,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=shared | {"vocab_size": 9, "max_position_embeddings": 7},
            vision_config=shared | {"image_size": 16, "patch_size": 8},
            projection_dim=6,
        )
    )
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    image = {
        "kind": "vit",
        "patch_size": 8,
        "width": 8,
        "layers": 1,
        "heads": 2,
        "image_size": 16,
    }
    loaded = registry.load(tmp_path, CONFIG | {"image": image})["params"]
    expected = model.visual_projection.weight.detach()
    assert torch.equal(torch.from_numpy(loaded["image"]["proj"]).T, expected)
    attention = model.text_model.encoder.layers[0].self_attn
    for letter in "qkv":
        kernel = loaded["text"]["resblocks_0"]["attn"][f"{letter}_proj"]["kernel"]
        expected = getattr(attention, f"{letter}_proj").weight.detach()
        assert torch.equal(torch.from_numpy(kernel).T, expected)


def test_another_configuration_is_refused_with_the_differing_fields(tmp_path, variables):
    path = tmp_path / "clip.safetensors"
    _save(path, variables)
    other = json.loads(json.dumps(CONFIG))
    other["text"]["heads"] = 4
    other["image"]["image_size"] = 16
    message = r"model\.clip\.image\.image_size \(8, not 16\), model\.clip\.text\.heads \(2, not 4\)"
    with pytest.raises(UserError, match=message):
        registry.load(path, other)
    registry.load(path, CONFIG | {"dense_pos_embed": True})  # a choice of the reader


def test_own_files_with_numbers_that_are_not_finite_are_refused(tmp_path, variables):
    variables["params"]["text"]["ln_final"]["bias"][2] = np.inf
    _save(tmp_path / "clip.safetensors", variables)
    with pytest.raises(UserError, match="params/text/ln_final/bias has numbers .* not finite"):
        registry.load(tmp_path / "clip.safetensors", CONFIG)


def test_random_means_no_weights():
    assert registry.load("random", CONFIG) is None
    assert registry.tokenizer_config("random") is None
    assert registry.provenance("random") == {}


@pytest.mark.parametrize(
    "name", ["missing.safetensors", "a/RN101.pt", "./owner/name", "weights", "a/b/c"]
)
def test_a_missing_path_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"model.pretrained: '{name}' does not exist"):
        registry.load(name, CONFIG)


def test_unreadable_and_foreign_files_are_named(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors here")
    with pytest.raises(UserError, match="broken.safetensors is neither a safetensors file nor"):
        registry.load(broken, CONFIG)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({"weight": np.zeros(2, np.float32)}, foreign)
    with pytest.raises(UserError, match="tensor names of .*foreign.safetensors are neither"):
        registry.load(foreign, CONFIG)
    assert registry.tokenizer_config(foreign) is None
    with pytest.raises(UserError, match="carries no trm_jax metadata"):
        registry.read_metadata(foreign)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds none of open_clip_model.safetensors, model"):
        registry.load(tmp_path / "none", CONFIG)


def test_packaged_weights_that_are_absent_say_so(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.PACKAGED, "glyphs", tmp_path / "glyphs_clip.safetensors")
    with pytest.raises(UserError, match="packaged weights 'glyphs' are missing"):
        registry.load("glyphs", CONFIG)


# Hashes: a small model takes the place of RN101.


def test_openais_cache_is_used_by_name_and_only_if_the_hash_is_right(home, monkeypatch):
    (home / ".cache/clip").mkdir(parents=True)
    config, state = checkpoints.CONFIGS["resnet"], checkpoints.half_state("resnet")
    path = archives.write_script(home / ".cache/clip/RN101.pt", state)
    message = r"RN101\.pt is not the published file .*: its SHA-256 is .*, not 8fa8567bab74\.\.\.;"
    with pytest.raises(UserError, match=message) as error:
        registry.load("RN101", config)
    assert "\n" not in str(error.value)
    known = architectures.PUBLISHED["RN101"]._replace(openai_sha256=_sha256(path))
    monkeypatch.setitem(architectures.PUBLISHED, "RN101", known)
    _assert_loads("RN101", convert.from_openclip(state, config), config)
    assert registry.provenance("RN101") == {
        "path": str(path),
        "sha256": _sha256(path),
        "published": "OpenAI's RN101.pt",
    }
    # A state dict is not what OpenAI published, whatever its name; by its path it may be used.
    archives.write_state_dict(path, state)
    with pytest.raises(UserError, match="is not the published file"):
        registry.load("RN101", config)
    _assert_loads(path, convert.from_openclip(state, config), config)
    assert "published" not in registry.provenance(path)


def test_a_script_archive_with_openais_name_must_be_openais(tmp_path):
    config, state = checkpoints.CONFIGS["resnet"], checkpoints.half_state("resnet")
    path = archives.write_script(tmp_path / "RN101.pt", state)
    with pytest.raises(UserError, match="is not the published file of this name.*another name"):
        registry.load(path, config)
    expected = convert.from_openclip(state, config)
    _assert_loads(path.rename(tmp_path / "mine.pt"), expected, config)

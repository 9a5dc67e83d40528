"""GELU and QuickGELU weights: what a config file beside them says, and what a run is told."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.pretrained import archives, checkpoints
from trm_jax.models.clip import config as clip_config
from trm_jax.models.clip import towers
from trm_jax.pretrained import architectures, command, convert, identify, registry
from trm_jax.types import UserError

MEAN, STD = list(clip_config.CLIP_MEAN), list(clip_config.CLIP_STD)
SMALL = {
    "ViT-B/32": checkpoints.CONFIGS["vit"],
    "RN50": checkpoints.CONFIGS["resnet"],
}


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small models take the places of ViT-B/32 and RN50."""
    for name, config in SMALL.items():
        quick = {"activation": "quick_gelu"}
        image = config["image"] | (quick if config["image"]["kind"] == "vit" else {})
        complete = config | {"image": image, "text": config["text"] | quick}
        monkeypatch.setitem(
            architectures.ARCHITECTURES, name, {**complete, "dense_pos_embed": False}
        )


def _write(path, content):
    path.write_text(json.dumps(content))


def _openclip(folder, model, pixels=None):
    _write(
        folder / "open_clip_config.json",
        {"model_cfg": model, "preprocess_cfg": pixels or {"mean": MEAN, "std": STD}},
    )


def _outputs(name, source):
    """What towers of this architecture with the loaded weights make of one image and two texts."""
    config = registry.architecture(name)
    variables = registry.load(source, config)
    model = towers.build(config)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(size=(1, 16, 16, 3)).astype(np.float32)
    tokens = jnp.asarray([[1, 2, 8, 0, 0, 0, 0], [3, 8, 0, 0, 0, 0, 0]])
    image, _ = model.apply(variables, pixels, method="encode_image")
    text = model.apply(variables, tokens, method="encode_text")
    return np.asarray(image), np.asarray(text), pixels, tokens


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_the_suffix_changes_activations_and_nothing_else(name):
    quick, gelu = registry.architecture(name), registry.architecture(f"{name}-gelu")
    towers_with = ["image", "text"] if name.startswith("ViT") else ["text"]
    changed = [t for t in ("image", "text") if quick[t].get("activation") == "quick_gelu"]
    assert changed == towers_with
    for tower in towers_with:
        assert (quick[tower].pop("activation"), gelu[tower].pop("activation")) == (
            "quick_gelu",
            "gelu",
        )
    assert quick == gelu


def test_the_suffix_is_told_apart_and_names_no_weights():
    config = registry.architecture("ViT-B/32-gelu")
    assert identify.named(config) == "ViT-B/32-gelu"
    large = registry.architecture("ViT-L/14@336px-gelu")
    assert large == registry.architecture("ViT-L/14-336-gelu")
    with pytest.raises(UserError, match=r"'RN34-gelu' must be .*, or one of them with -gelu at"):
        registry.architecture("RN34-gelu")
    with pytest.raises(UserError, match=r"'ViT-B/32-gelu' names towers, for model\.architecture"):
        registry.resolve("ViT-B/32-gelu")


@pytest.mark.parity
def test_weights_that_transformers_saved_with_gelu_give_its_outputs(tmp_path):
    pytest.importorskip("torch")
    from tests.oracles import transformers_clip

    shared = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 1, "hidden_act": "gelu"}
    model = transformers_clip.randomised(
        shared | {"image_size": 16, "patch_size": 8},
        shared | {"vocab_size": 9, "max_position_embeddings": 7, "eos_token_id": 8},
        embed_dim=6,
    )
    model.save_pretrained(tmp_path)  # writes config.json as well
    with pytest.raises(UserError, match=r"config\.json .*; set model.architecture=ViT-B/32-gelu$"):
        _outputs("ViT-B/32", tmp_path)
    image, text, pixels, tokens = _outputs("ViT-B/32-gelu", tmp_path)
    scaled = ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2)
    pooled, _ = transformers_clip.image_features(model, scaled)
    expected = transformers_clip.text_features(model, np.array(tokens))
    np.testing.assert_allclose(image, pooled, atol=2e-5)
    np.testing.assert_allclose(text, expected, atol=2e-5)
    (tmp_path / "config.json").unlink()
    _, other, _, _ = _outputs("ViT-B/32", tmp_path)
    assert np.abs(other - expected).max() > 1e-3


CONTRADICTIONS = [
    ("ViT-B/32", {}, "image.activation gelu, not quick_gelu, text.activation gelu", "-gelu"),
    ("ViT-B/32-gelu", {"quick_gelu": True}, "image.activation quick_gelu, not gelu", ""),
    ("RN50", {"quick_gelu": False}, "needs text.activation gelu, not quick_gelu", "-gelu"),
    ("RN50-gelu", {"quick_gelu": True}, "needs text.activation quick_gelu, not gelu", ""),
]


@pytest.mark.parametrize("name, model, said, suffix", CONTRADICTIONS)
def test_openclips_config_must_agree_with_the_run(tmp_path, name, model, said, suffix):
    base = name.removesuffix("-gelu")
    path = checkpoints.write_all(tmp_path, {"ViT-B/32": "vit", "RN50": "resnet"}[base])["openclip"]
    _openclip(tmp_path, model)
    right = base + suffix
    for source in (path, tmp_path):
        with pytest.raises(UserError) as error:
            registry.load(source, registry.architecture(name))
        message = str(error.value)
        assert said in message and "says open_clip_config.json beside it" in message
        assert message.endswith(f"; set model.architecture={right}") and "\n" not in message
    said = []
    assert registry.load(path, registry.architecture(right), say=said.append)
    assert said == []


def test_what_a_run_chooses_does_not_hide_the_architectures_name(tmp_path):
    path = checkpoints.write_all(tmp_path, "vit")["openclip"]
    _openclip(tmp_path, {})
    config = {**registry.architecture("ViT-B/32"), "dense_pos_embed": True}
    with pytest.raises(UserError, match="set model.architecture=ViT-B/32-gelu$"):
        registry.load(path, config)
    config["embed_dim"] = 6
    config["text"] = {**config["text"], "eos_id": 4}  # none of the named ones
    message = r"set model\.clip\.image\.activation=gelu and model\.clip\.text\.activation=gelu$"
    with pytest.raises(UserError, match=message):
        registry.load(path, config)


def test_the_scaling_of_pixels_must_agree(tmp_path):
    path = checkpoints.write_all(tmp_path, "vit")["openclip"]
    config = registry.architecture("ViT-B/32-gelu")
    _openclip(tmp_path, {}, {"mean": [0.5, 0.5, 0.5], "std": STD})
    with pytest.raises(UserError, match=r"; set model\.clip\.image\.mean=\(0\.5, 0\.5, 0\.5\)$"):
        registry.load(path, config)
    with pytest.raises(UserError, match=r"=ViT-B/32-gelu and model\.clip\.image\.mean=\(0\.5, 0"):
        registry.load(path, registry.architecture("ViT-B/32"))
    right = {**config, "image": {**config["image"], "mean": (0.5, 0.5, 0.5)}}
    registry.load(path, right)
    single = [float(np.float32(value)) for value in MEAN]
    for pixels in ({"mean": single, "std": None}, {"std": [0.5]}, {"mean": "none", "std": STD}):
        _openclip(tmp_path, {}, pixels)
        registry.load(path, config)


def test_transformers_configs_old_and_new(tmp_path):
    path = checkpoints.write_all(tmp_path, "vit")["transformers"]
    quick, gelu = registry.architecture("ViT-B/32"), registry.architecture("ViT-B/32-gelu")
    sections = {"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}}
    old = {f"{name}_dict": {"hidden_act": "quick_gelu"} for name in sections}
    for content, config in (
        ({}, quick),  # quick_gelu is the default
        (sections, gelu),
        (sections | dict.fromkeys(old), gelu),
        (sections | old, quick),
    ):
        _write(tmp_path / "config.json", {"model_type": "clip"} | content)
        said = []
        registry.load(path, config, say=said.append)
        assert said == []
        with pytest.raises(UserError, match="set model.architecture=ViT-B/32"):
            registry.load(path, gelu if config is quick else quick)
    _write(tmp_path / "config.json", {"model_type": "clip", "text_config": {"hidden_act": "relu"}})
    with pytest.raises(UserError, match="relu is none of quick_gelu, gelu: take other weights"):
        registry.load(path, quick)
    _write(tmp_path / "config.json", {"model_type": "clip"})
    _write(tmp_path / "preprocessor_config.json", {"image_mean": [0, 0, 0], "image_std": STD})
    with pytest.raises(UserError, match=r"set model\.clip\.image\.mean=\(0, 0, 0\)"):
        registry.load(path, quick)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON \(.*; fetch it ag"):
        registry.load(path, quick)


def test_configs_of_others_say_nothing(tmp_path):
    """A timm config.json, and OpenCLIP's beside the transformers file, are of other files."""
    paths = checkpoints.write_all(tmp_path, "vit")
    _write(tmp_path / "config.json", {"architecture": "vit_base_patch32_clip_224"})
    _write(tmp_path / "open_clip_config.json", {"other": 1})
    for form in ("openclip", "transformers"):
        said = []
        registry.load(paths[form], registry.architecture("ViT-B/32"), say=said.append)
        assert said == [
            f"note: no config file beside {paths[form]} says its activation; QuickGELU is assumed, "
            "as configured; if it was trained with GELU, add -gelu to model.architecture"
        ]


def test_an_assumption_is_said_only_where_there_is_one(tmp_path, monkeypatch):
    state = checkpoints.half_state("resnet")
    path = archives.write_script(tmp_path / "mine.pt", state)
    quick, gelu = registry.architecture("RN50"), registry.architecture("RN50-gelu")
    said = []
    variables = registry.load(path, gelu, say=said.append)
    assert len(said) == 1 and "GELU is assumed, as configured; if it was trained with Q" in said[0]
    assert said[0].endswith("take -gelu off model.architecture")
    own = tmp_path / "own.safetensors"
    registry.save(own, variables, config=gelu, tokenizer={"kind": "clip"}, provenance={})
    registry.load(own, gelu, say=said.append)
    registry.load("random", gelu, say=said.append)
    assert len(said) == 1
    # A published file is known by its hash, whatever its name and whatever lies beside it.
    known = architectures.PUBLISHED["RN50"]._replace(
        openai_sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    monkeypatch.setitem(architectures.PUBLISHED, "RN50", known)
    _openclip(tmp_path, {})
    registry.load(path, quick, say=said.append)
    assert len(said) == 1
    with pytest.raises(UserError, match=r"OpenAI's publication\); set model.architecture=RN50$"):
        registry.load(path, gelu)


def test_the_command_line_reads_the_config_too(tmp_path, capsys):
    path, out = checkpoints.write_all(tmp_path, "vit")["openclip"], tmp_path / "out.safetensors"
    assert command.main([str(path)]) == 0
    report = capsys.readouterr().out
    assert "assumed       QuickGELU, heads of 64" in report and "activation" not in report
    _openclip(tmp_path, {}, {"mean": [0.5, 0.5, 0.5], "std": STD})
    assert command.main([str(path)]) == 0
    report = capsys.readouterr().out
    assert "  assumed       heads of 64 channels, the last word ends a text" in report
    assert "  activation    gelu, says open_clip_config.json beside it" in report
    assert "image.activation gelu" in report and "text.activation gelu" in report
    _openclip(tmp_path, {})
    assert command.main([str(path)]) == 0
    assert "  architecture  ViT-B/32-gelu\n" in capsys.readouterr().out
    assert command.main([str(path), f"--out={out}"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ViT-B/32-gelu, ")


def test_a_converted_gelu_file_keeps_its_activation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_CLIP_VOCABULARY", 9)
    path, out = checkpoints.write_all(tmp_path, "vit")["openclip"], tmp_path / "out.safetensors"
    _openclip(tmp_path, {}, {"mean": [0.5, 0.5, 0.5], "std": STD})
    assert command.main([str(path), f"--out={out}", "--format=trm_jax"]) == 0
    assert "assumed: heads of 64 channels, the last word" in capsys.readouterr().out
    stored = registry.read_metadata(out)["config"]
    assert stored["image"]["activation"] == stored["text"]["activation"] == "gelu"
    assert stored["image"]["mean"] == (0.5, 0.5, 0.5)
    expected = convert.from_openclip(checkpoints.half_state("vit"), stored)
    np.testing.assert_array_equal(
        registry.load(out, stored)["params"]["text"]["ln_final"]["bias"],
        expected["params"]["text"]["ln_final"]["bias"],
    )

"""GroupViT from transformers' files: numbers, training, names, and what is stated of weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.oracles.random_variables import random_variables
from trm_jax.models import grouping
from trm_jax.models.clip import config as clip_config
from trm_jax.models.clip import towers
from trm_jax.pretrained import command, convert, hub, identify, registry
from trm_jax.types import UserError

IMAGE = {"kind": "groupvit", "patch_size": 4, "width": 16, "heads": 2, "image_size": 16}
IMAGE |= {"depths": (2, 1, 1), "group_tokens": (6, 3, 0), "output_groups": (6, 3, 0)}
TEXT = {"vocab_size": 20, "context_length": 7, "width": 8, "heads": 2, "layers": 2, "eos_id": 19}
CONFIG = {"embed_dim": 6, "projector_hidden": 12, "image": IMAGE, "text": TEXT}
TOKENS = np.array([[18, 3, 5, 19, 0, 0, 0], [18, 7, 19, 0, 0, 0, 0], [18, 9, 2, 4, 5, 6, 19]])
PUBLISHED_PARAMETERS = 55_726_609
VIT = {"kind": "vit", "patch_size": 8, "width": 8, "layers": 1, "heads": 1, "image_size": 16}


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def _images(height, width, count=3):
    return np.random.default_rng(height).uniform(size=(count, height, width, 3)).astype(np.float32)


def _pixels(images):
    """What torch gets: normalised by ImageNet's mean and deviation, channels first."""
    normalised = (images - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return normalised.transpose(0, 3, 1, 2).astype(np.float32)


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("torch")
    from tests.oracles import transformers_groupvit

    return transformers_groupvit


@pytest.fixture(scope="module")
def loaded(oracle, tmp_path_factory):
    """(transformers' model, our variables, which went through a file)."""
    model = oracle.tiny()
    path = tmp_path_factory.mktemp("groupvit") / "model.safetensors"
    safetensors.numpy.save_file(oracle.state_dict(model), path)
    return model, registry.load(path, CONFIG)


@pytest.mark.parity
@pytest.mark.parametrize("size", [(16, 16), (24, 32)])
def test_images_match_transformers(oracle, loaded, size):
    model, variables = loaded
    images = _images(*size)
    apply = jax.jit(
        lambda v, x: (
            towers.build(CONFIG).apply(v, x, method="segment"),
            towers.build(CONFIG).apply(v, x, method="encode_image"),
        )
    )
    (groups, assignment, embedding), (pooled, dense) = jax.device_get(apply(variables, images))
    expected, expected_groups, soft = oracle.image_features(model, _pixels(images))
    product = (soft[0].mT @ soft[1].mT).detach().numpy()
    cells = (size[0] // 4, size[1] // 4)
    assert soft[0].min() < 0.05 and soft[0].max() > 0.6  # neither flat nor saturated
    np.testing.assert_allclose(assignment, product.reshape(3, *cells, 3), atol=1e-5)
    np.testing.assert_allclose(groups, expected_groups.detach(), atol=1e-5)
    np.testing.assert_allclose(embedding, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(pooled, embedding, atol=1e-6)
    by_patch = product @ expected_groups.detach().numpy()
    np.testing.assert_allclose(dense, by_patch, atol=1e-5)


@pytest.mark.parity
def test_the_whole_forward_pass_matches_transformers(oracle, loaded):
    model, variables = loaded
    images = _images(16, 16)
    net = towers.build(CONFIG)
    image, text, scale = jax.jit(net.apply)(variables, images, TOKENS)
    np.testing.assert_allclose(text, oracle.text_features(model, TOKENS), atol=1e-5)
    np.testing.assert_allclose(scale, model.logit_scale.detach(), rtol=1e-6)
    for found, expected in zip(
        (image, text), oracle.outputs(model, _pixels(images), TOKENS), strict=True
    ):
        unit = found / np.linalg.norm(found, axis=-1, keepdims=True)
        np.testing.assert_allclose(unit, expected, atol=1e-5)


@pytest.mark.parity
def test_hard_assignments_match_transformers(oracle):
    import torch
    from transformers.models.groupvit import modeling_groupvit

    rng = np.random.default_rng(0)
    logits, weights = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    theirs = torch.tensor(logits, requires_grad=True)
    hard = modeling_groupvit.hard_softmax(theirs, dim=-2)
    (hard * torch.tensor(weights)).sum().backward()
    gradient = jax.grad(lambda x: (grouping.hard_assignment(x) * weights).sum())(logits)
    np.testing.assert_allclose(grouping.hard_assignment(logits), hard.detach(), atol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-6)


@pytest.mark.parity
def test_training_matches_transformers_given_the_same_noise(oracle, monkeypatch):
    """Gumbel noise, batch statistics, and the gradient of every parameter of both towers."""
    import torch

    config = CONFIG | {"image": IMAGE | {"drop_path": 0.0}}
    model, net = oracle.tiny(1).train(), towers.build(config)
    variables = convert.from_openclip(oracle.state_dict(model), config)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(4, (6, 16)), (5, (3, 6))]  # blocks have the numbers 0 to 3
    noise = [torch.tensor(np.array(grouping.gumbel_noise(keys, *shape))) for shape in shapes]
    remaining = iter(noise)
    monkeypatch.setattr(
        torch.distributions.gumbel.Gumbel, "sample", lambda self, shape: next(remaining)
    )
    images = _images(16, 16)
    weights = np.random.default_rng(5).normal(size=(2, 3, 6)).astype(np.float32)

    def loss(params):
        (image, text, _), new = net.apply(
            {**variables, "params": params}, images, TOKENS, True, keys, mutable=["batch_stats"]
        )
        return (jnp.stack([image, text]) * weights).sum(), new["batch_stats"]

    (value, statistics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    image = oracle.image_features(model, _pixels(images))[0]
    text = model.text_projection(model.text_model(torch.tensor(TOKENS)).pooler_output)
    expected = (torch.stack([image, text]) * torch.tensor(weights)).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-4)
    found = convert.to_transformers({"params": gradient, "batch_stats": statistics})
    for name, parameter in model.named_parameters():
        theirs = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        np.testing.assert_allclose(
            found[name], theirs, atol=2e-5 + 1e-4 * np.abs(theirs).max(), err_msg=name
        )
    assert (
        np.abs(found["vision_model.encoder.stages.0.downsample.assign.q_proj.weight"]).max() > 0.5
    )
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            np.testing.assert_allclose(found[name], buffer, atol=1e-5)
        elif name.endswith("running_var"):  # torch's is unbiased: three rows make 3 / 2
            before = oracle.state_dict(oracle.tiny(1))[name]
            moved = 0.9 * before + (np.asarray(buffer) - 0.9 * before) * 2 / 3
            np.testing.assert_allclose(found[name], moved, rtol=1e-4)


@pytest.mark.parity
def test_the_published_model_has_this_many_parameters(oracle):
    assert oracle.parameters_of_the_published_model() == PUBLISHED_PARAMETERS
    spec = towers.abstract_variables(registry.architecture("groupvit"))
    assert towers.count_parameters(spec["params"]) == PUBLISHED_PARAMETERS


def test_the_architecture_is_the_published_one_under_three_names():
    config = registry.architecture("groupvit")
    assert config["image"] == {
        "kind": "groupvit",
        "patch_size": 16,
        "width": 384,
        "heads": 6,
        "depths": (6, 3, 3),
        "group_tokens": (64, 8, 0),
        "output_groups": (64, 8, 0),
        "drop_path": 0.1,
        "activation": "gelu",
        "initializer_range": 0.02,
        "image_size": 224,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    assert (config["embed_dim"], config["projector_hidden"]) == (256, 4096)
    assert (config["text"]["width"], config["text"]["heads"]) == (256, 4)
    assert (config["text"]["layers"], config["text"]["activation"]) == (12, "quick_gelu")
    for name in ("nvidia/groupvit-gcc-yfcc", "nvidia/groupvit-gcc-redcaps"):
        assert registry.architecture(name) == config


def test_each_repository_is_asked_for_its_own_weights(monkeypatch, tmp_path):
    (tmp_path / "home/.cache/clip").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda *where: asked.append(where[0]) or tmp_path / "a")
    for name in ("groupvit", "nvidia/groupvit-gcc-yfcc", "nvidia/groupvit-gcc-redcaps"):
        registry.resolve(name)
    assert asked == ["nvidia/groupvit-gcc-yfcc"] * 2 + ["nvidia/groupvit-gcc-redcaps"]


def test_both_directions_are_bit_exact_and_counters_are_passed_over(tmp_path):
    variables = random_variables(CONFIG)
    state = convert.to_transformers(variables)
    assert state["vision_model.encoder.stages.1.group_token"].shape == (1, 3, 16)
    state["visual_projection.1.num_batches_tracked"] = np.array(7)
    state["text_model.embeddings.position_ids"] = np.arange(7)[None]
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    back = registry.load(tmp_path, CONFIG)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_other_models_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    state = convert.to_transformers(random_variables(CONFIG))
    clip = {"embed_dim": 6, "image": VIT, "text": TEXT}
    safetensors.numpy.save_file(state, path)
    with pytest.raises(UserError, match="are those of a GroupViT; set model.architecture=groupvit"):
        registry.load(path, clip)
    larger = CONFIG | {"image": IMAGE | {"image_size": 32}}
    with pytest.raises(UserError, match=r"position_embeddings is \[1, 16, 16\].*needs \[1, 64, 16"):
        registry.load(path, larger)
    with pytest.raises(UserError, match="lack image.proj, text.text_projection and have the unexp"):
        registry.load(path, CONFIG | {"projector_hidden": 0})
    state["visual_projection.1.running_var"][3] = np.nan
    safetensors.numpy.save_file(state, path)
    with pytest.raises(UserError, match="visual_projection.1.running_var has numbers .*not finite"):
        registry.load(path, CONFIG)
    safetensors.numpy.save_file(convert.to_openclip(random_variables(clip)), path)
    with pytest.raises(UserError, match="lack .* and have the unexpected"):
        registry.load(path, CONFIG)


def test_forms_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="'groupvit' has no OpenCLIP form"):
        convert.to_openclip(random_variables(CONFIG))
    plain = CONFIG | {"projector_hidden": 0}
    for config in (plain, {"embed_dim": 6, "image": VIT, "text": TEXT}):
        with pytest.raises(UserError, match="only a GroupViT with model.clip.projector_hidden"):
            convert.to_transformers(random_variables(config))


def test_own_files_keep_batch_statistics_and_leave_what_training_draws_to_the_reader(tmp_path):
    path, variables = tmp_path / "own.safetensors", random_variables(CONFIG)
    registry.save(path, variables, config=CONFIG, tokenizer={"kind": "clip"}, provenance={})
    other = CONFIG | {"image": IMAGE | {"drop_path": 0.3, "initializer_range": 0.1}}
    jax.tree.map(np.testing.assert_array_equal, registry.load(path, other), variables)
    with pytest.raises(UserError, match=r"model\.clip\.projector_hidden \(12, not 0\)"):
        registry.load(path, CONFIG | {"projector_hidden": 0})


def test_shapes_tell_the_architecture(tmp_path, capsys):
    shapes = identify.shapes_of("groupvit")
    assert identify.named(identify.infer(shapes)) == "groupvit"
    lost = {name: shape for name, shape in shapes.items() if "logit" not in name}
    assert identify.nearest(lost) == ("groupvit", identify.compare(lost, shapes))
    path, out = tmp_path / "model.safetensors", tmp_path / "own.safetensors"
    config = CONFIG | {"image": IMAGE | {"heads": 1}, "text": TEXT | {"heads": 1}}
    variables = random_variables(config)
    safetensors.numpy.save_file(convert.to_transformers(variables), path)
    assert command.main([str(path)]) == 0
    printed = capsys.readouterr().out
    count = towers.count_parameters(variables["params"])
    assert "transformers' names" in printed and f"{count:,}" in printed
    assert "image.depths (2, 1, 1)" in printed and printed.count("nothing") == 3
    state = convert.to_transformers(variables)
    shapes = {name: array.shape for name, array in state.items()}
    assert identify.infer(shapes) == towers.validate(config)
    assert command.main([str(path), f"--out={out}"]) == 2
    assert "'groupvit' has no OpenCLIP form" in capsys.readouterr().err


def _write(folder, config, preprocessor=None):
    safetensors.numpy.save_file(
        convert.to_transformers(random_variables(CONFIG)), folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def test_the_config_beside_the_weights_is_checked(tmp_path):
    # As the published files are: their processor has CLIP's pixels, which nothing was trained on.
    pixels = {
        "image_mean": list(clip_config.CLIP_MEAN),
        "image_std": list(clip_config.CLIP_STD),
    }
    config = {"model_type": "groupvit", "vision_config": {}, "text_config": {}}
    _write(tmp_path, config, pixels)
    said = []
    registry.load(tmp_path, CONFIG, say=said.append)
    assert said == []
    wrong = CONFIG | {"image": IMAGE | {"activation": "quick_gelu"}}
    with pytest.raises(UserError, match="needs image.activation gelu, not quick_gelu"):
        registry.load(tmp_path, wrong)
    _write(tmp_path, config | {"text_config": {"hidden_act": "gelu"}})
    with pytest.raises(UserError, match="needs text.activation gelu, not quick_gelu"):
        registry.load(tmp_path, CONFIG)
    _write(tmp_path, config, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    with pytest.raises(UserError, match="needs image.mean"):
        registry.load(tmp_path, CONFIG)


def test_what_is_assumed_without_a_config_is_said(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(convert.to_transformers(random_variables(CONFIG)), path)
    said = []
    registry.load(path, CONFIG, say=said.append)
    assert said == [
        f"note: no config file beside {path} says its activations; gelu, quick_gelu (image, text) "
        "are assumed, as configured"
    ]


@pytest.mark.parametrize("repository", ["groupvit-gcc-yfcc", "groupvit-gcc-redcaps"])
def test_nvidias_weights_have_imagenets_pixels(tmp_path, repository):
    folder = tmp_path / f"models--nvidia--{repository}/snapshots/{'ab' * 20}"
    folder.mkdir(parents=True)
    _write(folder, {"model_type": "groupvit"}, {"image_mean": [0.5] * 3})
    registry.load(folder / "model.safetensors", CONFIG)
    clip = IMAGE | {"mean": clip_config.CLIP_MEAN, "std": clip_config.CLIP_STD}
    with pytest.raises(UserError, match="says NVIDIA's publication.*set model.clip.image.mean="):
        registry.load(folder / "model.safetensors", CONFIG | {"image": clip})

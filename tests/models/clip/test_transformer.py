"""Attention and activations of the transformer block against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trm_jax.models.clip import transformer


def test_activations_at_hand_worked_points():
    x = jnp.array([-1.0, 0.0, 2.0])
    quick = [-1 / (1 + math.exp(1.702)), 0, 2 / (1 + math.exp(-3.404))]
    np.testing.assert_allclose(transformer.quick_gelu(x), quick, atol=1e-6)
    exact = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in (-1, 0, 2)]
    np.testing.assert_allclose(transformer.gelu(x), exact, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_attend_matches_numpy(masked):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 4, 3, 5)).astype(np.float32) for _ in range(3))
    mask = np.tril(np.ones((4, 4), bool)) if masked else None
    scores = np.einsum("nqhc,nkhc->nhqk", query, key) / math.sqrt(5)
    weights = np.exp(scores) * (mask if masked else 1.0)
    weights = weights / weights.sum(-1, keepdims=True)
    expected = np.einsum("nhqk,nkhc->nqhc", weights, value)
    actual = transformer.attend(query, key, value, mask[None] if masked else None)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_reading_a_row_is_the_row_of_the_whole_block(masked):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)
    rows = jnp.array([4, 0, 2])
    causal = jnp.tril(jnp.ones((5, 5), bool)) if masked else jnp.ones((5, 5), bool)
    block = transformer.Block(8, 2, 1)
    variables = block.init(jax.random.key(0), x)
    whole = block.apply(variables, x, causal[None])
    row = block.apply(variables, x, rows, causal[rows], method="read")
    np.testing.assert_allclose(row, whole[jnp.arange(3), rows], atol=1e-6)


def test_the_cudnn_kernel_gets_what_it_can_do_and_gives_the_same(monkeypatch):
    asked = []
    original = jax.nn.dot_product_attention

    def stand_in(query, key, value, *, implementation):
        asked.append((implementation, query.shape))
        return original(query, key, value, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    blocks = [
        transformer.Block(8, 2, 1, "gelu", jnp.bfloat16, kernel) for kernel in ("xla", "cudnn")
    ]
    variables = blocks[0].init(jax.random.key(0), x)
    plain, fused = (block.apply(variables, x) for block in blocks)
    assert asked == [("cudnn", (2, 5, 2, 4))]
    np.testing.assert_allclose(plain, fused, atol=2e-2)
    causal = jnp.tril(jnp.ones((5, 5), bool))[None]
    blocks[1].apply(variables, x, causal)  # masked, read by one row, float32: by XLA
    blocks[1].apply(variables, x, jnp.zeros(2, jnp.int32), method="read")
    transformer.Block(8, 2, 1, kernel="cudnn").apply(variables, x)
    assert len(asked) == 1

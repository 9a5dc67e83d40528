"""CARL against a numpy oracle that follows the equations in their written order."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles.random_variables import random_module
from trm_jax.models import region_attention
from trm_jax.models.clip.towers import count_parameters
from trm_jax.types import UserError

N, C, HW, D = 2, 3, 5, 8


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _norm(x, p):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def _linear(x, p):
    return x @ p["kernel"] + p["bias"]


def _gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def _oracle(p, f):
    """Eq. 2-3 in float64, keys projected position by position."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    q = p["queries"]
    if "self_query" in p:
        x = _norm(q, p["self_norm"])
        scores = _linear(x, p["self_query"]) @ _linear(x, p["self_key"]).T / np.sqrt(D)
        q = q + _linear(_softmax(scores) @ _linear(x, p["self_value"]), p["self_out"])
    query = _linear(_norm(q, p["query_norm"]), p["query"])
    keys = _linear(_norm(f, p["feature_norm"]), p["key"])
    values = _linear(_norm(f, p["feature_norm"]), p["value"])
    energies = np.einsum("cd,npd->ncp", query, keys) / np.sqrt(D)
    hidden = _linear(np.einsum("ncp,npd->ncd", _softmax(energies), values), p["out"])
    mlp = _linear(_norm(hidden, p["hidden_norm"]), p["mlp"]["fc1"])
    return energies, hidden + _linear(_gelu(mlp), p["mlp"]["fc2"])


@pytest.mark.parametrize("self_attention", [False, True])
def test_matches_the_oracle(self_attention):
    module = region_attention.RegionAttention(C, D, self_attention)
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(N, HW, D)).astype(np.float32)
    params = random_module(module, dense)["params"]
    energies, features = jax.jit(module.apply)({"params": params}, dense)
    expected = _oracle(params, dense.astype(np.float64))
    np.testing.assert_allclose(energies, expected[0], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(features, expected[1], atol=5e-5, rtol=1e-5)


def test_region_features_are_the_normalised_weighted_sum():
    rng = np.random.default_rng(1)
    energies = rng.normal(size=(N, C, HW)).astype(np.float32) * 4
    dense = rng.normal(size=(N, HW, D)).astype(np.float32)
    r = 1 / (1 + np.exp(-energies))
    expected = np.einsum("ncp,npd->ncd", r, dense) / r.sum(-1, keepdims=True)
    actual = region_attention.region_features(energies, dense)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_extreme_energies_give_the_mean_and_finite_gradients(level):
    dense = np.random.default_rng(2).normal(size=(N, HW, D)).astype(np.float32)
    energies = jnp.full((N, C, HW), level)

    def loss(energies, dense):
        return (region_attention.region_features(energies, dense) ** 2).sum()

    features = region_attention.region_features(energies, dense)
    expected = np.broadcast_to(dense.mean(1)[:, None], (N, C, D))
    np.testing.assert_allclose(features, expected, atol=1e-5)
    for gradient in jax.jit(jax.grad(loss, (0, 1)))(energies, jnp.asarray(dense)):
        assert np.isfinite(gradient).all()


def test_top_pixels_ranks_by_energy_even_where_the_sigmoid_saturates():
    energies = jnp.array([[[50.0, 70.0, 60.0, -1.0], [0.0, -3.0, 0.0, 2.0]]])
    dense = jnp.arange(4.0)[None, :, None] * jnp.ones((1, 1, 2))
    found = region_attention.top_pixels(energies, dense, 2)
    np.testing.assert_array_equal(found[0, :, :, 0], [[1, 2], [3, 0]])
    with pytest.raises(UserError, match="k = 5 pixels exceed the 4 positions"):
        region_attention.top_pixels(energies, dense, 5)


def _count(module, shape):
    return count_parameters(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape)))


@pytest.mark.parametrize(("dim", "expected"), [(512, 5_819_392), (1024, 23_173_120)])
def test_parameters_for_80_classes(dim, expected):
    attention = _count(region_attention.RegionAttention(80, dim), (1, 4, dim))
    assert attention == 4 * dim**2 + 4 * dim + 8 * dim**2 + 5 * dim + 6 * dim + 80 * dim
    text = _count(region_attention.text_projection(dim), (1, dim))
    regions = _count(region_attention.region_projection(dim), (1, dim))
    assert attention + text + regions == expected


def test_mlp_is_two_biased_layers_around_a_relu():
    module = region_attention.text_projection(D)
    x = np.random.default_rng(3).normal(size=(4, D)).astype(np.float32)
    params = random_module(module, x)["params"]
    expected = _linear(np.maximum(_linear(x, params["fc1"]), 0), params["fc2"])
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


def test_an_identity_start_attends_where_image_and_text_agree():
    module = region_attention.RegionAttention(C, D, True, kernel_init="identity")
    rng = np.random.default_rng(4)
    dense = rng.normal(size=(N, HW, D)).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), dense)["params"]
    layers = {name: part for name, part in params.items() if isinstance(part, dict)}
    kernels = {name: part["kernel"] for name, part in layers.items() if "kernel" in part}
    identities = {name for name, kernel in kernels.items() if np.array_equal(kernel, np.eye(D))}
    assert identities == {"query", "key", "value", "out"} < set(kernels)
    module = region_attention.RegionAttention(C, D, kernel_init="identity")
    plain = {"scale": np.ones(D), "bias": np.zeros(D)}
    energies, _ = module.apply({"params": params}, dense)
    queries = _norm(np.asarray(params["queries"], np.float64), plain)
    expected = np.einsum("cd,npd->ncp", queries, _norm(dense, plain)) / np.sqrt(D)
    np.testing.assert_allclose(energies, expected, atol=1e-5)


def test_initial_queries_are_replaced_and_their_shape_checked():
    module = region_attention.RegionAttention(C, D)
    params = random_module(module, jnp.zeros((1, 2, D)))["params"]
    queries = np.ones((C, D), np.float32)
    replaced = region_attention.with_queries(params, queries)
    np.testing.assert_array_equal(replaced["queries"], queries)
    assert replaced["query"] is params["query"]
    with pytest.raises(UserError, match=r"shape \[3, 7\], the region attention needs \[3, 8\]"):
        region_attention.with_queries(params, queries[:, :7])

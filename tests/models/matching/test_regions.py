"""The projection of region features: numbers, a zero region, and how it starts."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracles.random_variables import random_module
from trm_jax.models.matching.regions import RegionEncoder

ENCODER = RegionEncoder(5)


def test_regions_are_projected_and_of_unit_norm():
    regions = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float16)
    params = random_module(ENCODER, regions)["params"]
    layer = {name: np.asarray(leaf, np.float64) for name, leaf in params["projection"].items()}
    x = regions.astype(np.float64) @ layer["kernel"] + layer["bias"]
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True)
    found = ENCODER.apply({"params": params}, regions)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    half = RegionEncoder(5, jnp.bfloat16).apply({"params": params}, regions)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(half, axis=-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(half, expected, atol=2e-2)


def test_a_region_of_zeros_has_a_finite_gradient():
    params = {"projection": {"kernel": jnp.ones((4, 5)), "bias": jnp.zeros(5)}}

    def loss(params, regions):
        return ENCODER.apply({"params": params}, regions)[..., 0].sum()

    gradients = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.zeros((1, 2, 4)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_weights_start_as_xavier_and_biases_as_zero():
    init = jax.jit(ENCODER.init)
    layer = init(jax.random.key(0), jnp.zeros((1, 1, 400)))["params"]["projection"]
    bound = np.sqrt(6 / 405)
    assert 0.99 * bound < np.abs(layer["kernel"]).max() <= bound
    np.testing.assert_allclose(layer["kernel"].std(), bound / np.sqrt(3), rtol=0.05)
    assert not layer["bias"].any()

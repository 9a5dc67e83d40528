"""Causality, the EOS rule and rematerialisation of the text tower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles.random_variables import random_module
from trm_jax.models.clip.text import TextTower
from trm_jax.types import UserError

TOWER = TextTower(6, 20, 12, 8, 2, 2, "quick_gelu", 3)
APPLY = jax.jit(TOWER.apply, static_argnames="method")


@pytest.fixture(scope="module")
def variables():
    return random_module(TOWER, jnp.zeros((1, 1), jnp.int32))


def test_tokens_after_the_first_eos_change_nothing(variables):
    tokens = np.array([[2, 7, 8, 3, 0, 0, 0, 0], [2, 7, 8, 3, 9, 3, 11, 3]])
    first, second = APPLY(variables, tokens)
    np.testing.assert_array_equal(first, second)
    short = APPLY(variables, tokens[:1, :4])[0]
    np.testing.assert_allclose(first, short, atol=1e-6)


def test_tokens_before_the_eos_do_change_it(variables):
    tokens = np.array([[2, 7, 8, 3], [2, 9, 8, 3]])
    first, second = APPLY(variables, tokens)
    assert np.abs(first - second).max() > 1e-4


def test_without_an_eos_the_last_position_is_read(variables):
    tokens = np.array([[2, 7, 8, 9]])
    embeddings = APPLY(variables, tokens, method="embed_tokens")
    expected = APPLY(variables, embeddings, np.array([3]), method="encode_prompts")
    np.testing.assert_array_equal(APPLY(variables, tokens), expected)


def test_rematerialised_blocks_give_the_same_gradients(variables):
    tokens = np.array([[2, 7, 8, 3]])
    embeddings = APPLY(variables, tokens, method="embed_tokens")

    def gradient(tower):
        def loss(x):
            return tower.apply(variables, x, jnp.array([3]), method="encode_prompts").sum()

        return jax.jit(jax.grad(loss))(embeddings)

    expected = gradient(TOWER)
    assert np.abs(expected[0, :3]).min() > 0  # gradients reach every token, through the EOS
    tolerance = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(gradient(TOWER.clone(remat=True)), expected, atol=tolerance)


def test_a_text_over_the_context_length_is_refused(variables):
    with pytest.raises(UserError, match="13 tokens exceeds model.clip.text.context_length 12"):
        APPLY(variables, np.zeros((1, 13), np.int32))

"""The prompts that methods share: where contexts start and what the negative prompt says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import small
from trm_jax.methods import dualcoop
from trm_jax.methods.frozen_clip import Prompts
from trm_jax.types import UserError


@pytest.mark.parametrize("class_specific", [True, False])
def test_prompts_that_start_from_words_are_sentences(class_specific):
    settings = Prompts(
        length=3, class_specific=class_specific, initial_words="photo of a", negative_names=False
    )
    method = small.make(dualcoop, prompts=settings)
    params, _ = small.init(method)
    text = jax.jit(method.predict["prepare"])(params, {}, {})
    net = small.towers()
    for sign, names in (("negative", [""] * 5), ("positive", small.NAMES)):
        tokens = small.TOKENIZER([f"photo of a {name}." for name in names], 12)
        expected = net.apply(params["clip"], tokens, method="encode_text")
        np.testing.assert_allclose(text[f"text_{sign}"], expected, atol=1e-5)


def test_prompts_that_start_from_words_are_float32_in_any_compute_dtype():
    settings = Prompts(length=3, initial_words="photo of a")
    method = small.make(dualcoop, prompts=settings, dtype=jnp.bfloat16)
    params, _ = small.init(method)
    assert {leaf.dtype for leaf in jax.tree.leaves(params["prompts"])} == {np.dtype("float32")}


def test_with_names_in_both_prompts_the_words_cancel():
    settings = Prompts(length=3, initial_words="photo of a")
    method = small.make(dualcoop, prompts=settings)
    params, _ = small.init(method)
    scores = jax.jit(method.predict["scores"])(params, {}, small.batch(1))["scores"]
    np.testing.assert_allclose(scores, 0.5, atol=1e-6)


def test_words_of_another_length_are_refused():
    with pytest.raises(UserError, match="'a photo' has 2 tokens; set prompts.length, now 3, to it"):
        small.make(dualcoop, prompts=Prompts(length=3, initial_words="a photo"))

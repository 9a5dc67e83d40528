"""Dual prompts: assembly, lengths and parameter count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles.random_variables import random_variables
from trm_jax.models import prompts
from trm_jax.models.clip import towers
from trm_jax.types import UserError

WORDS = ["<pad>", "<unk>", "<sos>", "<eos>", ".", "a", "photo", "of", "traffic", "light", "cat"]


class Tokenizer:
    """One token per word, the full stop apart."""

    eos_id = 3

    def encode(self, text):
        return [WORDS.index(word) for word in text.replace(".", " .").split()]


CONFIG = {
    "embed_dim": 8,
    "image": {"kind": "features", "width": 4, "hidden": 4},
    "text": {
        "vocab_size": len(WORDS),
        "context_length": 12,
        "width": 8,
        "heads": 2,
        "layers": 2,
        "eos_id": 3,
    },
}
NAMES = ("traffic_light", "cat")


def test_class_token_ids():
    ids, lengths = prompts.class_token_ids(NAMES, Tokenizer())
    np.testing.assert_array_equal(ids, [[8, 9, 4, 3], [10, 4, 3, 0]])
    np.testing.assert_array_equal(lengths, [4, 3])


@pytest.mark.parametrize(
    ("context", "limit", "expected"), [(3, 77, 8), (4, 77, 16), (4, 12, 12), (16, 77, 24)]
)
def test_prompt_length_rounds_up_to_eight_within_the_context_length(context, limit, expected):
    lengths = np.array([4, 3])
    found = prompts.prompt_length(NAMES, lengths, context=context, context_length=limit)
    assert found == expected


def test_a_name_that_does_not_fit_is_named():
    with pytest.raises(UserError, match="'traffic_light' makes a prompt of 21 tokens, over"):
        prompts.prompt_length(NAMES, np.array([4, 3]), context=16, context_length=20)


@pytest.mark.parametrize("class_specific", [True, False])
@pytest.mark.parametrize("negatives", [NAMES, ["", ""]])
def test_contexts_that_spell_words_give_the_features_of_the_sentences(class_specific, negatives):
    net = towers.build(CONFIG)
    variables = random_variables(CONFIG)
    apply = jax.jit(net.apply, static_argnames="method")

    def embed(tokens):
        return apply(variables, np.asarray(tokens), method="embed_tokens")

    tokenizer = Tokenizer()
    names = [*negatives, *NAMES]
    ids, lengths = prompts.class_token_ids(names, tokenizer)
    total = prompts.prompt_length(names, lengths, context=3, context_length=12)
    module = prompts.DualPrompts(2, 8, length=3, class_specific=class_specific)
    phrases = {"negative": "of photo a", "positive": "a photo of"}
    contexts = {name: embed(tokenizer.encode(text)) for name, text in phrases.items()}
    if class_specific:
        contexts = {name: jnp.stack([c, c]) for name, c in contexts.items()}
    embeddings, eos = module.apply({"params": contexts}, embed([2]), embed(ids), lengths, total)
    assert embeddings.shape == (4, 8, 8)
    actual = apply(variables, embeddings, eos, method="encode_prompts")

    contexts_of = [phrases["negative"]] * 2 + [phrases["positive"]] * 2
    texts = [f"{c} {n.replace('_', ' ')}." for c, n in zip(contexts_of, names, strict=True)]
    tokens = np.zeros((4, 10), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        sentence = [2, *tokenizer.encode(text), 3]
        row[: len(sentence)] = sentence
    expected = apply(variables, tokens, method="encode_text")
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_initial_contexts_and_the_papers_count():
    module = prompts.DualPrompts(80, 512)
    arguments = (jnp.zeros((1, 512)), jnp.zeros((160, 5, 512)), np.full(160, 5), 24)
    spec = jax.eval_shape(lambda key: module.init(key, *arguments), jax.random.key(0))
    assert towers.count_parameters(spec) == 2 * 80 * 16 * 512 == 1_310_720
    small = prompts.DualPrompts(10, 64)
    arguments = (jnp.zeros((1, 64)), jnp.zeros((20, 5, 64)), np.full(20, 5), 24)
    params = small.init(jax.random.key(0), *arguments)["params"]
    assert not np.array_equal(params["negative"], params["positive"])
    for context in params.values():
        np.testing.assert_allclose(np.std(context), 0.02, rtol=0.05)

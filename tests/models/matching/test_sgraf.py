"""SGR and SAF against torch in both modes; blocks, padding, statistics, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.models.matching.pairs import least_gap, padded, pairs
from tests.oracles.random_variables import random_module
from trm_jax.models.clip.towers import count_parameters
from trm_jax.models.matching.sgraf import Sgraf, fold_statistics, with_statistics
from trm_jax.types import UserError

R, D, SIM = 4, 6, 5
MODULES = ("sgr", "saf")


def _module(name, **options):
    return Sgraf(R, name, SIM, **{"dropout": 0.0} | options)


@functools.cache
def _variables(name, growth=5):
    regions, words, mask = pairs((3,), images=2, regions=R, width=D)
    variables = random_module(_module(name), regions, None, words, mask)
    if name == "saf":  # a mean and a variance that are not their defaults
        variables["batch_stats"]["filtration"]["running"] = np.array([0.2, 1.3], np.float32)
    # Weights so large that three steps of reasoning do not make all pairs alike.
    large = {
        k: jax.tree.map(lambda x: growth * x, v)
        for k, v in variables["params"].items()
        if "reas" in k
    }
    params = variables["params"] | large
    # Some words take all the weight in a caption's global vector; padding must not.
    params["caption_global"]["logit"]["kernel"] *= growth**5
    return variables | {"params": params}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(name, train, variables, regions, words, mask, where=None):
    """((scores, statistics), the collections that changed)."""
    return _module(name).apply(
        variables, regions, None, words, mask, train=train, where=where, mutable=["batch_stats"]
    )


def _evaluated(name, regions, words, mask):
    return _scores(name, False, _variables(name), regions, words, mask)[0][0]


@pytest.mark.parity
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_scores_and_statistics_match_torch(name, train):
    import torch

    from tests.oracles import matching

    regions, words, mask = pairs((7, 3, 1, 6, 5), images=5, regions=R, width=D)
    variables = _variables(name)
    oracle = matching.Sgraf(variables, name, biases=0.7)
    expected = oracle.scores(torch.tensor(regions), matching.captions_of(words, mask), train)
    (scores, statistics), changed = _scores(name, train, variables, regions, words, mask)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(scores) > 0.02
    stats = changed["batch_stats"]
    for part in ("local_norm", "whole_norm"):
        mean, var = oracle.running[part]
        np.testing.assert_allclose(stats["image_global"][part]["mean"], mean, atol=1e-6)
        np.testing.assert_allclose(stats["image_global"][part]["var"], var, atol=1e-6)
    if name == "saf":
        # The bias of a gate moves the mean, and nothing else.
        mean, var = (float(x) for x in oracle.running["filtration"])
        if train:
            stats = with_statistics(stats, statistics)
        assert (statistics is not None) == train
        np.testing.assert_allclose(stats["filtration"]["running"], [mean - 0.7, var], atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_padding_and_blocks_change_nothing(name):
    regions, words, mask = pairs((4, 2, 3), images=3, regions=R, width=D)
    scores = _evaluated(name, regions, words, mask)
    np.testing.assert_allclose(_evaluated(name, regions, *padded(words, mask)), scores, atol=1e-6)
    block = _evaluated(name, regions[1:], words[:1], mask[:1])
    np.testing.assert_allclose(block, scores[1:, :1], atol=1e-6)
    assert np.ptp(scores) > 1e-3


def test_captions_in_blocks_train_as_one_batch():
    regions, words, mask = pairs((4, 2, 3, 4), images=3, regions=R, width=D)
    module, variables = _module("saf"), _variables("saf")
    whole, _ = _scores("saf", True, variables, regions, words, mask)

    @jax.jit
    def in_blocks(words, mask):
        images, _ = module.apply(
            variables, regions, True, method="prepare_images", mutable=["batch_stats"]
        )
        captions = module.apply(variables, words, mask, True, method="prepare_captions")

        def block(part):
            words, mask, captions = part
            return module.apply(
                variables, regions, images, words, mask, caption_global=captions, train=True
            )

        parts = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (words, mask, captions))
        return jax.lax.map(jax.checkpoint(block), parts)

    scores, statistics = in_blocks(words, mask)
    np.testing.assert_allclose(scores.transpose(1, 0, 2).reshape(3, 4), whole[0], atol=1e-6)
    np.testing.assert_allclose(statistics.reshape(4, 2), whole[1], atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_images_that_do_not_count_leave_training_alone(name):
    regions, words, mask = pairs((4, 2), images=5, regions=R, width=D)
    variables = _variables(name)
    expected = _scores(name, True, variables, regions[:3], words, mask)
    regions[3:] = 100.0
    where = np.arange(5) < 3
    (scores, statistics), stats = _scores(name, True, variables, regions, words, mask, where)
    np.testing.assert_allclose(scores[:3], expected[0][0], atol=1e-6)
    found = jax.tree.leaves((statistics, stats))
    for one, other in zip(found, jax.tree.leaves((expected[0][1], expected[1])), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_statistics_are_folded_in_the_order_of_captions():
    rng = np.random.default_rng(0)
    statistics, where = rng.normal(size=(6, 2)).astype(np.float32), np.array([1, 0, 1, 1, 0, 1]) > 0
    statistics[1] = np.nan  # does not count
    running = expected = np.array([0.5, 2.0])
    for row in statistics[where]:
        expected = 0.9 * expected + 0.1 * row
    found = fold_statistics(np.float32(running), statistics, where)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    everyone = fold_statistics(np.float32(running), statistics[2:4])
    np.testing.assert_allclose(everyone, 0.81 * running + [0.09, 0.1] @ statistics[2:4], atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_captions_without_words_and_images_of_zeros(name):
    regions, words, mask = pairs((4, 0, 3), images=3, regions=R, width=D)
    regions[1] = 0.0
    words[2, 1] = 0.0
    variables = _variables(name)

    def total(params, regions, words):
        trees = variables | {"params": params}
        (scores, statistics), _ = _module(name).apply(
            trees, regions, None, words, mask, train=True, mutable=["batch_stats"]
        )
        return (scores**2).sum() + scores.sum(), (scores, statistics)

    function = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, (scores, statistics)), gradients = function(variables["params"], regions, words)
    np.testing.assert_array_equal(scores[:, 1], 0.0)
    for leaf in jax.tree.leaves((scores, statistics, gradients)):
        assert np.isfinite(leaf).all()
    np.testing.assert_array_equal(gradients[2][~mask], 0.0)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_by_finite_differences(name):
    regions, words, mask = pairs((3, 2), images=2, regions=R, width=D, seed=2, dtype=np.float64)
    assert least_gap(regions, words, mask) > 1e-3
    variables = jax.tree.map(lambda x: x.astype(np.float64), _variables(name, growth=1))

    def scores(params, regions, words):
        trees = variables | {"params": params}
        (found, _), _ = _module(name).apply(
            trees, regions, None, words, mask, train=True, mutable=["batch_stats"]
        )
        return found

    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, (variables["params"], regions, words))
        check_grads(jax.jit(scores), arguments, order=1, modes=("rev",))


def test_one_word_that_is_what_the_image_shows():
    # One region equal to the only word: both similarity vectors are the normalised biases, the
    # graph's first and only step sees the mean of the two, and everything follows by hand.
    module = Sgraf(1, "sgr", 2, steps=1)
    regions = words = np.array([[[0.6, 0.8]]], np.float32)
    mask = np.ones((1, 1), bool)
    variables = random_module(module, regions, None, words, mask)
    variables["params"]["local_similarity"]["bias"] = np.float32([3.0, 4.0])
    variables["params"]["global_similarity"]["bias"] = np.float32([0.6, 0.8])
    step, score = variables["params"]["reasoning_0"]["out"], variables["params"]["score"]
    seen = np.maximum(np.array([0.6, 0.8]) @ step["kernel"] + step["bias"], 0.0)
    expected = 1 / (1 + np.exp(-(seen @ score["kernel"] + score["bias"])))
    found, _ = jax.jit(module.apply)(variables, regions, None, words, mask)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_dropout_is_drawn_for_the_whole_batch_in_training_alone():
    regions, words, mask = pairs((4, 2), images=3, regions=R, width=D)
    module, variables = _module("sgr", dropout=0.4), _variables("sgr")

    @functools.partial(jax.jit, static_argnums=1)
    def images(seed, train=True):
        return module.apply(
            variables,
            regions,
            train,
            method="prepare_images",
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(seed)},
        )[0]

    assert np.abs(images(0) - images(1)).max() > 1e-3
    np.testing.assert_array_equal(images(0, False), images(1, False))
    # With both vectors given, nothing is random any more: no stream is needed.
    scores = jax.eval_shape(
        lambda vectors: module.apply(
            variables, regions, vectors, words, mask, caption_global=vectors[:2], train=True
        )[0],
        images(0),
    )
    assert scores.shape == (3, 2)


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_precision_of_the_products(precision):
    regions, words, mask = pairs((4,), images=2, regions=R, width=D)
    module = _module("sgr", precision=precision)
    lowered = jax.jit(module.apply).lower(_variables("sgr"), regions, None, words, mask).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    exact = [line for line in products if "HIGHEST" in line]
    # The similarities and the Gram matrix with its product stay exact.
    assert len(exact) == (len(products) if precision == "highest" else 3)


@pytest.mark.parametrize("name", MODULES)
def test_parameters_of_the_published_sizes(name):
    d, s, r = 1024, 256, 36
    module = Sgraf(r, name)
    shapes = jnp.zeros((1, r, d)), None, jnp.zeros((1, 2, d)), jnp.ones((1, 2), bool)
    spec = jax.eval_shape(lambda key: module.init(key, *shapes), jax.random.key(0))
    own_global = 2 * (d * d + d) + d
    shared = 2 * own_global + 2 * (r + d) + 2 * (d * s + s) + s + 1
    extra = 3 * (3 * s * s + 2 * s) if name == "sgr" else s + 2
    assert count_parameters(spec["params"]) == shared + extra


def test_another_number_of_regions_is_refused():
    regions, words, mask = pairs((2,), images=1, regions=3, width=D)
    with pytest.raises(UserError, match="images have 3 regions, the model was built for 4"):
        _module("sgr").init(jax.random.key(0), regions, None, words, mask)
    with pytest.raises(UserError, match="scorer.module = 'both' must be one of sgr, saf"):
        _module("both").init(jax.random.key(0), regions, None, words, mask)

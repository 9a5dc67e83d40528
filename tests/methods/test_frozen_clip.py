"""The prompts that methods share: where contexts start and what the negative prompt says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.methods import small
from trm_jax.methods import dualcoop
from trm_jax.methods.frozen_clip import Prompts
from trm_jax.train import sharding
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


def _deep(**options):
    """DualCoOp on a text tower of four blocks, with its params."""
    text = {**small.CLIP["text"], "layers": 4}
    method = small.make(dualcoop, clip={**small.CLIP, "text": text}, **options)
    return method, small.init(method)[0]


def test_rematerialised_prompts_have_the_same_gradient_in_less_memory():
    temporary, results = [], []
    for remat in (False, True):
        method, params = _deep(prompts=Prompts(length=2, remat=remat))
        data = jax.device_put(small.batch(0))

        def loss(prompts, method=method, params=params, data=data):
            tree = params | {"prompts": prompts}
            return method.loss(tree, {}, data, key=small.KEY, step=0, train=True).loss

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params["prompts"]).compile()
        results.append(compiled(params["prompts"]))
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8)
    assert temporary[1] < 0.6 * temporary[0]


@pytest.mark.parametrize("devices", [4, 8])  # ten prompts: neither divides them
def test_devices_share_the_prompts(devices):
    method, params = _deep()

    def compiled():
        function = jax.jit(lambda p: method.predict["prepare"](p, {}, {}))
        return function.lower(params).compile()

    alone = compiled()
    with jax.set_mesh(sharding.make_mesh(-1, 1, jax.devices()[:devices])):
        shared = compiled()
        text = shared(params)
    for name, expected in alone(params).items():
        np.testing.assert_allclose(text[name], expected, rtol=1e-5, atol=1e-6)
        assert text[name].sharding.is_fully_replicated
    share = shared.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
    assert share < 1.2 * -(-10 // devices) / 10


@pytest.mark.parametrize("make", [tiny.trm_ml, tiny.dualcoop])
def test_the_image_tower_runs_forward_only(make, tmp_path):
    config = make()
    config.data.cache_features = False
    built = tiny.build(config, tmp_path)
    job = built.job
    data = jax.device_put(next(job.batches(0)))
    params, extras = job.init()
    clip = {"clip": params["clip"]}

    def loss(trained):
        key = jax.random.key(0)
        return job.method.loss(trained | clip, extras, data, key=key, step=0, train=True).loss

    trained = {k: v for k, v in params.items() if k != "clip"}
    once = _convolutions(jax.make_jaxpr(loss)(trained).jaxpr)
    assert once == _convolutions(jax.make_jaxpr(jax.value_and_grad(loss))(trained).jaxpr)
    assert once == 3 + 2 * 3 + 2  # stem, two bottlenecks, their shortcuts


def _convolutions(jaxpr) -> int:
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "conv_general_dilated"
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            count += _convolutions(inner) if hasattr(inner, "eqns") else 0
    return count

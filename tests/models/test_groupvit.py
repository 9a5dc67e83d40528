"""GroupViT without torch: assignments, noise, projectors, memory; parity is in tests/pretrained."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles.random_variables import random_module, random_variables
from trm_jax.models import grouping
from trm_jax.models.clip import towers
from trm_jax.models.clip.config import validate
from trm_jax.models.groupvit import Stage
from trm_jax.types import UserError

IMAGE = {"kind": "groupvit", "patch_size": 4, "width": 8, "heads": 2, "image_size": 8}
IMAGE |= {"depths": (2, 1), "group_tokens": (3, 0), "output_groups": (3, 0), "drop_path": 0.6}
TEXT = {"vocab_size": 9, "context_length": 7, "width": 8, "heads": 2, "layers": 1, "eos_id": 3}
CONFIG = {"embed_dim": 6, "projector_hidden": 5, "image": IMAGE, "text": TEXT}
VIT = {"kind": "vit", "patch_size": 4, "width": 8, "layers": 2, "heads": 2, "image_size": 8}
TOKENS = np.array([[2, 5, 3], [2, 3, 0], [4, 4, 3], [6, 8, 3]])


@pytest.fixture(scope="module")
def variables():
    found = random_variables(CONFIG)
    found["params"]["image"]["stage_0"]["grouping"]["assign"]["q_proj"]["kernel"] *= 10  # not flat
    return found


@pytest.fixture(scope="module")
def segmented(variables):
    """{dtype: (what `segment` returns, what `encode_image` returns)} of oblong images."""

    def both(net, images):
        return net.segment(images), net.encode_image(images)

    return {
        dtype: jax.device_get(
            jax.jit(functools.partial(towers.build(CONFIG, dtype=dtype).apply, method=both))(
                variables, _images(12, 8)
            )
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    }


def _images(height=8, width=8, count=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def _keys(count=4):
    return jax.random.split(jax.random.key(7), count)


@functools.partial(jax.jit, static_argnames=("method", "train", "remat", "scan"))
def _apply(variables, *arguments, method, train=False, remat=False, scan=False, **options):
    net = towers.build(CONFIG, remat_image=remat, scan_image=scan)
    if train:
        options["train"] = True
    return net.apply(variables, *arguments, method=method, **options)


def test_a_hard_assignment_is_one_hot_with_the_gradient_of_the_softmax():
    logits = jnp.log(jnp.array([[[1.0, 3.0], [4.0, 1.0], [5.0, 4.0]]]))  # softmax: tenths, eighths
    hard = grouping.hard_assignment(logits)
    np.testing.assert_array_equal(hard, [[[0, 0], [0, 0], [1, 1]]])
    weights = jnp.array([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    gradient = jax.grad(lambda x: (grouping.hard_assignment(x) * weights).sum())(logits)
    # d soft_g / d logit_k = soft_g ([g = k] - soft_k), for g = 0 and, twice, for g = 1.
    first = 0.1 * np.array([0.9, -0.4, -0.5])
    second = 2 * 0.125 * np.array([-0.375, 0.875, -0.5])
    np.testing.assert_allclose(gradient[0].T, [first, second], atol=1e-6)


def test_noise_decides_the_assignment_and_enters_the_gradient():
    logits = jnp.log(jnp.array([[[1.0], [3.0]]]))
    noise = jnp.log(jnp.array([[[9.0], [1.0]]]))  # with it: 3 / 4 and 1 / 4
    np.testing.assert_array_equal(grouping.hard_assignment(logits, noise)[0, :, 0], [1, 0])
    gradient = jax.grad(lambda x: grouping.hard_assignment(x, noise)[0, 0, 0])(logits)
    np.testing.assert_allclose(gradient[0, :, 0], [0.1875, -0.1875], atol=1e-6)


def test_gumbel_noise_has_the_gumbel_distribution_and_is_of_its_key_and_number():
    keys = _keys(400)
    noise = np.asarray(grouping.gumbel_noise(keys, 3, (20,)))
    np.testing.assert_allclose(noise.mean(), 0.5772, atol=0.05)
    np.testing.assert_allclose(noise.var(), np.pi**2 / 6, rtol=0.08)
    alone = grouping.gumbel_noise(keys[7:8], 3, (20,))
    np.testing.assert_array_equal(noise[7:8], alone)
    assert np.abs(noise - grouping.gumbel_noise(keys, 4, (20,))).min() > 0


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_stochastic_depth_keeps_the_expectation(rate):
    factors = np.asarray(grouping.branch_factors(_keys(4000), 2, rate))
    np.testing.assert_allclose(factors.mean(axis=0), 1.0, atol=0.03)
    kept = factors[factors > 0]
    np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-6)
    assert (kept.size == factors.size) == (rate == 0)
    if rate:  # the two branches of a block are dropped independently
        assert abs(np.corrcoef(factors.T)[0, 1]) < 0.05


def test_a_block_without_its_branches_is_the_identity():
    block = grouping.EncoderBlock(8, 2, "gelu")
    x = jax.random.normal(jax.random.key(0), (3, 5, 8))
    variables = random_module(block, x)
    factors = jnp.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    out, plain = block.apply(variables, x, factors), block.apply(variables, x)
    np.testing.assert_array_equal(out[0], x[0])
    np.testing.assert_array_equal(out[1], plain[1])
    assert np.abs(out[2] - plain[2]).max() > 0.01


def test_noise_is_the_example_s_own_however_the_batch_is_cut(variables):
    images, keys = _images(), _keys()
    whole = _apply(variables, images, method="image_features", train=True, keys=keys)
    quiet = _apply(variables, images, method="image_features", keys=keys)
    assert np.abs(whole - quiet).max(axis=1).min() > 1e-3
    order = np.array([2, 0, 3, 1])
    moved = _apply(variables, images[order], method="image_features", train=True, keys=keys[order])
    np.testing.assert_allclose(moved, whole[order], atol=1e-6)
    halves = [
        _apply(variables, images[part], method="image_features", train=True, keys=keys[part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(np.concatenate(halves), whole, atol=1e-6)
    # In evaluation keys change nothing.
    again = _apply(variables, images, method="image_features", keys=keys[::-1])
    np.testing.assert_array_equal(again, quiet)


def test_training_needs_typed_keys_of_the_examples(variables):
    net = towers.build(CONFIG)
    for keys, message in (
        (None, "needs keys: typed PRNG keys, one for each image"),
        (_keys(3), r"typed PRNG keys \[4\], one for each image, not key<fry>\[3\]"),
        (jnp.zeros(4, jnp.uint32), r"not uint32\[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            net.apply(variables, _images(), True, keys, method="image_features")


def test_the_halves_make_the_whole_and_padding_moves_no_statistics(variables):
    images, keys = _images(), _keys()
    where = np.array([True, True, False, True])

    def run(net, images, tokens, keys, where):
        image = net.image_features(images, True, keys)
        text = net.text_features(tokens)
        halves = net.project_image(image, True, where), net.project_text(text, True, where)
        return halves, (image, text)

    def whole(net, images, tokens, keys, where):
        return net.encode_image(images, True, keys, where)[0], net.encode_text(tokens, True, where)

    @functools.partial(jax.jit, static_argnames="method")
    def apply(*arguments, method):
        return towers.build(CONFIG).apply(
            variables, *arguments, method=method, mutable=["batch_stats"]
        )

    (halves, features), new = apply(images, TOKENS, keys, where, method=run)
    together, same = apply(images, TOKENS, keys, where, method=whole)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), halves, together)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), new, same)
    # Without the padding row, in numpy.
    for tower, feature, found in zip(("image", "text"), features, halves, strict=True):
        params = variables["params"][f"{tower}_projector"]
        old = variables["batch_stats"][f"{tower}_projector"]["bn"]
        moved = new["batch_stats"][f"{tower}_projector"]["bn"]
        hidden = np.asarray(feature, np.float64) @ params["fc1"]["kernel"] + params["fc1"]["bias"]
        mean, var = hidden[where].mean(0), hidden[where].var(0)
        unit = (hidden - mean) / np.sqrt(var + 1e-5)
        active = np.maximum(unit * params["bn"]["scale"] + params["bn"]["bias"], 0)
        expected = active @ params["fc2"]["kernel"] + params["fc2"]["bias"]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        np.testing.assert_allclose(moved["mean"], 0.9 * old["mean"] + 0.1 * mean, atol=1e-5)
        np.testing.assert_allclose(moved["var"], 0.9 * old["var"] + 0.1 * var, atol=1e-5)


def test_batch_statistics_are_global_over_devices(variables, shard):
    features = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)

    @jax.jit
    def project(features):
        return towers.build(CONFIG).apply(
            variables, features, True, method="project_image", mutable=["batch_stats"]
        )

    expected = project(features)
    found = project(*shard(features))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


def test_segment_dense_and_embedding_agree(segmented):
    (groups, assignment, embedding), (pooled, dense) = segmented[jnp.float32]
    assert (groups.shape, assignment.shape) == ((4, 3, 6), (4, 3, 2, 3))
    np.testing.assert_allclose(assignment.sum(-1), 1.0, atol=1e-5)
    assert assignment.std() > 0.05
    np.testing.assert_allclose(pooled, embedding, atol=1e-6)
    expected = assignment.reshape(4, 6, 3) @ groups
    np.testing.assert_allclose(dense, expected, atol=1e-5)


def test_half_precision_stays_near_float32(segmented):
    exact, rough = segmented[jnp.float32][0], segmented[jnp.bfloat16][0]
    assert {leaf.dtype for leaf in rough} == {np.dtype(np.float32)}
    assert segmented[jnp.bfloat16][1][1].dtype == jnp.bfloat16
    np.testing.assert_allclose(rough[1], exact[1], atol=0.1)
    assert np.abs(rough[1] - exact[1]).mean() < 0.01
    np.testing.assert_allclose(rough[1].sum(-1), 1.0, atol=1e-5)  # softmaxes are float32


def test_with_a_linear_projection_the_embedding_is_the_mean_of_the_groups():
    config = CONFIG | {"projector_hidden": 0}
    variables = random_variables(config)
    assert "batch_stats" not in variables and "proj" in variables["params"]["image"]
    net = towers.build(config)
    groups, _, embedding = jax.jit(functools.partial(net.apply, method="segment"))(
        variables, _images()
    )
    np.testing.assert_allclose(groups.mean(axis=1), embedding, atol=1e-5)


@pytest.mark.parametrize(
    "image", [VIT, {"kind": "resnet", "layers": (1,), "width": 4, "heads": 2, "image_size": 8}]
)
def test_towers_that_group_nothing_have_a_group_for_each_patch(image):
    config = {"embed_dim": 6, "image": image, "text": TEXT}
    net = towers.build(config)

    def everything(net, images):
        features = net.image_features(images)
        return net.segment(images), net.encode_image(images), net.project_image(features)

    (groups, assignment, embedding), (pooled, dense), projected = jax.jit(
        functools.partial(net.apply, method=everything)
    )(random_variables(config), _images(8, 12))
    np.testing.assert_allclose(groups, dense, atol=1e-6)
    np.testing.assert_allclose(embedding, pooled, atol=1e-6)
    np.testing.assert_allclose(projected, pooled, atol=1e-6)
    by_patch = np.einsum("nhwg,ngd->nhwd", assignment, groups)
    np.testing.assert_allclose(by_patch.reshape(dense.shape), dense, atol=1e-5)
    assert assignment.shape == (4, 2, 3, 6)


def test_features_have_no_segments():
    config = {"embed_dim": 6, "image": {"kind": "features", "width": 4, "hidden": 4}, "text": TEXT}
    x = np.zeros((1, 3, 4), np.float32)
    with pytest.raises(UserError, match="'features' cannot segment"):
        towers.build(config).apply(random_variables(config), x, method="segment")


def test_prompts_go_through_the_projector_as_texts_do(variables):
    embeddings = _apply(variables, TOKENS, method="embed_tokens")
    prompts = _apply(variables, embeddings, np.array([2, 1, 2, 2]), method="encode_prompts")
    expected = _apply(variables, TOKENS, method="encode_text")
    np.testing.assert_allclose(prompts, expected, atol=1e-6)


def _stage(previous=0, **modes):
    return Stage(16, 2, "gelu", 4, 4, previous, (0.0, 0.2, 0.4, 0.6), 2, 9, **modes)


def test_rematerialised_and_scanned_blocks_are_the_same_and_need_less_memory():
    x, keys = jax.random.normal(jax.random.key(1), (8, 60, 16)), _keys(8)
    variables = random_module(_stage(), x, None)
    memory, results = {}, {}
    for mode in ("plain", "scan", "remat"):
        stage = _stage(**{} if mode == "plain" else {mode: True})

        def loss(variables, x, keys, stage=stage):
            groups, _, soft = stage.apply(variables, x, None, keys)
            return (jnp.sin(groups) * 3).sum() + soft[:, 0].sum(), groups

        program = jax.jit(jax.grad(loss, has_aux=True)).lower(variables, x, keys).compile()
        memory[mode] = program.memory_analysis().temp_size_in_bytes
        results[mode] = jax.device_get(program(variables, x, keys))
        spec = jax.eval_shape(stage.init, jax.random.key(0), x, None)
        assert jax.tree.structure(spec) == jax.tree.structure(variables)
    expected = results["plain"]
    assert np.abs(expected[0]["params"]["blocks_0"]["attn"]["q_proj"]["kernel"]).max() > 0
    for mode in ("scan", "remat"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max())),
            results[mode],
            expected,
        )
    assert memory["remat"] < 0.5 * memory["scan"], memory
    assert memory["remat"] < 0.5 * memory["plain"], memory


def test_initialisation_is_the_papers():
    def params(previous):
        stage = _stage(previous=previous)
        x = jnp.zeros((1, 2, 16)), jnp.zeros((1, previous, 16)) if previous else None
        return jax.jit(stage.init)(jax.random.key(0), *x)["params"]

    # The tokens of the stage before say where the second one starts.
    np.testing.assert_array_equal(params(3)["group_token"], 0)
    first = params(0)
    np.testing.assert_allclose(np.std(first["group_token"]), 0.02, rtol=0.3)
    np.testing.assert_allclose(np.std(first["blocks_0"]["mlp"]["fc1"]["kernel"]), 0.02, rtol=0.1)
    # All linear maps follow the field, and nothing else does.
    given = {"a": CONFIG, "b": CONFIG | {"image": IMAGE | {"initializer_range": 0.1}}}
    drawn = {
        k: jax.device_get(towers.init(validate(c), jax.random.key(0))) for k, c in given.items()
    }
    drawn = {name: flax.traverse_util.flatten_dict(tree, sep="/") for name, tree in drawn.items()}
    for name, old in drawn["a"].items():
        grown = name.startswith("params/image/stage") and name.endswith(("kernel", "group_token"))
        np.testing.assert_allclose(drawn["b"][name], old * (5 if grown else 1), rtol=1e-5)
    projector = towers.Projector(50, 6).init(jax.random.key(0), jnp.zeros((1, 9)))["params"]
    for name, bound in (("fc1", 1 / 3), ("fc2", 50**-0.5)):  # torch's default
        for leaf in jax.tree.leaves(projector[name]):
            assert 0.6 * bound < np.abs(leaf).max() <= bound


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depths": (2,)}, "image.depths must list the blocks of two or more stages"),
        ({"group_tokens": (3,)}, "image.group_tokens must list one number for each stage"),
        ({"group_tokens": (3, 2)}, "must be positive but for a 0 at its end"),
        ({"output_groups": (0, 0)}, "image.output_groups = .* must be positive but for a 0"),
        ({"drop_path": 1.0}, r"image.drop_path must lie in \[0, 1\), not 1.0"),
        ({"image_size": 10}, "image_size = 10 must be a multiple of patch_size = 4"),
        ({"heads": 3}, "image.width = 8 must be a multiple of heads = 3"),
        ({"initializer_range": 0.0}, "image.initializer_range must be positive"),
        ({"activation": "relu"}, "image.activation = 'relu' must be one of gelu"),
    ],
)
def test_mistakes_are_named(changed, message):
    with pytest.raises(UserError, match=message):
        validate(CONFIG | {"image": IMAGE | changed})


def test_projectors_and_loops_of_other_towers_are_refused(variables):
    other = {"embed_dim": 6, "image": VIT, "text": TEXT}
    features = {"kind": "features", "width": 4, "hidden": 4}
    with pytest.raises(UserError, match="projector_hidden = 5 is for the image kinds groupvit"):
        validate(other | {"image": features, "projector_hidden": 5})
    with pytest.raises(UserError, match="projector_hidden must be a width or 0, not -1"):
        validate(CONFIG | {"projector_hidden": -1})
    with pytest.raises(UserError, match="remat_image and scan_image are for .* not 'vit'"):
        towers.build(other, remat_image=True)
    with pytest.raises(UserError, match="10x8 is no multiple of GroupViT's patch size 4"):
        towers.build(CONFIG).apply(variables, _images(10, 8), method="segment")

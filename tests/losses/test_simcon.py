"""SimCon: dense against loops in float64, streaming against dense on 1 to 8 devices, edge cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.test_util import check_grads

from tests.oracles.simcon import simcon as oracle
from trm_jax.losses.simcon import multi_label_loss, negative_cosine_similarity, simcon_loss

SIZE, WIDTH, SCALE = 37, 8, 20.0
WHERE = np.arange(SIZE) % 7 != 3
# InfoNCE, SimCon, MV-SimCon, and the ablations: views, threshold, joint positives, self similarity.
LOSSES = {
    "infonce": (1, None, True, "exclude"),
    "simcon": (1, 0.5, True, "exclude"),
    "mv_simcon": (2, 0.5, True, "exclude"),
    "own_positives": (2, 0.5, False, "exclude"),
    "include": (2, 0.5, True, "include"),
}


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    return [unit(rng, SIZE, WIDTH) for _ in range(3)]  # two views, then texts


def mesh(count):
    devices = jax.devices()[:count]
    return jax.make_mesh((count, 1), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices)


def run(vectors, name, where=WHERE, **options):
    """((weighted sum, (values, PairStats)), gradients) in float64, compiled."""
    views, threshold, joint, self_similarity = LOSSES[name]
    weights = jnp.asarray(np.linspace(-1.0, 2.0, len(vectors[2])))

    def weighted(images, text, scale):
        values, stats = simcon_loss(
            images,
            text,
            logit_scale=scale,
            threshold=threshold,
            joint_positives=joint,
            self_similarity=self_similarity,
            where=None if where is None else jnp.asarray(where),
            **options,
        )
        return (values * weights).sum(), (values, stats)

    with jax.enable_x64(True):
        function = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
        images = tuple(jnp.asarray(z) for z in vectors[:views])
        return jax.device_get(function(images, jnp.asarray(vectors[2]), jnp.asarray(SCALE)))


@functools.cache
def dense(name):
    rng = np.random.default_rng(0)
    return run([unit(rng, SIZE, WIDTH) for _ in range(3)], name, implementation="dense")


def assert_close(found, wanted):
    (total, (values, stats)), gradients = found
    (total_, (values_, stats_)), gradients_ = wanted
    np.testing.assert_allclose(total, total_, rtol=1e-9)
    np.testing.assert_allclose(values, values_, rtol=1e-9, atol=1e-12)
    for one, other in zip(stats, stats_, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_dense_equals_loops(name, vectors):
    views, threshold, joint, self_similarity = LOSSES[name]
    (_, (values, stats)), _ = dense(name)
    wanted = oracle(
        vectors[:views],
        vectors[2],
        scale=SCALE,
        threshold=threshold,
        joint=joint,
        exclude=self_similarity == "exclude",
        where=WHERE,
    )
    for found, expected in zip((values, *stats), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    if threshold is not None:  # the case must not be trivial
        assert stats.positives_image.max() > 1 and stats.positives_text.max() > 1


def test_dense_gradient_by_finite_differences(vectors):
    # Thresholds lie far from every similarity here, so that the positives stay as they are.
    small = [x[:6] for x in vectors]
    sims = np.concatenate([np.ravel(x @ x.T) for x in small])
    assert np.abs(sims - 0.5).min() > 1e-3

    def total(first, second, text, scale):
        return simcon_loss((first, second), text, logit_scale=scale, threshold=0.5)[0].sum()

    with jax.enable_x64(True):
        arguments = (*map(jnp.asarray, small), jnp.asarray(7.0))
        check_grads(jax.jit(total), arguments, order=1, modes=("rev",))


@pytest.mark.parametrize("block", [5, 64])
@pytest.mark.parametrize("name", LOSSES)
def test_streaming_equals_dense(name, block, vectors):
    assert_close(run(vectors, name, implementation="streaming", block=block), dense(name))


# 37 rows are no multiple of any of these numbers of devices, nor their shares of the blocks.
@pytest.mark.parametrize("devices, columns", [(2, "ring"), (4, "gather"), (8, "ring")])
@pytest.mark.parametrize("name", ["infonce", "simcon", "mv_simcon"])
def test_streaming_on_several_devices(name, devices, columns, vectors):
    options = {"implementation": "streaming", "columns": columns, "block": 3}
    assert_close(run(vectors, name, mesh=mesh(devices), **options), dense(name))


@pytest.mark.parametrize("implementation", ["dense", "streaming"])
def test_an_infinite_threshold_is_infonce(implementation, vectors):
    images, text = (jnp.asarray(x, jnp.float32) for x in vectors[1:])
    for choice in ("include", "exclude"):
        options = {"implementation": implementation, "block": 8, "self_similarity": choice}
        found = simcon_loss((images,), text, logit_scale=9.0, threshold=jnp.inf, **options)
        wanted = simcon_loss((images,), text, logit_scale=9.0, threshold=None)
        np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
        np.testing.assert_allclose(found[1].own_weight, 1.0)


def test_mesh_of_the_context(vectors):
    views = tuple(jnp.asarray(x, jnp.float32) for x in vectors)
    options = {"logit_scale": 10.0, "threshold": 0.5, "implementation": "streaming", "block": 8}
    function = jax.jit(lambda a, b, t: simcon_loss((a, b), t, **options)[0])
    alone = function(*views)
    with jax.set_mesh(mesh(8)):
        lowered = jax.jit(lambda a, b, t: simcon_loss((a, b), t, **options)[0]).lower(*views)
    assert "all_gather" in lowered.as_text()
    np.testing.assert_allclose(lowered.compile()(*views), alone, rtol=1e-5)


def signs(size, seed=3):
    """Vectors with entries +-1/4: their products are exact, so are comparisons with +-1."""
    return np.sign(np.random.default_rng(seed).normal(size=(size, 16))) / 4.0


@pytest.mark.parametrize("implementation", ["dense", "streaming"])
@pytest.mark.parametrize("threshold", [1.0, -1.0])
def test_extreme_thresholds_and_duplicates(implementation, threshold):
    images, text = signs(9), signs(9, 4)
    images[5], text[7] = images[2], text[2]  # duplicates: positive even at threshold 1
    options = {"implementation": implementation, "block": 4}
    values, stats = simcon_loss(
        (jnp.asarray(images, jnp.float32),),
        jnp.asarray(text, jnp.float32),
        logit_scale=5.0,
        threshold=threshold,
        **options,
    )
    wanted = oracle([images], text, scale=5.0, threshold=threshold)
    for found, expected in zip((values, *stats), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert stats.positives_image[2] == (2 if threshold == 1.0 else 9)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_identical_embeddings(scale):
    # Every similarity is 1: n + n - 1 candidates; a positive is own (1 term) or other (2 terms).
    same = jnp.broadcast_to(jnp.asarray(signs(1), jnp.float32), (10, 16))
    wanted = 2 * (np.log(19) - (0.9 * np.log(2)))

    def total(images, text):
        options = {"implementation": "streaming", "block": 4}
        values, _ = simcon_loss((images,), text, logit_scale=scale, threshold=0.9, **options)
        return values.sum(), values

    (_, values), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(same, same)
    np.testing.assert_allclose(values, wanted, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in grads)


def test_padding_may_hold_anything(vectors):
    broken = [np.where(WHERE[:, None], x, np.nan) for x in vectors]
    for options in ({"implementation": "dense"}, {"implementation": "streaming", "block": 8}):
        assert_close(run(broken, "simcon", **options), dense("simcon"))


def test_a_batch_without_a_pair_that_counts(vectors):
    nothing = np.zeros(SIZE, bool)
    (total, (values, _)), grads = run(
        vectors, "simcon", nothing, implementation="streaming", block=8
    )
    assert total == 0 and not values.any()
    assert all(not g.any() for g in jax.tree.leaves(grads))


def test_self_similarity_swamps_random_vectors():
    # The specification's measurement: B = 2048, d = 256, tau = 0.07; per anchor.
    rng = np.random.default_rng(0)
    images, text = (jnp.asarray(unit(rng, 2048, 256), jnp.float32) for _ in range(2))
    found = {}
    for choice in ("include", "exclude"):
        values, stats = simcon_loss(
            (images,), text, logit_scale=1 / 0.07, threshold=0.95, self_similarity=choice
        )
        found[choice] = float(values.mean()) / 2, float(stats.own_weight.mean())
    np.testing.assert_allclose(found["include"], (0.004, 9e-7), rtol=0.2)
    np.testing.assert_allclose(found["exclude"], (8.73, 1.0), rtol=2e-3)


def test_half_precision_is_near(vectors):
    # Positives are those of the rounded vectors, hence a threshold that none is near.
    exact = [jnp.asarray(x, jnp.bfloat16) for x in vectors]
    wide = [np.asarray(x, np.float64) for x in exact]
    values, _ = simcon_loss(
        (exact[0],), exact[2], logit_scale=SCALE, threshold=0.5, implementation="streaming", block=8
    )
    wanted = oracle(wide[:1], wide[2], scale=SCALE, threshold=0.5)[0]
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, wanted, rtol=1e-3)


def _compiled(devices, columns, size=32_768, width=256):
    images = jax.ShapeDtypeStruct((size, width), jnp.float32)
    options = {"threshold": 0.9, "implementation": "streaming", "columns": columns}
    place = None if devices == 1 else mesh(devices)

    def loss(images, text, scale):
        return simcon_loss((images,), text, logit_scale=scale, mesh=place, **options)[0].mean()

    function = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    if place is not None:
        rows = jax.NamedSharding(place, jax.P(("data", "fsdp")))
        images = jax.ShapeDtypeStruct(images.shape, images.dtype, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    return function.lower(images, images, scale).compile().memory_analysis()


def test_memory_grows_with_the_share_of_a_device():
    alone = _compiled(1, "gather").temp_size_in_bytes
    assert alone < 150e6  # dense: three matrices of 4.3 GB, and their gradients
    # Twice the batch on a ring of eight: temporaries that grow with the share alone.
    small, large = (_compiled(8, "ring", size).temp_size_in_bytes for size in (65_536, 131_072))
    share = 8192 * 2 * 256 * 4  # images and texts of the 8,192 rows that a device has more
    assert large - small < 6 * share
    gathered = _compiled(8, "gather", 131_072).temp_size_in_bytes
    assert gathered - large > 0.5 * 131_072 * 2 * 256 * 4  # the columns


def test_negative_cosine_similarity(vectors):
    first, second, other = (jnp.asarray(x[:5], jnp.float32) for x in vectors)
    predicted = (other, jnp.roll(other, 1, axis=0))
    where = jnp.arange(5) != 2

    def total(p, z):
        values = negative_cosine_similarity(p, z, where=where)
        return values.sum(), values

    ((_, values), grads) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        predicted, (first, second)
    )
    wanted = -0.5 * ((predicted[0] * second).sum(1) + (predicted[1] * first).sum(1))
    np.testing.assert_allclose(values, np.where(where, wanted, 0.0), rtol=1e-6)
    np.testing.assert_allclose(grads[0][0], np.where(where[:, None], -0.5 * second, 0), rtol=1e-6)
    assert not any(g.any() for g in grads[1])  # no gradient to the embeddings


def test_multi_label_loss_equals_loops():
    rng = np.random.default_rng(5)
    images, texts = unit(rng, 6, 4), unit(rng, 6, 3, 4)
    where = np.array([1, 1, 0, 1, 1, 1], bool)
    flat = [(i, texts[i, m]) for i in range(6) if where[i] for m in range(3)]
    wanted = np.zeros(6)
    for i in np.flatnonzero(where):
        total = sum(np.exp(9 * images[i] @ t) for _, t in flat)
        of_image = np.mean([-9 * images[i] @ t + np.log(total) for k, t in flat if k == i])
        of_text = np.mean(
            [
                -9 * images[i] @ t
                + np.log(sum(np.exp(9 * images[k] @ t) for k in np.flatnonzero(where)))
                for k, t in flat
                if k == i
            ]
        )
        wanted[i] = 0.5 * (of_image + of_text)
    with jax.enable_x64(True):
        found = multi_label_loss(
            jnp.asarray(images), jnp.asarray(texts), logit_scale=9.0, where=jnp.asarray(where)
        )
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"self_similarity": "maybe"}, "self_similarity='maybe'"),
        ({"implementation": "fast"}, "implementation='fast'"),
        ({"columns": "all"}, "columns='all'"),
        ({"block": -1}, "block=-1"),
    ],
)
def test_unknown_choices(options, message):
    with pytest.raises(ValueError, match=message):
        simcon_loss(
            (jnp.ones((2, 4)),), jnp.ones((2, 4)), logit_scale=1.0, threshold=0.5, **options
        )


def test_three_views_are_refused():
    with pytest.raises(ValueError, match="3 views"):
        simcon_loss((jnp.ones((2, 4)),) * 3, jnp.ones((2, 4)), logit_scale=1.0, threshold=0.5)

"""MASK's method: what its state is, what reaches it, and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import knowledge as oracle
from trm_jax.methods import mask
from trm_jax.types import UserError

WORDS = np.random.default_rng(5).normal(size=(5, 6)).astype(np.float32)
WORDS[4] = 0.0  # a word without a vector
MODEL = {
    "features": 8, "word_width": 6, "width": 12, "heads": 2,
    "encoder": {"attention_layers": 1}, "mapper": {"fc_layers": 2, "attention_layers": 1},
}  # fmt: skip
KEY = jax.random.key(1)


def _make(**options):
    return mask.make(model=MODEL, words=WORDS, regions=(4,), samples=5, **options)


def _batch(seed=0):
    """Three rows: four regions and five samples, two regions, and one that could not be read."""
    rng = np.random.default_rng(seed)
    region = np.array([[0, 1, 1, 2, 3], [0, 1, -1, -1, -1], [0, 1, 2, 3, 3]], np.int32)
    word = np.array([[0, 1, 2, 0, 4], [3, 1, -1, -1, -1], [0, 1, 2, 3, 0]], np.int32)
    return {
        "features": rng.normal(size=(3, 4, 8)).astype(np.float32),
        "region_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], bool),
        "sample_region": region,
        "sample_word": word,
        "index": np.arange(3, dtype=np.int32),
        "valid": np.array([True, True, False]),
    }


@pytest.fixture(scope="module")
def method():
    return _make()


@pytest.fixture(scope="module")
def state(method):
    return method.init(KEY, pretrained=None)


def _step(method, params, extras, batch):
    batch = jax.tree.map(jnp.asarray, batch)
    return method.loss(params, extras, batch, key=KEY, step=jnp.int32(0), train=True)


@pytest.fixture(scope="module")
def stepped(method, state):
    return jax.jit(lambda p, e, b: _step(method, p, e, b))(*state, _batch())


# The samples that count, as (row, region, word): the word 4 has no vector, the last row is lost.
SAMPLES = [(0, 0, 0), (0, 1, 1), (0, 1, 2), (0, 2, 0), (1, 0, 3), (1, 1, 1)]


def _mu(method, state, batch):
    return np.asarray(method.predict["embed_image"](*state, batch)["regions"], np.float64)


def test_running_prototypes_start_from_the_means_of_a_batch(method, state, stepped):
    mu = _mu(method, state, _batch())
    new = stepped.extras["prototypes"]
    for word in range(5):
        own = [mu[row, region] for row, region, w in SAMPLES if w == word]
        assert new.counts[word] == len(own)
        expected = np.mean(own, axis=0) if own else np.zeros(12)
        np.testing.assert_allclose(new.vectors[word], expected, rtol=1e-4, atol=1e-5)


def test_a_refresh_is_the_mean_over_all_batches(method, state):
    batches = [_batch(seed) for seed in range(3)]
    new = method.refresh(*state, iter(batches))["prototypes"]
    mus = [_mu(method, state, batch) for batch in batches]
    for word in range(4):
        own = [mu[row, region] for mu in mus for row, region, w in SAMPLES if w == word]
        np.testing.assert_allclose(new.vectors[word], np.mean(own, axis=0), rtol=1e-4, atol=1e-5)
        assert new.counts[word] == len(own)
    np.testing.assert_array_equal(new.vectors[4], 0.0)


def test_the_loss_is_the_sum_of_the_papers_terms(method, state):
    params, _ = state
    extras = method.refresh(*state, iter([_batch(3)]))
    out = _step(method, params, extras, _batch())
    values = {name: float(mean.value()) for name, mean in out.metrics.items()}
    mu = _mu(method, state, _batch())
    picked = np.array([mu[row, region] for row, region, _ in SAMPLES])
    words = np.array([w for *_, w in SAMPLES])
    numbers = np.array([4 * row + region for row, region, _ in SAMPLES])
    anchors = np.asarray(extras["prototypes"].vectors, np.float64)[words]
    contrast = oracle.contrastive(picked, anchors, words, numbers, np.ones(6, bool))
    assert values["loss_prototypes"] == pytest.approx(np.mean(contrast), rel=1e-4)
    assert (values["regions"], values["samples"]) == (6.0, 6.0)
    expected = values["loss_kl"] + values["loss_reconstruction"]
    expected += 3 * (values["loss_words"] + values["loss_structure"])
    expected += 3 * values["loss_prototypes"]
    assert float(out.loss) == pytest.approx(expected, rel=1e-5)
    light = _make(loss=mask.Loss(kl_weight=0.0, cross_modal_weight=0.0, contrastive_weight=0.0))
    alone = _step(light, params, extras, _batch())
    assert float(alone.loss) == pytest.approx(values["loss_reconstruction"], rel=1e-5)


def test_what_does_not_count_changes_nothing(method, state, stepped):
    batch = _batch()
    batch["features"][1, 2:] = np.nan  # padding
    batch["features"][2] = 1e3  # a row that could not be read
    batch["sample_word"][2] = 1
    batch["sample_word"][0, 4] = -1  # of the word without a vector
    batch["sample_region"][0, 4] = -1
    out = _step(method, *state, batch)
    np.testing.assert_allclose(out.loss, stepped.loss, rtol=1e-6)
    for a, b in zip(out.extras["prototypes"], stepped.extras["prototypes"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_anchors_learn_only_where_they_are_learnable(state):
    for name in ("running", "learnable"):
        method = _make(loss=mask.Loss(prototypes=name))
        params, extras = method.init(KEY, pretrained=None)
        extras = method.refresh(params, extras, iter([_batch(3)]))
        assert ("prototypes" in params) == (name == "learnable")

        def loss(params, extras, method=method):
            return _step(method, params, extras, _batch()).loss

        of_params, of_extras = jax.grad(loss, argnums=(0, 1), allow_int=True)(params, extras)
        assert not np.any(of_extras["prototypes"].vectors) or name == "learnable"
        if name == "learnable":
            rows = np.abs(of_params["prototypes"]).sum(1)
            assert np.all(rows[:4] > 0) and rows[4] == 0


def test_regions_that_stand_alone_see_nobody():
    method = _make(attention_set="region")
    state = method.init(KEY, pretrained=None)
    batch, other = _batch(), _batch()
    other["features"][0, 1] += 1.0
    before, after = (_mu(method, state, b) for b in (batch, other))
    changed = np.abs(before - after).max(-1) > 1e-6
    np.testing.assert_array_equal(changed, np.eye(12, dtype=bool)[1].reshape(3, 4))
    changed = np.abs(_mu(_make(), state, batch) - _mu(_make(), state, other)).max(-1) > 1e-6
    np.testing.assert_array_equal(changed, np.arange(12).reshape(3, 4) < 4)


def test_word_vectors_of_another_width():
    with pytest.raises(UserError, match="word vectors have width 6, model.knowledge says 7"):
        mask.make(model={**MODEL, "word_width": 7}, words=WORDS, regions=(4,), samples=5)

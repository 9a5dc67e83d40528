"""PAE, FRM and MTM: counts of Tables 8 and 12, and outputs against numpy on the real regions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.oracles import knowledge as oracle
from tests.oracles.random_variables import random_module
from trm_jax.losses.cosine import normalize
from trm_jax.models import knowledge
from trm_jax.types import UserError

# Z has four heads, N one, since 4 does not divide it.
D, Z, N, R = 5, 8, 6, 5
HEADS = 4, 1
MASK = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0] * 5], bool)
PAPER = (1, 3), (2, 1), (3, 3)
# Table 12, a row of each network: (FC layers, attention layers) and the count it prints, in M.
ROWS = {
    "PAE": (((1, 1), 2.11), ((1, 3), 4.21), ((1, 5), 6.31), ((3, 3), 4.73), ((5, 3), 5.25)),
    "FRM": (((1, 1), 2.1), ((2, 1), 2.36), ((3, 1), 2.62), ((2, 3), 4.46), ((2, 5), 6.56)),
    "MTM": (((1, 3), 1.26), ((3, 3), 1.44), ((5, 3), 1.62), ((3, 1), 0.7), ((3, 5), 2.18)),
}
COUNTS = {
    "PAE": (2_101_760, 4_205_056, 6_308_352, 4_730_368, 5_255_680),
    "FRM": (2_102_272, 2_364_928, 2_627_584, 4_468_224, 6_571_520),
    "MTM": (1_239_300, 1_419_900, 1_600_500, 696_300, 2_143_500),
}
SIGMA = 262_656
# The rows of Table 12, the second of which is the paper's model, and one that it has not.
DEPTHS = [tuple(ROWS[name][row][0] for name in ROWS) for row in range(5)]
DEPTHS.append(((1, 3), (2, 1), (2, 3)))


def _config(depths=PAPER, **fields):
    names = "encoder", "reconstructor", "mapper"
    networks = {
        name: {"fc_layers": fc, "attention_layers": attention}
        for name, (fc, attention) in zip(names, depths, strict=True)
    }
    return {"features": D, "word_width": N, "width": Z, **networks, **fields}


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(*MASK.shape, D)).astype(np.float32)
    return features, MASK, rng.normal(size=(*MASK.shape, Z)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return knowledge.build(_config())


@pytest.fixture(scope="module")
def variables(model):
    variables = random_module(model, *_inputs(), seed=1)
    variables["params"]["encoder"]["fc_0"]["bias"] += 1  # no region is below zero in all its ReLUs
    return variables


@pytest.fixture(scope="module")
def run(model):
    return jax.jit(model.apply)


@pytest.mark.parametrize("row", range(5))
def test_counts_of_table_12(row):
    config = _config(DEPTHS[row])
    config |= {"features": 2048, "width": 512, "word_width": 300}
    counts = knowledge.parameter_counts(config)
    assert counts.pop("sigma") == SIGMA
    for name, count in counts.items():
        assert count == COUNTS[name][row]
        # The paper adds up rounded cells, and has 0.37 M for each attention of width 300.
        assert count / 1e6 == pytest.approx(ROWS[name][row][1], abs=0.041)


def test_counts_of_table_8_are_the_defaults():
    counts = knowledge.parameter_counts(ConfigDict({"features": 2048, "word_width": 300}))
    assert counts == {"PAE": 4_205_056, "sigma": SIGMA, "FRM": 2_364_928, "MTM": 1_419_900}
    d, z, n = 96, 64, 50  # four heads do not divide 50, and heads have no part in the counts
    counts = knowledge.parameter_counts({"features": d, "word_width": n, "width": z})
    attention = 4 * z * z + 6 * z
    assert counts == {
        "PAE": d * z + z + 3 * attention + 2 * z,
        "sigma": z * z + z,
        "FRM": z * z + z + attention + z * d + d,
        "MTM": z * n + n + 3 * (4 * n * n + 6 * n) + 2 * (n * n + n),
    }


@pytest.mark.parametrize("depths", DEPTHS, ids=str)
def test_rows_equal_the_oracle_on_their_real_regions_alone(depths):
    features, mask, noise = _inputs()
    model = knowledge.build(_config(depths))
    variables = random_module(model, features, mask, noise, seed=2)
    padded = np.where(mask[..., None], features, np.nan).astype(np.float32)
    found = model.apply(variables, padded, mask, noise)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    for i, real in enumerate(mask):
        if not real.any():
            continue
        row, draw = features[i, real].astype(np.float64), noise[i, real].astype(np.float64)
        expected = oracle.codes(params, row, draw, depths, HEADS)
        for actual, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual[i, real], wanted, rtol=2e-4, atol=2e-4)
    assert all(np.isfinite(x).all() for x in found)
    alone = model.apply(variables, padded, mask, method="encode")
    np.testing.assert_array_equal(alone, found.mu)


def test_gradients_stay_in_their_row_and_off_the_padding(model, variables):
    features, mask, noise = _inputs()
    weights = np.random.default_rng(4).normal(size=(R, Z + Z + D + N)).astype(np.float32)

    def of_row(features, row):
        codes = jnp.concatenate(model.apply(variables, features, mask, noise), axis=-1)[row]
        return (codes * jnp.asarray(mask)[row, :, None] * weights).sum()

    gradients = jax.jit(jax.grad(of_row))
    for row in range(len(mask)):
        gradient = np.asarray(gradients(jnp.asarray(features), row))
        reached = np.zeros_like(mask)
        reached[row] = mask[row]
        np.testing.assert_array_equal((gradient != 0).any(-1), reached)
        assert np.isfinite(gradient).all()


def test_another_row_changes_nothing(run, variables):
    features, mask, noise = _inputs()
    before = run(variables, features, mask, noise)
    other, mask = features.copy(), mask.copy()
    other[1] *= -50
    mask[1] = True
    after = run(variables, other, mask, noise)
    for a, b in zip(before, after, strict=True):
        same = (np.asarray(a) == np.asarray(b)).all((1, 2))
        np.testing.assert_array_equal(same, [True, False, True, True])


def test_permuted_regions_permute_the_outputs(run, variables):
    inputs = _inputs()
    order = np.random.default_rng(5).permuted(np.tile(np.arange(R), (len(MASK), 1)), axis=1)
    assert (order != np.arange(R)).any(1).all()
    rows = np.arange(len(MASK))[:, None]
    before = run(variables, *inputs)
    after = run(variables, *(x[rows, order] for x in inputs))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(b, a[rows, order], rtol=1e-4, atol=1e-5)
        assert not np.allclose(b[0], a[0], atol=1e-2)


def test_sigma_never_reaches_zero(run, variables):
    bias = variables["params"]["encoder"]["sigma"]["bias"]
    head = variables["params"]["encoder"]["sigma"] | {"bias": np.full_like(bias, -1e4)}
    encoder = variables["params"]["encoder"] | {"sigma": head}
    lowered = {"params": variables["params"] | {"encoder": encoder}}
    features, mask, noise = _inputs()
    codes = run(lowered, features, mask, noise)
    np.testing.assert_array_equal(codes.sigma, np.float32(1e-6))
    assert (run(variables, features, mask, noise).sigma > 1e-3).all()


def test_fresh_weights_stand_regions_without_features():
    # Zero vectors, alone in their rows: mu is no zero vector, so that the cosines of the losses
    # have gradients of ordinary size.
    encoder = knowledge.PrototypeAwareEncoder(Z)
    features, mask = np.zeros((2, 1, D), np.float32), np.array([[True], [False]])
    variables = jax.jit(encoder.init)(jax.random.key(0), features, mask)

    def loss(variables):
        mu, sigma = encoder.apply(variables, features, mask)
        return (normalize(mu)[..., 0] + sigma[..., 0]).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(variables)):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() < 1e3, np.abs(leaf).max()


def test_half_precision_computes_and_float32_returns(model, variables, run):
    features, mask, noise = _inputs()
    half = knowledge.build(_config(), dtype=jnp.bfloat16)
    found = jax.jit(half.apply)(variables, features.astype(np.float16), mask, noise)
    exact = run(variables, features, mask, noise)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == b.dtype == jnp.float32
        gap = np.abs(np.asarray(a - b))[mask]
        assert 1e-5 < gap.max() < 0.3 * np.abs(b).max()
        assert gap.mean() < 0.03 * np.abs(b).mean() + 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": 0}, "model.knowledge.features must be a positive integer, not 0"),
        ({"word_width": 300.0}, "model.knowledge.word_width must be a positive integer"),
        ({"width": 1 << 20}, "model.knowledge.width = 1048576 is more than 65536; lower it"),
        ({"heads": True}, "model.knowledge.heads must be a positive integer, not True"),
        ({"layers": 3}, "model.knowledge.layers is no field; the fields are features, word_width"),
        ({"encoder": 3}, "model.knowledge.encoder must be a mapping of fields, not 3"),
        ({"encoder": {"depth": 3}}, "model.knowledge.encoder.depth is no field"),
        ({"mapper": {"fc_layers": 0}}, "model.knowledge.mapper.fc_layers must be a positive"),
        ({"reconstructor": {"attention_layers": 65}}, "attention_layers = 65 is more than 64"),
    ],
)
def test_mistakes_name_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        knowledge.build({"features": D, "word_width": N, **fields})


def test_missing_widths_are_named_and_defaults_filled_in():
    with pytest.raises(UserError, match="model.knowledge.word_width is missing; add it"):
        knowledge.validate({"features": D})
    full = knowledge.validate({"features": 2048, "word_width": 300, "mapper": {"fc_layers": 5}})
    paper = _config(features=2048, word_width=300, width=512, heads=4)
    assert full == paper | {"mapper": {"fc_layers": 5, "attention_layers": 3}}
    assert knowledge.validate(ConfigDict(full)) == full

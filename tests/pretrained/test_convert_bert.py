"""Files of transformers' BERT models, made by hand, to our parameters; what is refused."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.pretrained import archives
from trm_jax.models.matching.bert import BertEncoder
from trm_jax.pretrained import convert_bert
from trm_jax.types import UserError

SIZES = {
    "vocab_size": 11,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 7,
    "type_vocab_size": 2,
}
CONFIG = {**SIZES, "model_type": "bert", "hidden_act": "gelu", "hidden_dropout_prob": 0.1}
# transformers' name -> (shape there, our path)
LAYER = {
    "attention.self.query.weight": ((4, 4), "query/kernel"),
    "attention.self.query.bias": ((4,), "query/bias"),
    "attention.self.key.weight": ((4, 4), "key/kernel"),
    "attention.self.key.bias": ((4,), "key/bias"),
    "attention.self.value.weight": ((4, 4), "value/kernel"),
    "attention.self.value.bias": ((4,), "value/bias"),
    "attention.output.dense.weight": ((4, 4), "out/kernel"),
    "attention.output.dense.bias": ((4,), "out/bias"),
    "attention.output.LayerNorm.weight": ((4,), "attention_norm/scale"),
    "attention.output.LayerNorm.bias": ((4,), "attention_norm/bias"),
    "intermediate.dense.weight": ((6, 4), "mlp/fc1/kernel"),
    "intermediate.dense.bias": ((6,), "mlp/fc1/bias"),
    "output.dense.weight": ((4, 6), "mlp/fc2/kernel"),
    "output.dense.bias": ((4,), "mlp/fc2/bias"),
    "output.LayerNorm.weight": ((4,), "mlp_norm/scale"),
    "output.LayerNorm.bias": ((4,), "mlp_norm/bias"),
}
PLACES = {
    "embeddings.word_embeddings.weight": ((11, 4), "word_embedding"),
    "embeddings.position_embeddings.weight": ((7, 4), "position_embedding"),
    "embeddings.token_type_embeddings.weight": ((2, 4), "type_embedding"),
    "embeddings.LayerNorm.weight": ((4,), "norm/scale"),
    "embeddings.LayerNorm.bias": ((4,), "norm/bias"),
    **{
        f"encoder.layer.{number}.{name}": (shape, f"blocks_{number}/{path}")
        for number in range(2)
        for name, (shape, path) in LAYER.items()
    },
}
POOLER = {"pooler.dense.weight": np.ones((4, 4)), "pooler.dense.bias": np.ones(4)}


@pytest.fixture
def state():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in PLACES.items()}


def _write(folder, state, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    return folder


def _check(params, state):
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    found = {"/".join(key.key for key in path): leaf for path, leaf in flat}
    assert set(found) == {path for _, path in PLACES.values()}
    for name, (_, path) in PLACES.items():
        wanted = state[name].T if path.endswith("kernel") else state[name]
        np.testing.assert_array_equal(found[path], wanted, err_msg=path)
        assert found[path].dtype == np.float32


def test_a_folder_is_read_bit_by_bit_and_fits_the_encoder(tmp_path, state):
    folder = _write(tmp_path / "bert", {**state, **POOLER, "embeddings.position_ids": np.arange(7)})
    params, config = convert_bert.read(folder), convert_bert.read_config(folder)
    assert config == SIZES
    _check(params, state)
    _check(convert_bert.read(folder / "model.safetensors"), state)
    tokens = np.ones((1, 3), np.int32)
    encoder = BertEncoder(config)
    specs = jax.eval_shape(encoder.init, jax.random.key(0), tokens, tokens > 0)["params"]
    assert jax.tree.structure(specs) == jax.tree.structure(params)
    assert [leaf.shape for leaf in jax.tree.leaves(specs)] == [
        leaf.shape for leaf in jax.tree.leaves(params)
    ]


def test_a_model_with_heads_and_the_first_names_of_norms_is_read(tmp_path, state):
    old = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): array
        for name, array in state.items()
    }
    heads = {"cls.predictions.bias": np.ones(11), "cls.seq_relationship.weight": np.ones((2, 4))}
    poolers = {f"bert.{name}": array for name, array in POOLER.items()}
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    archives.write_state_dict(folder / "pytorch_model.bin", {**old, **heads, **poolers})
    _check(convert_bert.read(folder), state)


def test_half_precision_is_widened(state):
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    rounded = {name: array.astype(np.float32) for name, array in half.items()}
    _check(convert_bert.from_transformers(half, SIZES), rounded)


def _without(state, name):
    return {key: array for key, array in state.items() if key != name}


BIAS = "encoder.layer.1.output.dense.bias"
EXTRA = "encoder.layer.2.output.dense.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _without(s, BIAS), rf"tensors lack {BIAS}; take the weights and the config"),
        (lambda s: {**s, EXTRA: s[BIAS]}, rf"tensors have the unexpected {EXTRA}; take"),
        (
            lambda s: {**s, BIAS: np.ones(5, np.float32)},
            rf"{BIAS} is \[5\], the sizes in config.json need \[4\]; take",
        ),
        (
            lambda s: {**s, "encoder.layer.0.intermediate.dense.weight": np.ones((4, 6))},
            r"intermediate.dense.weight is \[4, 6\], .* need \[6, 4\]",
        ),
        (lambda s: {**s, BIAS: np.ones(4, np.int8)}, rf"{BIAS} is int8, not floating-point"),
        (lambda s: {**s, BIAS: np.full(4, np.nan)}, rf"{BIAS} has numbers that are not finite"),
        (lambda s: {**s, BIAS: np.full(4, 1e300)}, rf"{BIAS} has numbers that are not finite"),
        (lambda s: {"roberta." + k: v for k, v in s.items()}, "tensors lack .* 33 more and have"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_a_line(tmp_path, state, change, message):
    folder = _write(tmp_path / "bert", change(state))
    with pytest.raises(UserError, match=message) as error:
        convert_bert.read(folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"model_type": "roberta"}, "model_type 'roberta' is not supported, a BERT with"),
        (CONFIG | {"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not supported"),
        (CONFIG | {"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05 is not supported"),
        (_without(CONFIG, "vocab_size"), "vocab_size is None, not a number from 1"),
        (CONFIG | {"hidden_size": "4"}, "hidden_size is '4', not a number from 1"),
        (CONFIG | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (CONFIG | {"num_attention_heads": 3}, "hidden_size 4 of the BERT is no multiple of"),
        ([1], "is no config.json of transformers"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path, state, config, message):
    folder = _write(tmp_path / "bert", state, config)
    with pytest.raises(UserError, match=message):
        convert_bert.read(folder)


def test_what_is_missing_is_named(tmp_path, state):
    with pytest.raises(UserError, match=r"holds none of model\.safetensors, pytorch_model\.bin"):
        convert_bert.read(tmp_path)
    folder = _write(tmp_path / "bert", state)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        convert_bert.read(folder)
    (folder / "config.json").unlink()
    message = r"config\.json, which says the sizes of a BERT, cannot be read \(No such file"
    with pytest.raises(UserError, match=message):
        convert_bert.read(folder / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(str(folder / "config.json"))):
        convert_bert.read_config(folder)

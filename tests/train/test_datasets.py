"""Data sections of configs: cached features train and score as the images do."""

import hashlib

import jax
import numpy as np
import pytest

from tests import tiny
from trm_jax.models.clip import towers
from trm_jax.pretrained import registry
from trm_jax.train import experiment, runner, workdirs
from trm_jax.types import UserError


def test_cached_features_give_the_metrics_of_the_images(tmp_path):
    runs = []
    for cached in (True, False):
        config = tiny.trm_ml(cached=cached)
        config.train.update({"epochs": 2, "log_every": 1, "eval_every": 4})
        workdir = tmp_path / str(cached)
        tiny.run(tiny.build(config, tmp_path / "cache").job, workdir)
        runs.append(tiny.lines(workdir))
    for line, expected in zip(*runs, strict=True):
        assert line.keys() == expected.keys()
        for name, value in line.items():
            if isinstance(value, float):
                np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5)
            else:
                assert value == expected[name]
    assert {"mAP", "mAP_best"} <= runs[0][-1].keys()


def test_a_cache_of_other_weights_is_refused(tmp_path):
    config = tiny.trm_ml()
    config.data.update({"train_size": 8, "test_size": 8})
    built = experiment.build(config, cache_dir=tmp_path / "cache")
    weights = tmp_path / "clip.safetensors"
    config.model.pretrained = str(weights)

    def save(seed):
        variables = jax.device_get(towers.init(built.clip, jax.random.key(seed)))
        tokenizer = built.tokenizer.to_config()
        registry.save(weights, variables, config=built.clip, tokenizer=tokenizer, provenance={})

    save(0)
    experiment.build(config, cache_dir=tmp_path / "cache")
    before = {path.name for path in (tmp_path / "cache").iterdir()}
    experiment.build(config, cache_dir=tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == before
    save(1)
    with pytest.raises(UserError, match="stale: the encoder changed"):
        experiment.build(config, cache_dir=tmp_path / "cache")
    config.seed = 1  # a run's seed draws no weights here: runs of several seeds share a cache
    save(0)
    experiment.build(config, cache_dir=tmp_path / "cache")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == before


def test_caching_and_augmentation_exclude_each_other(tmp_path):
    config = tiny.trm_ml()
    config.data.augment = "tai"
    with pytest.raises(UserError, match=r"data\.augment='none', not 'tai'"):
        experiment.build(config, cache_dir=tmp_path)


def test_a_run_records_where_its_weights_came_from(tmp_path):
    config = tiny.trm_ml()
    config.data.update({"train_size": 8, "test_size": 8})
    config.train.update({"epochs": 1, "eval_every": 0})
    config.lock()
    runner.train(config, str(tmp_path / "random"))
    built = experiment.build(config, cache_dir=tmp_path / "cache")
    weights = tmp_path / "clip.safetensors"
    registry.save(
        weights,
        jax.device_get(towers.init(built.clip, jax.random.key(0))),
        config=built.clip,
        tokenizer=built.tokenizer.to_config(),
        provenance={},
    )
    config.model.pretrained = str(weights)
    runner.train(config, str(tmp_path / "file"))
    found = [workdirs.read_json(tmp_path / name / "run.json") for name in ("random", "file")]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert found[0]["pretrained"] == {}
    assert found[1]["pretrained"] == {"path": str(weights), "sha256": digest}

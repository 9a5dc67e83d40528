"""Data sections of configs: cached features train and score as the images do."""

import hashlib
import os
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import tiny
from trm_jax.data.sources.glyphs import GlyphScenes
from trm_jax.data.sources.subset import Subset
from trm_jax.models.clip import towers
from trm_jax.pretrained import registry
from trm_jax.train import datasets, experiment, loop, paths, runner, workdirs
from trm_jax.train.preemption import Preempted
from trm_jax.types import BadSampleError, UserError


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


def _small(**data):
    config = tiny.trm_ml()
    config.data.update({"train_size": 8, "test_size": 8, **data})
    return config


def test_both_parts_of_a_hold_out_share_a_cache(tmp_path):
    config = _small(train_size=24, holdout=0.5)
    built = experiment.build(config, cache_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert isinstance(built.train, Subset) and built.train.source is built.test.source
    assert len(built.train) + len(built.test) == 24
    assert workdirs.read_json(folder / "meta.json")["count"] == 24
    index = int(built.test.indices[0])
    whole = built.test.source.read(index)
    for name, array in built.test.read(0).items():
        np.testing.assert_array_equal(array, whole[name])


def test_a_part_of_the_data_sees_the_labels_of_the_whole():
    scenes = GlyphScenes(3, 40, image_size=32)
    data = _small(label_protocol="single_positive_largeloss").data
    whole = datasets.observed_labels(data, scenes)
    part = datasets.observed_labels(data, Subset(scenes, [5, 17, 30]))
    np.testing.assert_array_equal(part, whole[[5, 17, 30]])


def test_largeloss_trains_on_its_eighty_per_cent():
    train, test, split = datasets.open_data(
        _small(train_size=40, label_protocol="single_positive_largeloss").data
    )
    scenes = train.source
    order = np.argsort(np.asarray(scenes.ids), kind="stable")
    drawn = np.random.RandomState(1200).permutation(40)[:32]
    assert len(train) == 32 and len(test) == 8 and split == "test"
    assert {scenes.ids[i] for i in order[drawn]} == set(train.ids)


def test_a_method_without_frozen_features_has_nothing_to_cache(tmp_path):
    config = tiny.contrastive()
    config.data.cache_features = True
    with pytest.raises(UserError, match="method=contrastive trains its image side"):
        experiment.build(config, cache_dir=tmp_path)


def test_too_many_unreadable_images_stop_the_caching(tmp_path, monkeypatch):
    original = GlyphScenes.read

    def read(scenes, index):
        if index in (2, 5):
            raise BadSampleError("broken")
        return original(scenes, index)

    monkeypatch.setattr(GlyphScenes, "read", read)
    with pytest.raises(UserError, match=r"2 of 8 samples are unreadable"):
        experiment.build(_small(max_bad_fraction=0.2), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    built = experiment.build(_small(max_bad_fraction=0.3), cache_dir=tmp_path)
    with pytest.raises(BadSampleError):
        built.train.read(5)


def test_a_signal_ends_the_caching_and_leaves_nothing(tmp_path, monkeypatch):
    original = GlyphScenes.read

    def read(scenes, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(scenes, index)

    built = experiment.build(_small(), cache_dir=tmp_path / "other")
    monkeypatch.setattr(GlyphScenes, "read", read)
    config = _small().data
    with pytest.raises(Preempted, match="start again"):
        datasets._compute(built.train.source, tmp_path / "cache", {}, dict, 4, config)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_resumed_run_must_find_the_weights_it_began_with(tmp_path):
    config = _small()
    config.train.update({"epochs": 4, "eval_every": 0})
    built = experiment.build(config, cache_dir=tmp_path / "cache")
    weights = tmp_path / "clip.safetensors"

    def save(seed):
        variables = jax.device_get(towers.init(built.clip, jax.random.key(seed)))
        tokenizer = built.tokenizer.to_config()
        registry.save(weights, variables, config=built.clip, tokenizer=tokenizer, provenance={})

    save(0)
    config.model.pretrained = str(weights)
    config.data.cache_features = False
    config.lock()
    original = loop.Run.train

    def stopped(run, state, writer):
        job = run.job._replace(batches=_stopping(run.job.batches))
        run.job = job
        return original(run, state, writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "train", stopped)
        with pytest.raises(Preempted):
            runner.train(config, str(tmp_path / "run"))
    save(1)
    with pytest.raises(UserError, match=r"another frozen_sha256 than what model\.pretrained gives"):
        runner.train(config, str(tmp_path / "run"))
    save(0)
    assert runner.train(config, str(tmp_path / "run"))["final"]


def _stopping(batches):
    def stopped(start):
        for number, batch in enumerate(batches(start), start):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return stopped


def test_parameters_that_start_from_an_exported_model(tmp_path):
    config = tiny.simcon()
    config.data.update({"train_size": 8, "test_size": 8})
    plain = experiment.build(config, cache_dir=tmp_path)
    given = jax.tree.map(
        lambda x: np.asarray(x + np.float32(1)), jax.device_get(plain.job.init()[0]["clip"])
    )
    files = {name: tmp_path / f"{name}.safetensors" for name in ("towers", "others", "whole")}
    tokenizer = plain.tokenizer.to_config()
    other = {**tokenizer, "words": ["another", *tokenizer["words"][1:]]}
    for name, words in (("towers", tokenizer), ("others", other)):
        options = {"config": plain.clip, "tokenizer": words, "provenance": {}}
        registry.save(files[name], given, **options)
    flat = {f"clip/{name}": value for name, value in paths.flatten(given).items()}
    save_file(flat, files["whole"])
    config.model.initial_params = ("^clip/params/text/",)
    for name in ("towers", "whole"):
        config.model.initial_from = str(files[name])
        built = experiment.build(config, cache_dir=tmp_path)
        started = paths.flatten(built.job.init()[0])
        for key, before in paths.flatten(plain.job.init()[0]).items():
            added = 1.0 if key.startswith("clip/params/text/") else 0.0
            np.testing.assert_array_equal(started[key], before + added)
        assert built.initial.path == files[name]
    config.model.initial_from = str(files["others"])
    with pytest.raises(UserError, match="words are not those of this run's captions"):
        experiment.build(config, cache_dir=tmp_path)
    config.model.initial_params = ("text_projection",)
    experiment.build(config, cache_dir=tmp_path)
    config.model.initial_params = ("predictor",)
    with pytest.raises(UserError, match="'predictor/.*' is missing or of another shape"):
        experiment.build(config, cache_dir=tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    config.model.initial_from = str(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="bad.safetensors"):
        experiment.build(config, cache_dir=tmp_path)
    config.model.initial_from = "no.safetensors"
    with pytest.raises(UserError, match="model.initial_from=no.safetensors: there is no such file"):
        experiment.build(config, cache_dir=tmp_path)

"""The files of a workdir: metrics lines, configs, parameter paths, weight hashes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from trm_jax.train import checkpoints, metrics, paths, workdirs
from trm_jax.types import Mean, UserError


def test_summaries_are_means_and_leave_out_what_was_not_counted():
    sums = {
        "loss": Mean(jnp.float32(6.0), jnp.float32(4.0)),
        "rare": Mean(jnp.float32(0.0), jnp.float32(0.0)),
    }
    assert metrics.summarize(sums) == {"loss": 1.5}


def _writer(folder, step):
    return metrics.MetricsWriter(folder, step=step, total_steps=10)


def test_a_resumed_writer_drops_the_lost_future_and_remembers_the_best(tmp_path):
    writer = _writer(tmp_path, 0)
    for step, value in ((2, 30.0), (4, 20.0), (6, 90.0)):
        writer.write(step, "train", {"loss": float("nan") if step == 2 else 1.0, "mAP": 99.0})
        writer.write(step, "test", {"mAP": value})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "spl')
    writer = _writer(tmp_path, 4)
    writer.write(6, "test", {"mAP": 25.0})
    values = writer.with_best({"mAP": 25.0, "CF1": 1.0})
    # Training lines do not rank models, and the 90 was of a future that never was.
    assert values == {"mAP": 25.0, "CF1": 1.0, "mAP_best": 30.0}
    writer.write(6, "test", values, final=True)
    writer.close()
    written = metrics.read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in written] == [2, 2, 4, 4, 6, 6]
    assert written[0]["loss"] is None and written[-1]["final"] is True
    # A finished run that goes on (it lost its last checkpoint, say) has its final line once.
    _writer(tmp_path, 6).close()
    assert not any(line.get("final") for line in metrics.read_lines(tmp_path / "metrics.jsonl"))


def test_other_processes_write_nothing(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, step=0, total_steps=1, active=False)
    writer.advance()
    writer.write(1, "test", {"mAP": 1.0})
    writer.close()
    assert writer.best == {"mAP": 1.0} and not list(tmp_path.iterdir())


def _config(**changes):
    tree = {
        "seed": 0,
        "train": {"log_every": 5, "epochs": 2},
        "data": {"root": "a", "workers": 0},
        "mesh": {"data": -1, "shard": ()},
        "loss": {},
    }
    config = ConfigDict(tree)
    config.update_from_flattened_dict(changes)
    return config


def test_configs_survive_the_way_through_json(tmp_path):
    workdirs.write_json(tmp_path / "config.json", json.loads(_config().to_json()))
    read = workdirs.read_config(tmp_path)
    assert read.mesh.shard == () and read.train.epochs == 2
    given = _config().to_dict()
    flat, before = workdirs._flat(read.to_dict()), workdirs._flat(given)
    assert {name: flat[name] for name in before} == before
    # Fields that came later have the values that they stand for.
    later = set(flat) - set(before)
    assert "nouns" in later and later <= set(workdirs._ADDED) and read.words.to_dict() == {}
    with pytest.raises(UserError, match="is no workdir of a run"):
        workdirs.read_config(tmp_path / "elsewhere")


def test_only_fields_that_change_the_result_belong_to_the_workdir(tmp_path):
    workdirs.write_json(tmp_path / "config.json", json.loads(_config().to_json()))
    workdirs.check(
        tmp_path,
        _config(**{"data.root": "b", "data.workers": 4, "mesh.data": 2, "train.log_every": 1}),
    )
    with pytest.raises(UserError, match=r"differs in seed \(0 there, 3 now\), train.epochs \(2"):
        workdirs.check(tmp_path, _config(**{"seed": 3, "train.epochs": 4}))
    workdirs.check(tmp_path / "new", _config(seed=3))


def test_paths_split_and_merge_without_loss():
    tree = {"clip": {"a": {"w": 1}, "b": 2}, "head": {"w": 3}}
    kept, hit = paths.split(tree, ("^clip/", "nothing")[:1], field="optimizer.freeze")
    assert kept == {"head": {"w": 3}} and hit == {"clip": {"a": {"w": 1}, "b": 2}}
    assert paths.merge(kept, hit) == tree
    assert paths.flatten(tree) == {"clip/a/w": 1, "clip/b": 2, "head/w": 3}
    assert paths.mask(tree, ("w$",), field="x") == {
        "clip": {"a": {"w": True}, "b": False},
        "head": {"w": True},
    }
    with pytest.raises(UserError, match=r"optimizer.freeze: 'clop' matches no parameter; .*clip/a"):
        paths.split(tree, ("clop",), field="optimizer.freeze")
    with pytest.raises(UserError, match=r"mesh.shard: '\[' is no regular expression"):
        paths.matches(tree, ("[",), field="mesh.shard")
    with pytest.raises(ValueError, match="same path"):
        paths.merge({"a": 1}, {"a": 1})


def test_the_hash_of_weights_sees_names_shapes_types_and_values():
    base = {"a": np.arange(4, dtype=np.float32)}
    others = [
        {"b": base["a"]},
        {"a": base["a"].reshape(2, 2)},
        {"a": base["a"].astype(np.float64)},
        {"a": base["a"] + np.float32(1e-6)},
    ]
    hashes = {checkpoints.weights_hash(tree) for tree in (base, *others)}
    assert len(hashes) == 5 and checkpoints.weights_hash({"a": jnp.arange(4.0)}) in hashes

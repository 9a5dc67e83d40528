"""Any number of devices trains the same model; checkpoints move between them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from trm_jax.train import sharding
from trm_jax.train.loop import Run
from trm_jax.types import UserError


def _losses(workdir):
    return [line["loss"] for line in tiny.lines(workdir) if line["split"] == "train"]


def _assert_same_memory(left, right):
    left, right = (jax.device_get(s.extras) for s in (left, right))
    for name in left:
        for x, y in zip(jax.tree.leaves(left[name]), jax.tree.leaves(right[name]), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def short(job):
    """Six steps, the last of them in stage two, each logged."""
    return job._replace(total_steps=6, log_every=1)


@pytest.fixture(scope="module")
def single(short, tmp_path_factory):
    """(final state, losses) on one device."""
    workdir = tmp_path_factory.mktemp("single")
    return tiny.run(short, workdir), _losses(workdir)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_more_devices_give_the_same_losses_and_memory(short, single, tmp_path, count):
    state = tiny.run(short, tmp_path, tiny.mesh(count))
    np.testing.assert_allclose(_losses(tmp_path), single[1], rtol=1e-5)
    _assert_same_memory(state, single[0])
    if count == 8:  # what eight devices saved, one restores
        run = Run(short, tmp_path, tiny.mesh(1))
        restored = run.prepare()
        assert run.resumed_from == 6
        for x, y in zip(
            jax.tree.leaves(jax.device_get(state)),
            jax.tree.leaves(jax.device_get(restored)),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {1}
        run.files.close()


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_every_number_of_devices_sees_the_whole_label_mask(experiment, count):
    seen = np.full_like(experiment.observed, 9)
    for batch in itertools.islice(experiment.job.batches(0), experiment.info.steps_per_epoch):
        placed = sharding.put_batch(batch, tiny.mesh(count))
        labels, index = (placed[k].addressable_shards for k in ("labels", "index"))
        assert len(labels) == count
        for mine, rows in zip(labels, index, strict=True):
            assert mine.device == rows.device
            seen[np.asarray(rows.data)] = np.asarray(mine.data)
    np.testing.assert_array_equal(seen, experiment.observed)


def test_sharded_parameters_lie_apart_and_give_the_same_losses(short, single, tmp_path):
    sharded = short._replace(shard=("^prompts/", "mlp/.*kernel$"))
    state = tiny.run(sharded, tmp_path, tiny.mesh(4, fsdp=2))
    np.testing.assert_allclose(_losses(tmp_path), single[1], rtol=1e-5)
    _assert_same_memory(state, single[0])
    kernel = state.params["region_attention"]["mlp"]["fc1"]["kernel"]  # [8, 32]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 16)}
    moments = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(state.opt_state)
        if jax.tree_util.keystr(path).endswith("['mlp']['fc1']['kernel']")
    ]
    assert len(moments) == 2 and all(m.sharding == kernel.sharding for m in moments)
    average = state.ema["region_attention"]["mlp"]["fc1"]["kernel"]
    assert average.sharding == kernel.sharding
    bias = state.params["region_attention"]["mlp"]["fc1"]["bias"]
    assert bias.sharding.is_fully_replicated


def test_batch_statistics_and_contrast_are_global(cache_dir, tmp_path):
    config = tiny.contrastive()
    config.model.clip.image.update({"layers": (1,)})
    job = tiny.build(config, cache_dir).job._replace(
        total_steps=8, log_every=1, evaluate=lambda params, extras: {"Rsum": 0.0}
    )
    before = jax.device_get(job.init()[1])
    states = [tiny.run(job, tmp_path / str(n), tiny.mesh(n)) for n in (1, 4)]
    losses = [_losses(tmp_path / str(n)) for n in (1, 4)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    one, four = (jax.device_get(s.extras["batch_stats"]) for s in states)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before["batch_stats"], one)
    assert min(jax.tree.leaves(moved)) > 0
    assert np.mean(losses[0][4:]) < np.mean(losses[0][:4])


def test_a_shard_pattern_that_matches_nothing_names_the_field(short, tmp_path):
    with pytest.raises(UserError, match="mesh.shard: 'nothing' matches no parameter"):
        tiny.run(short._replace(shard=("nothing",)), tmp_path, tiny.mesh(2, fsdp=2))


def test_meshes_and_batches_that_do_not_fit_the_devices():
    assert dict(sharding.make_mesh(-1, 2).shape) == {"data": 4, "fsdp": 2}
    with pytest.raises(UserError, match="mesh: data=3 x fsdp=1 is not 8"):
        sharding.make_mesh(3, 1)
    with pytest.raises(UserError, match="data.batch_size=6 is no multiple of the 4 devices"):
        sharding.check_batch_size(6, tiny.mesh(4))


def test_an_array_is_cut_along_its_largest_divisible_axis():
    mesh = tiny.mesh(4, fsdp=4)
    params = {"a": jnp.zeros((3, 8, 16)), "b": jnp.zeros((3, 5)), "c": jnp.zeros(())}
    placed = sharding.params_shardings(params, mesh, (".",))
    assert placed["a"].spec == jax.sharding.PartitionSpec(None, None, "fsdp")
    assert placed["b"].is_fully_replicated and placed["c"].is_fully_replicated

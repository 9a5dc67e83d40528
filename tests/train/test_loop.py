"""The loop: stopping, killing and resuming change nothing; bad samples and bad numbers show."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from tests import tiny
from trm_jax.train import loop
from trm_jax.train.preemption import Preempted, StopRequest
from trm_jax.types import UserError


def _assert_same_state(left, right):
    left, right = (jax.device_get(s) for s in (left, right))
    for name in ("step", "params", "frozen", "opt_state", "extras", "ema", "sums"):
        a, b = getattr(left, name), getattr(right, name)
        assert jax.tree.structure(a) == jax.tree.structure(b), name
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)


def _signalled(job, stop_at):
    """The job whose process gets SIGTERM while the batch of step `stop_at` is fetched."""

    def batches(start):
        for number, batch in enumerate(job.batches(start), start):
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return job._replace(batches=batches)


def test_a_run_logs_evaluates_and_checkpoints_at_the_asked_steps(finished, job):
    state, workdir = finished
    written = tiny.lines(workdir)
    steps = [(line["step"], line["split"]) for line in written]
    assert steps == [
        (5, "train"),
        (6, "test"),
        (10, "train"),
        (12, "train"),
        (12, "test"),
        (12, "test"),
    ]
    assert "final" not in written[-2] and written[-1]["final"] is True
    values = [line["mAP"] for line in written if line["split"] == "test"]
    assert written[-1]["mAP"] == values[-1] and written[-1]["mAP_best"] == max(values)
    assert int(state.step) == job.total_steps == 12
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [8, 12]


def test_train_lines_are_the_means_of_the_steps_since_the_last_one(job, finished, tmp_path):
    tiny.run(job._replace(log_every=1), tmp_path)
    single = [line for line in tiny.lines(tmp_path) if line["split"] == "train"]
    assert [line["step"] for line in single] == list(range(1, 13))
    grouped = [line for line in tiny.lines(finished[1]) if line["split"] == "train"]
    for line, part in zip(grouped, (single[:5], single[5:10], single[10:]), strict=True):
        for name in ("loss", "loss_region", "loss_query", "grad_norm"):
            mean = np.mean([step[name] for step in part])
            np.testing.assert_allclose(line[name], mean, rtol=1e-5, err_msg=name)
        assert line["learning_rate"] == part[-1]["learning_rate"]
    # Pseudo-labels exist from stage two on, and are rated on unknown entries alone.
    assert "pseudo_accuracy" not in single[4] and "pseudo_accuracy" in single[5]


@pytest.mark.parametrize("stop_at", [1, 6, 10])
def test_stopping_by_a_signal_and_resuming_equals_an_uninterrupted_run(
    job, finished, tmp_path, stop_at
):
    with pytest.raises(Preempted, match="checkpoint saved"):
        tiny.run(_signalled(job, stop_at), tmp_path)
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    # The batch of a step is fetched while the step before runs.
    assert saved == max(stop_at, 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    state = tiny.run(job, tmp_path)
    _assert_same_state(state, finished[0])
    assert tiny.lines(tmp_path) == tiny.lines(finished[1])


def test_any_number_of_stops_changes_nothing(job, finished, tmp_path):
    for stop_at in (2, 3, 7):
        with pytest.raises(Preempted, match=f"step {stop_at};"):
            tiny.run(_signalled(job, stop_at), tmp_path)
    # Outside the main thread there are no signals: a notebook asks by itself.
    request = StopRequest()
    assert not request.requested
    request.ask()
    assert request.requested
    state = tiny.run(job, tmp_path)
    _assert_same_state(state, finished[0])
    assert tiny.lines(tmp_path) == tiny.lines(finished[1])


def test_a_kill_leaves_a_torn_line_and_a_half_written_checkpoint(job, finished, tmp_path):
    class KilledError(Exception):
        pass

    def batches(start):
        for number, batch in enumerate(job.batches(start), start):
            if number == 11:
                raise KilledError
            yield batch

    with pytest.raises(KilledError):
        tiny.run(job._replace(batches=batches), tmp_path)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 12, "split": "tr')
    half = tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp"
    (half / "default").mkdir(parents=True)
    (half / "default" / "_METADATA").write_text("{")
    state = tiny.run(job, tmp_path)
    _assert_same_state(state, finished[0])
    assert tiny.lines(tmp_path) == tiny.lines(finished[1])


def test_killed_before_the_final_line_is_finished_by_the_next_start(job, finished, tmp_path):
    tiny.run(job, tmp_path)
    path = tmp_path / "metrics.jsonl"
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:-1]))
    tiny.run(job, tmp_path)
    assert tiny.lines(tmp_path) == tiny.lines(finished[1])


def test_bad_samples_are_counted_and_too_many_stop_the_run(job, tmp_path):
    def batches(start):
        for batch in job.batches(start):
            bad = np.isin(batch["index"], (3, 20))
            yield {**batch, "valid": ~bad}

    spoilt = job._replace(batches=batches, name_of=lambda i: f"photo_{i}.jpg", total_steps=4)
    run = loop.Run(spoilt._replace(max_bad_fraction=0.1), tmp_path / "few", tiny.mesh())
    list(run._batches(0))
    assert run.bad.names() == ["photo_3.jpg", "photo_20.jpg"]
    run.files.close()
    with pytest.raises(UserError, match=r"2 of 32 .*max_bad_fraction=0.05: photo_3.jpg, photo_20"):
        tiny.run(spoilt._replace(max_bad_fraction=0.05), tmp_path / "many")


def _with_nan(job, steps):
    def batches(start):
        for number, batch in enumerate(job.batches(start), start):
            if number in steps:
                batch = {**batch, "dense": np.full_like(batch["dense"], np.nan)}
            yield batch

    return job._replace(batches=batches)


def test_steps_that_are_not_finite_are_skipped_and_counted(job, tmp_path):
    spoilt = _with_nan(job._replace(log_every=4, total_steps=8), {1, 6, 7})
    state = tiny.run(spoilt, tmp_path)
    train = [line for line in tiny.lines(tmp_path) if line["split"] == "train"]
    assert [line["skipped"] for line in train] == [0.25, 0.5]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))
    assert np.isfinite(train[0]["loss"]) and np.isfinite(train[1]["loss"])


@pytest.mark.parametrize(
    ("policy", "steps"), [("skip", {4, 5, 6, 7}), ("stop", {5})], ids=["all", "stop"]
)
def test_nan_policy_stops_the_run(job, tmp_path, policy, steps):
    spoilt = _with_nan(job._replace(log_every=4, nan_policy=policy), steps)
    with pytest.raises(FloatingPointError, match=r"step 8: .*optimizer.learning_rate"):
        tiny.run(spoilt, tmp_path)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8


def test_microbatches_of_a_loss_that_does_not_decompose_are_refused(job, tmp_path):
    assert not job.method.decomposes
    with pytest.raises(UserError, match="train.microbatch: this method's loss looks at the whole"):
        loop.Run(job._replace(microbatch=4), tmp_path, tiny.mesh())


def test_a_microbatch_that_does_not_divide_the_batch_is_refused(job, tmp_path):
    additive = job._replace(method=job.method._replace(decomposes=True), microbatch=3)
    with pytest.raises(UserError, match="train.microbatch=3 does not divide data.batch_size=8"):
        loop.Run(additive, tmp_path, tiny.mesh())


def test_freeze_pattern_that_matches_nothing_names_the_field(job, tmp_path):
    with pytest.raises(UserError, match=r"optimizer.freeze: '\^clipp/' matches no parameter"):
        tiny.run(job._replace(freeze=("^clipp/",)), tmp_path)


def test_only_what_is_not_frozen_moves(job, finished):
    state, (before, _) = finished[0], job.init()
    for (path, old), new in zip(
        jax.tree.leaves_with_path(before["clip"]),
        jax.tree.leaves(state.frozen["clip"]),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new, err_msg=jax.tree_util.keystr(path))
    for name in ("prompts", "projections", "region_attention"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before[name], state.params[name])
        assert min(jax.tree.leaves(moved)) > 0, name


def test_moving_average_follows_its_recursion_and_is_what_is_evaluated(job, tmp_path):
    seen = []

    def evaluate(params, extras):
        del extras
        seen.append(jax.device_get(params["prompts"]["positive"]))
        return {"mAP": 0.0}

    # A run to step t is the start of the run to step t + 1: the schedule is the full job's.
    states = [
        tiny.run(job._replace(total_steps=total, evaluate=evaluate), tmp_path / str(total))
        for total in (1, 2)
    ]
    expected = np.asarray(job.init()[0]["prompts"]["positive"])
    for state in states:
        expected = 0.5 * expected + 0.5 * np.asarray(state.params["prompts"]["positive"])
        np.testing.assert_allclose(state.ema["prompts"]["positive"], expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(seen.pop(0), state.ema["prompts"]["positive"])


def test_a_run_compiles_its_step_once(job, tmp_path, monkeypatch):
    # Epochs, the change of stages, logging, a checkpoint and a resume with arrays from the disk.
    compiled = []
    original = loop.Run._compile

    def keep(run, placed):
        compiled.append(original(run, placed))
        return compiled[-1]

    monkeypatch.setattr(loop.Run, "_compile", keep)
    with pytest.raises(Preempted):
        tiny.run(_signalled(job, 6), tmp_path, tiny.mesh(2))
    tiny.run(job, tmp_path, tiny.mesh(2))
    assert [step._cache_size() for step in compiled] == [1, 1]

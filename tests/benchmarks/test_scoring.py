"""The scoring benchmark: its captions, its FLOPs against XLA's, both sides, its results file."""

import json
from typing import Any

import numpy as np
import pytest

from benchmarks import measurements
from benchmarks import scoring_plan as plans
from benchmarks import scoring_programs as programs
from benchmarks import scoring_report as report
from benchmarks import scoring_workers as workers
from benchmarks.scoring_programs import SCORERS, Task
from tests.benchmarks.results_checks import goes_on_where_it_stopped
from trm_jax.types import UserError

TINY = Task(
    "evaluation", "SCAN t2i", images=6, captions=4, width=32, sim_dim=8, regions=5, block=4,
    buckets=(12, 24, 48), sizes=((7, 20), (14, 40)), rounds=3,
)  # fmt: skip


def test_captions_are_as_long_as_those_of_flickr8k_and_sorted():
    found = programs.layout(5000, 128, TINY.buckets)
    assert [batches.length for batches in found] == [12, 24, 48]
    lengths = np.concatenate([batches.lengths.reshape(-1) for batches in found])
    real = lengths[lengths > 0]
    assert len(real) == 5000 and len(lengths) == 5120 and np.all(np.diff(real) >= 0)
    known = np.repeat(np.arange(4, 4 + len(programs.LENGTHS)), programs.LENGTHS)
    assert real.mean() == pytest.approx(known.mean(), abs=0.01) and 13 < real.mean() < 14
    for batches, shorter in zip(found, (0, 12, 24), strict=True):
        longest = batches.lengths.max(axis=1)
        assert np.all((longest <= batches.length) & (longest > shorter))
    for batches, sample in zip(found, programs.samples(found), strict=True):
        assert sample.length == batches.length and sample.lengths.shape == (1, 128)
        assert abs(sample.lengths.mean() - batches.lengths[batches.lengths > 0].mean()) < 0.2
    with pytest.raises(ValueError, match="a caption of 42 tokens"):
        programs.layout(30_000, 128, (12, 24))


@pytest.mark.parametrize("scorer", SCORERS)
def test_flop_are_those_of_xla_where_no_loop_hides_them(scorer):
    # Vectors so long that what is done to the entries of all pairs hardly counts.
    task = TINY._replace(scorer=scorer, images=16, regions=8, width=1024, sim_dim=128, block=0)
    model, draw = programs.make_model(task), programs.Draw(task.width)
    lengths = np.full(16, 12)
    sides = programs.image_side(model, draw.regions(16, 8)) | programs.caption_side(
        model, *draw.words(lengths, 12)
    )
    compiled = programs.evaluation(model).lower(model.params, model.extras, sides).compile()
    costs: Any = compiled.cost_analysis()
    counted = costs["flops"] / programs.flop(task, 16, lengths)
    # SGRAF makes similarity vectors of squared differences, entry by entry: 3 d beside 2 d s.
    assert 1.0 <= counted < 1.08


@pytest.mark.parity
@pytest.mark.parametrize("scorer", SCORERS)
def test_both_sides_of_an_evaluation_score_alike(scorer):
    rows = workers.evaluation_rows(TINY._replace(scorer=scorer), side=64)
    found = {(row["name"], row["metric"], row["condition"].get("size")): row for row in rows}
    assert found[scorer, "max_difference", None]["mean"] < 1e-4
    assert found[scorer, "score_range", None]["mean"] > 1e-2
    size = "7 x 20"
    ours, theirs = (found[name, "pairs_per_s", size] for name in (scorer, f"{scorer}, PyTorch"))
    assert ours["rounds"] == 3 and min(ours["values"].values()) > 0
    ratios = [ours["values"][k] / theirs["values"][k] for k in ours["values"]]
    assert ours["ratio"] == pytest.approx(np.median(ratios), rel=1e-4)
    seconds = found[scorer, "seconds", size]["values"]
    for k, speed in ours["values"].items():
        assert seconds[k] * speed == pytest.approx(7 * 20, rel=1e-4)
    rate, done = found[workers.PRODUCT, "gflop_per_s", None], found[scorer, "gflop_per_s", size]
    shares = [done["values"][k] / rate["values"][k] for k in rate["values"]]
    assert done["ratio"] == pytest.approx(np.median(shares), rel=1e-4)
    assert 1.0 < found[scorer, "padding", size]["mean"] < 3.0
    page = report.page([row | {"device": "cpu", "load": 0.1, "part": "evaluation", "task": "t"}
                        for row in rows])  # fmt: skip
    assert f"| cpu |  | 7 x 20 | 32 | 4 | {scorer} |" in page and f"**{ours['ratio']:.2f}**" in page


@pytest.mark.parity
@pytest.mark.parametrize("scorer", SCORERS)
def test_both_sides_of_a_training_step_have_the_same_gradient(scorer):
    rows = workers.training_rows(TINY._replace(part="training", scorer=scorer, sizes=()), side=64)
    found = {row["metric"]: row for row in rows if row["name"] == scorer}
    assert found["max_difference"]["mean"] < 1e-4 and found["gradient_difference"]["mean"] < 1e-3
    assert found["pairs_per_s"]["ratio"] > 0
    assert found["pairs_per_s"]["condition"]["timed"] == "PyTorch scaled from 4 captions"


def test_memory_falls_with_the_block(monkeypatch):
    monkeypatch.setattr(workers, "BLOCKS", (2, 0))
    task = Task("memory", "SAF", images=16, width=64, sim_dim=32, regions=8, buckets=(12, 48))
    rows = [row | {"device": "cpu", "part": "memory"} for row in workers.memory_rows(task)]
    found = {(row["metric"], row["condition"]["block"]): row["mean"] for row in rows}
    for metric in ("evaluation_mb", "training_mb"):
        assert 0 < 2 * found[metric, 2] < found[metric, 0]
    assert f"| evaluation | {found['evaluation_mb', 2]:.4g} |" in report.page(rows)


def test_the_plan():
    tasks = plans.plan(plans.PARTS, list(SCORERS), (1, 2), TINY, "cpu")
    assert len(tasks) == len(SCORERS) * (1 + 2 + 2) and tasks[0].part == "memory"
    assert len({task.label("cpu") for task in tasks}) == len(
        {(task.part, task.scorer, task.threads) for task in tasks}
    )
    again = [programs.read_task(json.loads(json.dumps(task._asdict()))) for task in tasks]
    assert again == tasks
    assert tasks[0].label("cpu") == tasks[0]._replace(rounds=9).label("cpu")
    (whole,) = plans.plan(["evaluation"], ["SGR"], (0,), TINY, "gpu")
    assert whole.whole and whole.captions == 0 and whole.sizes == TINY.sizes


def test_flags_are_checked():
    assert plans.some_of("parts", ["training", "memory"], plans.PARTS) == ["memory", "training"]
    with pytest.raises(UserError, match="--scorers: 'SGRAF' is none of SCAN i2t"):
        plans.some_of("scorers", ["SGRAF"], SCORERS)
    assert plans.sizes(["10x20"]) == ((10, 20),)
    for words in (["10"], ["0x5"], []):
        with pytest.raises(UserError, match="--sizes: "):
            plans.sizes(words)
    for given in ((48, 12), (12, 24)):
        with pytest.raises(UserError, match="--buckets=.* must be ascending"):
            plans.buckets(given)
    assert plans.buckets(())[-1] == 80


@pytest.mark.parity
def test_threads_that_are_not_there():
    with pytest.raises(UserError, match="--threads=4096: there are"):
        plans.threads([4096], "cpu")
    assert plans.threads([1], "cpu") == (1,) and plans.threads([1], "gpu") == (0,)


def test_started_again_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    def row(task):
        return measurements.timed_row(task, task.scorer, "max_difference", [0.5], "")

    tasks = [TINY._replace(part="training", scorer=name, sizes=()) for name in ("SAF", "SGR")]
    given = plans.BENCHMARK, tasks, row, tmp_path / "scoring.json", monkeypatch
    text = goes_on_where_it_stopped(*given, message="cpu training SGR")
    assert "| cpu |  | 32 | training | SGR | 0.5 |  |  |" in text

"""The matching benchmark: its captions, its three sides, what it counts, its results file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import matching_plan as plans
from benchmarks import matching_report as report
from benchmarks import matching_sides as sides
from benchmarks import matching_workers as workers
from benchmarks import measurements
from benchmarks.matching_sides import SIDES, Task
from tests.benchmarks.results_checks import goes_on_where_it_stopped

TINY = Task(
    "speed", tuple(SIDES), images=15, captions=40, regions=5, width=24, words=4, knowledge=60,
    torch_images=6, memory_mb=0.02, rounds=3,
)  # fmt: skip


def test_captions_have_as_many_different_words_as_real_ones():
    found = {}
    for captions, real in ((5000, 3132), (25_000, 7857)):
        drawn = sides.draw_captions(Task("", captions=captions), np.random.default_rng(0))
        lengths = np.diff(drawn.indptr)
        assert len(lengths) == captions and (lengths.min(), lengths.max()) == (5, 15)
        assert lengths.mean() == pytest.approx(10, abs=0.1)
        assert len(drawn.words) == pytest.approx(real, rel=0.1)
        assert set(drawn.indices.tolist()) == set(range(len(drawn.words)))
        found[captions] = len(drawn.words)
    assert found[25_000] > 2 * found[5000]


def _naive(inputs):
    """Pair by pair, in float64."""
    words = inputs.prototypes.astype(np.float64)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    scores = np.zeros((len(inputs.regions), len(inputs.captions.indptr) - 1))
    for i, regions in enumerate(inputs.regions.astype(np.float64)):
        own = regions[inputs.mask[i]]
        own /= np.linalg.norm(own, axis=1, keepdims=True)
        for j in range(scores.shape[1]):
            start, end = inputs.captions.indptr[j : j + 2]
            rows = inputs.captions.indices[start:end]
            scores[i, j] = (own @ words[rows].T).max(axis=0).mean()
    return scores


@pytest.mark.parametrize(
    "side", ["ours", "NumPy", pytest.param("PyTorch", marks=pytest.mark.parity)]
)
def test_each_side_scores_as_the_loop_over_pairs(side):
    inputs = sides.draw(TINY)
    assert not inputs.mask.all()  # some images have fewer regions
    out = np.zeros((15, 40), np.float32)
    done = SIDES[side](TINY, inputs, out)()
    assert done == (6 if side == "PyTorch" else 15)
    np.testing.assert_allclose(out[:done], _naive(inputs)[:done], atol=1e-5)


@pytest.mark.parity
def test_speeds_are_scaled_and_scores_compared(monkeypatch):
    clock: dict[str, Any] = {"now": 0.0}
    taken = {"ours": 1.0, "NumPy": 2.0, "PyTorch": 4.0}

    def timed(name):
        def make(task, inputs, out):
            run = SIDES[name](task, inputs, out)

            def stepped():
                clock["now"] += taken[name]
                return run()

            return stepped

        return make

    monkeypatch.setattr(workers, "SIDES", {name: timed(name) for name in SIDES})
    monkeypatch.setattr(workers.time, "perf_counter", lambda: clock["now"])
    rows = workers.speed_rows(TINY)
    found = {(row["name"], row["metric"]): row for row in rows}
    for name in ("NumPy", "PyTorch"):
        assert found[name, "max_difference"]["mean"] < 1e-5
    # PyTorch's four seconds are for 6 of 15 images.
    seconds = {name: found[name, "seconds"]["values"] for name in SIDES}
    assert seconds == {
        "ours": dict.fromkeys("012", 1.0), "NumPy": dict.fromkeys("012", 2.0),
        "PyTorch": dict.fromkeys("012", 10.0),
    }  # fmt: skip
    assert found["ours", "pairs_per_s"]["median"] == 600.0
    assert found["PyTorch", "pairs_per_s"]["ratio"] == 10.0
    assert found["NumPy", "pairs_per_s"]["ratio"] == 2.0
    rows = [row | {"device": "cpu", "load": 0.1, "part": "speed", "task": "t"} for row in rows]
    page = report.page(rows)
    lines = [line for line in page.splitlines() if "15 x 40" in line]
    names = [[name for name in SIDES if f"| {name} |" in line] for line in lines]
    assert names == [["ours"], ["NumPy"], ["PyTorch"]]
    assert "| **10.00** | 6 |" in lines[2] and "| MASK | 0.04 | 50.6 |" in page


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_peak_is_what_was_allocated_for_a_moment():
    held = np.ones(25_000_000)  # 200 MB, there before

    def run():
        part = np.ones(10_000_000)  # 80 MB
        return float(part.sum() + held[0])

    assert workers.peak_mb(run) == pytest.approx(80, abs=8)
    assert workers.peak_mb(lambda: held[:10].sum()) < 8


def test_sizes_are_those_of_table_8():
    found = {row["name"]: row["mean"] for row in workers.size_rows(Task("size"))}
    assert found["PAE (all that matching reads)"] == pytest.approx(4.205056, rel=1e-5)
    # 8.1 in the paper, which adds rounded cells.
    assert found["PAE, FRM and MTM"] == pytest.approx(7.989884, rel=1e-5)
    assert found["prototypes"] == pytest.approx(12_385 * 512 / 1e6, rel=1e-5)


def test_queries_are_answered(monkeypatch):
    monkeypatch.setattr(workers, "QUERIES", 2)
    monkeypatch.setattr(workers, "NETWORKS", {"features": 12, "word_width": 6})
    task = TINY._replace(part="query", sides=(), rounds=2)
    asked = []
    score_all = workers.knowledge_matching.score_all

    def watched(*arguments, **options):
        asked.append(score_all(*arguments, **options))
        return asked[-1]

    monkeypatch.setattr(workers.knowledge_matching, "score_all", watched)
    rows = workers.query_rows(task)
    names = ["image query", "image query: encoder", "caption query", "caption query: words"]
    assert [row["name"] for row in rows if row["metric"] == "seconds"] == names
    assert [row["name"] for row in rows if row["metric"] == "first"] == names[::2]
    assert all(row["mean"] > 0 for row in rows)
    # One image and all captions, then all images and one caption; the first and 2 x 2 of each.
    shapes = [scores.shape for scores in asked]
    assert shapes == [(1, 40)] * 5 + [(15, 1)] * 5 and asked[-1].any()
    rows = [row | {"device": "cpu", "load": 0.1, "part": "query", "task": "t"} for row in rows]
    assert "| cpu |  | 15 x 40 | caption query: words |" in report.page(rows)


def test_the_plan():
    sizes = ((10, 50), (50, 250))
    tasks = plans.plan(plans.PARTS, list(SIDES), sizes, (1, 2), TINY)
    parts = [task.part for task in tasks]
    assert parts == ["size"] + ["memory"] * 12 + ["query"] * 2 + ["speed"] * 4
    assert [task.sides for task in tasks[1:4]] == [("ours",), ("NumPy",), ("PyTorch",)]
    assert {(task.images, task.captions) for task in tasks if task.part == "query"} == {(10, 50)}
    assert len({task.label("cpu") for task in tasks}) == len(tasks)
    again = [sides.read_task(json.loads(json.dumps(task._asdict()))) for task in tasks]
    assert again == tasks
    assert tasks[0].label("cpu") == tasks[0]._replace(rounds=9).label("cpu")


@pytest.mark.parity
def test_started_again_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    def row(task):
        more = {"inputs_mb": 7, "result_mb": 1}
        return measurements.timed_row(task, task.sides[0], "peak_mb", [12.5], "MB", more)

    tasks = [TINY._replace(part="memory", sides=(side,)) for side in ("ours", "NumPy")]
    given = plans.BENCHMARK, tasks, row, tmp_path / "matching.json", monkeypatch
    text = goes_on_where_it_stopped(*given, message="cpu memory NumPy")
    assert "| cpu |  | 15 x 40 | NumPy | 12.5 | 7 | 1 |" in text


def test_a_worker_prints_its_rows():
    rows, error = measurements.measure(
        plans.BENCHMARK, Task("size", threads=0, width=16, knowledge=10)
    )
    assert not error and {row["unit"] for row in rows} == {"M"}
    found = {row["name"]: row["mean"] for row in rows}
    assert found["prototypes"] == 0.00016 and all(row["device"] for row in rows)
    rows, error = measurements.measure(plans.BENCHMARK, Task("nothing"))
    assert not rows and error.startswith("exit code 1")

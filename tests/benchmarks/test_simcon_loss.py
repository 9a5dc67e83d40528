"""The SimCon benchmark: its counts against XLA's, its oracle, its rows, its results file."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import simcon_loss_counts as counts
from benchmarks import simcon_loss_plan as plans
from benchmarks import simcon_loss_programs as programs
from benchmarks import simcon_loss_record as record
from benchmarks import simcon_loss_report as report
from benchmarks import simcon_loss_workers as workers
from benchmarks.simcon_loss_programs import Task
from tests.oracles.simcon import simcon as oracle
from trm_jax.losses.simcon import simcon_loss
from trm_jax.types import UserError


@pytest.mark.parametrize(
    "loss, alone, shared", [("InfoNCE", 4, 6), ("SimCon", 8, 12), ("MV-SimCon", 14, 21)]
)
def test_planned_flop_are_those_of_the_program(loss, alone, shared):
    # 250 pairs fill neither the tiles nor the devices.
    for devices, columns in ((1, ""), (2, "gather"), (8, "ring")):
        task = Task("devices", 250, 16, 16, devices=devices, columns=columns)
        assert counts.tile_flop(task, loss) == counts.planned_flop(task, loss)
    assert counts.units(Task("time", 2**20, 16, 16), loss) == pytest.approx(alone, rel=1e-4)
    assert counts.limit_units(loss) == alone
    assert counts.units(Task("time", 2**20, 16, 16, devices=256), loss) == shared


def test_planned_flop_are_those_of_xla_where_no_loop_hides_them():
    # Vectors so long that what is done to the entries of a tile hardly counts.
    task = Task("devices", 256, 1024, 64)
    for loss in ("SimCon", "MV-SimCon"):
        counted = counts.tile_costs(task, loss)["flops"] * counts.visits(task)
        assert 1.0 < counted / counts.planned_flop(task, loss) < 1.02


PROGRAM = """HloModule jit_loss

%inner.1 (p: f32[4,8]) -> f32[4,8] {
  ROOT %permute.1 = f32[4,8]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}

%outer.2 (p: f32[4,8]) -> f32[4,8] {
  %while.1 = (s32[], f32[4,8]{1,0}) while(%t), condition=%c.1, body=%inner.1, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %permute.2 = pred[5]{0} collective-permute(%q), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main.3 (p: f32[4,8]) -> f32[4,8] {
  %while.2 = (s32[], f32[4,8]{1,0}) while(%t), condition=%c.2, body=%outer.2, \
backend_config={"known_trip_count":{"n":"7"}}
  %gather.1 = (bf16[16]{0}, /*index=1*/s32[2,4]{1,0}) all-gather(%a, %b), dimensions={0}
  %sum.1 = f32[] all-reduce(%x), to_apply=%add
  %part.1 = f32[2]{0} reduce-scatter(%y), to_apply=%add
  ROOT %get.1 = f32[] get-tuple-element(%all-gather.1), index=0
}
"""


def test_collectives_in_loops_count_as_often_as_they_run():
    found = counts.collectives(PROGRAM, 4)
    assert found["collective-permute"] == {"count": 28, "bytes": 21 * 4 * 8 * 4 + 7 * 5}
    assert found["all-gather"] == {"count": 1, "bytes": (16 * 2 + 8 * 4) * 3 / 4}
    assert found["all-reduce"] == {"count": 1, "bytes": 2 * 4 * 3 / 4}
    assert found["reduce-scatter"] == {"count": 1, "bytes": 2 * 4 * 3}
    with pytest.raises(ValueError, match="collective-permute stands in a loop without"):
        counts.collectives(PROGRAM.replace('{"n":"3"}', '"?"'), 4)
    with pytest.raises(ValueError, match="all-gather-start"):
        counts.collectives(PROGRAM.replace(" all-gather(", " all-gather-start("), 4)


def test_devices_send_what_the_formula_says(capfd):
    tasks = [
        Task("devices", 256, 32, 16, loss="SimCon", devices=2, columns="gather"),
        Task("devices", 256, 32, 16, loss="InfoNCE", devices=4, columns="ring"),
        Task("planned", 256, 32, 16, loss="SimCon", devices=256, columns="ring"),
        Task("devices", 256, 32, 16, loss="SimCon", devices=64, columns="ring"),
    ]
    answers: list[list[dict[str, Any]]] = []
    assert plans.measure(tasks, answers.append).startswith("exit code 1")
    assert "8 devices where 64 are needed" in capfd.readouterr().err
    gather, ring, planned = ({row["metric"]: row["mean"] for row in rows} for rows in answers)
    # By hand: 128 columns of the other device, each 2 vectors, id and mask, 3 statistics of 2.
    assert gather["all-gather_mb_sent"] == pytest.approx(128 * (2 * 32 * 4 + 5 + 24) / 1e6)
    assert ring["collective-permute_mb_sent"] == pytest.approx(256 * (522 + 24) / 1e6)
    for found in (gather, ring):
        sent = sum(v for k, v in found.items() if k.endswith("_mb_sent") and "planned" not in k)
        assert sent - found["planned_mb_sent"] == pytest.approx(found["all-reduce_mb_sent"])
        assert found["all-reduce_mb_sent"] < 1e-4
        tiles, batch = found["program_mb_of_tiles"], found["program_mb_of_batch"]
        assert found["program_mb"] == pytest.approx(tiles + batch) and batch > 0
    # The ring: 4 arrays of columns forward, 3 more backward, each in 4 pieces 4 times.
    assert ring["collective-permute_count"] == 4 * 4 * (4 + 7)
    assert gather["gflop"] == pytest.approx(6 * 2 * 256**2 * 32 / 1e9)
    assert ring["gflop"] == pytest.approx(1.5 * 2 * 256**2 * 32 / 1e9)
    assert planned["units"] == pytest.approx(12 / 256)
    assert all(row["extrapolated"] for row in answers[2])
    assert answers[0][0]["device"].startswith("cpu")
    page = report.page([row | {"part": "devices"} for row in answers[1]])
    assert f"| {ring['gflop']:.4g} | 1.5 |" in page
    assert "| 176 collective-permute, 1 all-reduce |" in page


def test_dense_programs_take_more_memory(monkeypatch):
    monkeypatch.setattr(workers, "LOSSES", {"SimCon": programs.LOSSES["SimCon"]})
    rows = workers.memory_rows(Task("memory", 1024, 128, 128))
    streaming, dense = (row["mean"] for row in rows)
    assert [row["name"] for row in rows] == ["SimCon", "SimCon, dense"]
    assert dense > 3 * 1024**2 * 4 / 1e6 > 2 * streaming > 0


class FakePeer:
    """Stands for the process of PyTorch."""

    def __init__(self, task):
        images, text = programs.embeddings(task, 1)
        options: Any = {"scale": programs.SCALE, "threshold": programs.THRESHOLD}
        values = oracle([x.astype(float) for x in images], text.astype(float), **options)[0]
        self.facts = {"forms": ["eager"], "loss": values.mean()}

    def seconds(self, name):
        return {"eager": 100.0}[name]

    def close(self):
        return {}


def test_times_stand_beside_each_other_and_the_limit(monkeypatch):
    monkeypatch.setattr(workers, "_torch_worker", FakePeer)
    monkeypatch.setattr(workers, "_LONG", 1e3)
    monkeypatch.setattr(workers, "LOSSES", {k: programs.LOSSES[k] for k in ("InfoNCE", "SimCon")})
    task = Task("time", 64, 128, 32, peers=True, rounds=3)
    rows = workers.time_rows(task, chain_flop=1e7)
    found = {(row["name"], row.get("against"), row["metric"]): row for row in rows}
    simcon = found["SimCon", "InfoNCE", "seconds"]
    assert simcon["rounds"] == 3 and min(simcon["values"].values()) > 0
    base = found["InfoNCE", "matmul limit of InfoNCE", "seconds"]["values"]
    ratios = [simcon["values"][key] / base[key] for key in base]
    assert simcon["ratio"] == pytest.approx(np.median(ratios), rel=1e-4)
    assert found["SimCon", workers.TORCH, "seconds"]["ratio"] < 0.1
    assert found["SimCon", workers.DENSE, "seconds"]["ratio"] > 0
    assert found[workers.DENSE, "InfoNCE", "seconds"]["ratio"] > 0
    limit = found["matmul limit of SimCon", None, "seconds"]
    rate = found["tile product", None, "gflop_per_s"]
    assert limit["units"] == 8
    for key, seconds in limit["values"].items():
        flop = 8 * 2 * 64**2 * 128
        assert seconds * rate["values"][key] * 1e9 == pytest.approx(flop, rel=1e-4)
    assert found[workers.TORCH, None, "relative_difference"]["mean"] < 1e-5


def test_a_long_call_is_not_repeated(monkeypatch):
    calls: list[str] = []

    def side(name, seconds):
        return lambda: calls.append(name) or seconds

    sides = {"a": side("a", 0.2), "b": side("b", 30.0)}
    assert workers._in_turn(sides, 5) == {"a": [0.2], "b": [30.0]}
    calls.clear()
    sides = {"a": side("a", 0.2), "b": side("b", 0.3)}
    assert workers._in_turn(sides, 3) == {"a": [0.2] * 3, "b": [0.3] * 3}
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


def test_the_rows_oracle_is_the_dense_gradient(monkeypatch):
    task = Task("record", 48, 128)
    (images,), text = programs.embeddings(task, 1)
    rows = record._sample(task)
    monkeypatch.setattr(record, "_CHUNK_BYTES", 8 * 48 * 13)  # chunks that overlap
    known = record.anchors(images, text)
    found = record.row_oracle(images, text, known, rows, step=20)

    def mean(x, t):
        values, stats = simcon_loss(
            (x,), t, logit_scale=programs.SCALE, threshold=programs.THRESHOLD
        )
        return values.mean(), (values, stats)

    with jax.enable_x64(True):
        vectors = jnp.asarray(images, jnp.float64), jnp.asarray(text, jnp.float64)
        function = jax.jit(jax.grad(mean, argnums=(0, 1), has_aux=True))
        (of_x, of_t), (values, stats) = jax.device_get(function(*vectors))
    assert len(rows) == 12 and known.count[0].max() > 1
    np.testing.assert_allclose(known.count, stats[:2])
    for one, other in zip(found, (values, of_x, of_t), strict=True):
        np.testing.assert_allclose(one, other[rows], rtol=1e-9, atol=1e-14)
    similarities = images.astype(float) @ images.T.astype(float)
    texts = text.astype(float) @ text.T.astype(float)
    apart = np.abs(np.stack([similarities, texts]) - 0.9)[:, ~np.eye(48, dtype=bool)].min()
    assert known.margin == pytest.approx(apart) and apart > 1e-2


def test_a_record_is_checked_on_rounded_vectors():
    task = Task("record", 256, 128, 64, dtype="bfloat16", rounds=1)
    rows = workers.record_rows(task, chain_flop=1e7)
    rows = {row["metric"]: row for row in rows if row["name"] == "SimCon"}
    assert rows["loss_error"]["mean"] < 1e-3 and rows["gradient_cosine"]["mean"] > 0.999
    assert rows["threshold_margin"]["mean"] > 1e-2 and rows["mean_positives"]["mean"] > 1.2
    assert rows["seconds"]["ratio"] > 0


def test_a_peak_needs_a_device_that_tells_it():
    rows = workers.peak_rows(Task("peak", 64, 128, 32, loss="InfoNCE"))
    assert [row["metric"] for row in rows] == ["program_mb"] and rows[0]["mean"] > 0


@pytest.mark.parity
def test_the_largest_batch_of_the_peer_stands_in_the_page(monkeypatch):
    from benchmarks import torch_simcon

    def largest(task, form):
        return ([(8192, 0.1, 5e3), (16_384, 0.4, 2e4)], 32_768) if form == "eager" else ([], 8192)

    monkeypatch.setattr(torch_simcon, "largest", largest)
    rows = workers.fit_rows(Task("fit", 8192, 512, 2048, dtype="bfloat16"))
    page = report.page([row | {"device": "gpu", "part": "fit", "task": "fit"} for row in rows])
    assert "| gpu | 16384 | 512 | bfloat16 | 2048 | SimCon, PyTorch | 0.4 |" in page
    assert "| gpu | 8192 | 512 | bfloat16 | SimCon, PyTorch | peak_extra_mb | 5000 MB |" in page
    assert "largest_batch | 16384 pairs, 32768 does not fit |" in page
    assert "compiled | largest_batch | 0 pairs, 8192 does not fit |" in page and len(rows) == 6


@pytest.mark.parity
@pytest.mark.parametrize("loss", ["SimCon", "MV-SimCon"])
def test_the_peer_computes_the_same(loss):
    from benchmarks import torch_simcon

    task = Task("time", 96, 128)
    step = torch_simcon.Step(task, "eager", loss)
    images, text, *rest = programs.arguments(task, programs.LOSSES[loss][0])
    compiled = jax.jit(programs.gradient(task, loss, dense=True))
    (value, _), (of_images, of_text, of_scale) = compiled(images, text, *rest)
    np.testing.assert_allclose(step(), value, rtol=1e-5)
    for leaf, ours in zip(step.vectors, (*of_images, of_text), strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), ours, rtol=1e-4, atol=1e-7)
    assert step.scale.grad is not None
    np.testing.assert_allclose(step.scale.grad.numpy(), of_scale, rtol=1e-4)


def test_the_plan():
    tasks = plans.plan(["time", "memory", "devices"], [], [256, 512], "cpu")
    timed = [(t.batch, t.width, t.block) for t in tasks if t.part == "time"]
    assert (65_536, 256, 0) in timed and (16_384, 512, 0) in timed and (32_768, 512, 0) not in timed
    assert [t for t in timed if t[2]] == [(8192, 256, 256), (8192, 256, 512), (8192, 256, 1024)]
    assert len([t for t in tasks if t.part == "memory"]) == 14
    devices = [(t.loss, t.devices, t.columns) for t in tasks if t.part == "devices"]
    assert len(devices) == 2 * (1 + 2 * 3) and ("MV-SimCon", 8, "ring") in devices
    assert len({task.label("cpu") for task in tasks}) == len(tasks)
    assert all(Task(**json.loads(json.dumps(task._asdict()))) == task for task in tasks)
    grouped = plans.groups(tasks)
    assert sum(map(len, grouped)) == len(tasks)
    assert [len(group) for group in grouped[:3]] == [14, 14 + 4, 1]
    gpu = plans.plan(["gpu", "record"], [], [256], "gpu")
    assert ("record", 2**20, "bfloat16") in [(t.part, t.batch, t.dtype) for t in gpu]
    assert all(len(group) == 1 for group in plans.groups(gpu))


def test_flags_are_checked():
    assert plans.parts_of([], "cpu") == ["time", "memory", "devices"]
    assert plans.parts_of([], "gpu") == list(plans.PARTS)
    with pytest.raises(UserError, match="--parts: 'speed' is none of"):
        plans.parts_of(["speed"], "cpu")
    with pytest.raises(UserError, match="--parts: record needs a GPU"):
        plans.parts_of(["time", "record"], "cpu")
    with pytest.raises(UserError, match="--sizes: '1e3' is no whole number"):
        plans.numbers("sizes", ["64", "1e3"])


def _fake(metrics, calls, broken=()):
    """Measures tasks as `plans.measure` does, without a process."""

    def measure(group, finished):
        for task in group:
            if task.devices in broken:
                return "exit code 1"
            calls.append(task)
            values = {0: metrics[task.devices]}
            row = workers._row(task, task.loss, "program_mb_of_batch", values, "MB")
            finished([row | {"device": "cpu", "load": 0.1}])
        return ""

    return measure


def test_started_again_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    path, calls = tmp_path / "simcon_loss.json", []
    options: dict[str, Any] = {"again": False, "backend": "cpu", "device": "cpu"}
    tasks = [Task("devices", 64, 8, loss="SimCon", devices=n, columns="ring") for n in (1, 2, 8)]
    monkeypatch.setattr(plans, "measure", _fake({1: 8.0, 2: 4.2}, calls, broken=(8,)))
    with pytest.raises(RuntimeError, match="1 measurements failed: cpu devices .*devices=8"):
        plans.run(tasks, path, **options)
    body = json.loads(path.read_text())
    assert body["partial"] is True and [r["mean"] for r in body["rows"]] == [8.0, 4.2]
    calls.clear()
    monkeypatch.setattr(plans, "measure", _fake({8: 1.0}, calls))
    plans.run(tasks, path, **options)
    body = json.loads(path.read_text())
    assert calls == tasks[2:] and "partial" not in body
    assert [row.get("ratio") for row in body["rows"]] == [None, 0.525, 0.125]
    assert {"name", "command", "date", "device", "cores", "versions", "seconds"} <= set(body)
    monkeypatch.setattr(plans, "measure", _fake({1: 16.0}, calls))
    options["again"] = True
    plans.run(tasks[:1], path, **options)
    body = json.loads(path.read_text())
    assert sorted((r["mean"], r.get("ratio")) for r in body["rows"] if "ratio" in r) == [
        (1.0, 0.0625),
        (4.2, 0.2625),
    ]
    assert len(body["rows"]) == 3


def test_the_page():
    task = Task("time", 1024, 256, 512)
    row = workers._row(task, "SimCon", "seconds", {0: 0.5, 1: 0.25, 2: 0.75}, "s")
    row |= {"device": "cpu", "part": "time", "task": "cpu time"}
    rows = [
        row | {"ratio": 2.0, "against": "InfoNCE"},
        row | {"ratio": 1.25, "against": "matmul limit of SimCon"},
    ]
    for extra in workers.planned_rows(
        Task("planned", 1024, 256, 4, loss="SimCon", devices=256, columns="ring")
    ):
        rows.append(extra | {"device": "cpu", "part": "planned"})
    page = report.page(rows)
    line = "| cpu | 1024 | 256 | float32 | 512 | SimCon | 0.5 (0.25 to 0.75) "
    line += "| 2.00 x InfoNCE, 1.25 x limit |"
    assert line in page
    assert "| *1024* | *256* | *4* | *SimCon* | *256* | *ring* | *0.02517* | *0.04688* |" in page
    assert "## Temporaries" not in page and "## Agreement" not in page

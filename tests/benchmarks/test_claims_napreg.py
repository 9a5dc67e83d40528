"""The plan, the results and the pages of the NAPReg claims, without a training run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import claims_napreg_measure as measure
from benchmarks import claims_napreg_plan as plan
from benchmarks import claims_napreg_report as report
from benchmarks import harness
from tests.benchmarks.results_checks import row_of
from trm_jax.train import workdirs
from trm_jax.types import UserError

ROOT = Path(__file__).parents[2]
OTHERS = ("MS", "MS+NAP", "MS+Proxy-Anchor", "Polyloss", "InfoNCE")


def _tasks(seeds=3, **more):
    return plan.tasks(seeds=seeds, data="data", cache_dir=Path("runs/nouns"), **more)


@pytest.fixture(scope="module")
def tasks():
    return _tasks()


def _find(tasks, name, seed=0, **condition):
    found = [
        task
        for task in tasks
        if (task.name, task.seed) == (name, seed)
        and condition.items() <= task.conditions[0].items()
        and ("recipe" in condition) == ("recipe" in task.conditions[0])
    ]
    (task,) = found
    return task


def test_the_plan_has_every_run_once_in_the_order_of_their_worth(tasks):
    order = [(t.name, t.conditions[0]["model"], t.seed) for t in tasks]
    first = ("triplet", "triplet+NAP")
    assert order[:6] == [(name, "SCAN i2t", seed) for seed in range(3) for name in first]
    # The frequencies and contexts that the row MS+NAP does not have already.
    assert order[6:11] == [(name, "SCAN i2t", 0) for name in OTHERS]
    swept = [(t.conditions[0]["K"], t.config.loss.context) for t in tasks[11:16]]
    assert swept == [*((k, "mean_nouns") for k in (1, 3, 5, 8)), (2, "per_noun")]
    assert order[16:] == [
        (name, model, 0) for model in ("SCAN t2i", "SGRAF-SAF") for name in (*first, *OTHERS)
    ]
    assert len({task.folder for task in tasks}) == len(tasks) == 30
    assert len(_tasks(2, sweep_seeds=5)) == 2 * (7 + 5 + 14)


def test_the_row_of_the_paper_stands_in_every_recipe(tasks):
    places = _find(tasks, "MS+NAP", model="SCAN i2t", K=2, epochs=6).conditions
    main = {
        "source": "flickr8k_precomp", "model": "SCAN i2t", "pooling": "mean", "K": 2,
        "width": 256, "batch": 64, "epochs": 6,
    }  # fmt: skip
    assert places == (
        main,
        {**main, "recipe": "K"},
        {**main, "context": "mean_nouns", "recipe": "context"},
    )
    saf = _find(tasks, "MS", model="SGRAF-SAF").conditions[0]
    assert saf["sim_dim"] == 64 and not {"K", "pooling"} & saf.keys()
    # With another K of its own the row stands there, and 2 is a run more.
    moved = _tasks(1, overrides={"nouns.min_count": 3})
    assert len(moved) == len(_tasks(1))
    assert _find(moved, "MS+NAP", model="SCAN i2t", K=3).conditions[1]["recipe"] == "K"
    assert _find(moved, "MS+NAP", recipe="K", K=2).config.nouns.min_count == 2


def test_each_run_is_its_row(tasks):
    losses = {
        "triplet": ("triplet", "none"),
        "triplet+NAP": ("triplet", "nap"),
        "MS": ("multi_similarity", "none"),
        "MS+NAP": ("multi_similarity", "nap"),
        "MS+Proxy-Anchor": ("multi_similarity", "proxy_anchor"),
        "Polyloss": ("polynomial", "none"),
        "InfoNCE": ("infonce", "none"),
    }
    for task in tasks:
        config, condition = task.config, task.conditions[0]
        assert (config.loss.pair, config.loss.nouns) == losses[task.name]
        triplet = task.name.startswith("triplet")
        saf = condition["model"] == "SGRAF-SAF"
        assert config.loss.warmup_epochs == (0.0 if not triplet else 3.0 if saf else 1.0)
        assert config.seed == task.seed and config.data.root == "data"
        length = (config.train.epochs, config.optimizer.drop_epochs)
        assert length == ((3, (2,)) if saf else (6, (4,)))
        assert config.data.holdout == 0.0 and config.data.cache_dir == "runs/nouns"
        scorer = config.model.matching.scorer
        if saf:
            assert config.model.matching.kind == "sgraf"
            assert (scorer.module, scorer.sim_dim) == ("saf", 64)
            continue
        way = condition["model"].removeprefix("SCAN ")
        assert config.model.matching.kind == "scan" and scorer.direction == way
        assert scorer.attention_scale == (9.0 if way == "t2i" else 4.0)
        assert scorer.pooling == condition["pooling"]
        # Scores of LogSumExp exceed 1, which multi-similarity cannot have.
        assert scorer.pooling == ("lse" if way == "t2i" and triplet else "mean")
        assert scorer.pooling == "mean" or scorer.lse_scale == 6.0


def test_the_folder_follows_what_a_run_reads(tasks):
    folders = {(t.name, t.seed, t.conditions[0]["model"]): t.folder for t in tasks[:11]}

    def changed(**more):
        other = plan.tasks(**{"seeds": 3, "data": "data", "cache_dir": Path("x"), **more})[:11]
        names = {(t.name, t.seed, t.conditions[0]["model"]): t.folder for t in other}
        return {name for (name, *_), folder in names.items() if folder not in folders.values()}

    assert not changed(tagger="tagger.zip", data="elsewhere")
    # Rows without nouns do not read how they are found.
    nouns = {"triplet+NAP", "MS+NAP", "MS+Proxy-Anchor"}
    assert changed(overrides={"nouns.lemmatise": "off"}) == nouns
    everything = set(plan.METHODS)
    assert changed(overrides={"optimizer.learning_rate": 1e-3}) == everything
    assert changed(validation=True) == everything
    assert changed(overrides={"loss.warmup_epochs": 2.0}) == {"triplet", "triplet+NAP"}
    with pytest.raises(UserError, match="config.loss.beta2"):
        _tasks(1, overrides={"loss.beta2": 1.0})


def test_validation_holds_out_and_a_short_run_says_its_steps():
    held = _tasks(1, validation=True, overrides={"train.steps": 3})
    assert {task.config.data.holdout for task in held} == {0.1}
    assert all(t.conditions[0]["steps"] == 3 and "epochs" not in t.conditions[0] for t in held)


_T2I = {"triplet": 10, "triplet+NAP": 13, "MS": 20, "MS+NAP": 24, "MS+Proxy-Anchor": 19}


def _records(tasks):
    """R@1 of text to image by row, plus the seed (twice that with NAP) and the share of 8 in K."""
    records = {}
    for task in tasks:
        condition, nap = task.conditions[0], task.config.loss.nouns != "none"
        r1 = _T2I.get(task.name, 15) + task.seed * (1 + nap)
        k = condition.get("K", 0)
        r1 += {8: 1.0}.get(k, 0.0) + (condition.get("context") == "per_noun") * 2.0
        values = {f"t2i_R@{n}": float(r1 + n - 1) for n in (1, 5, 10)}
        values |= {f"i2t_R@{n}": float(2 * r1 + n - 1) for n in (1, 5, 10)}
        for way in measure.WAYS:
            values[f"{way}_Rsum"] = sum(v for name, v in values.items() if name.startswith(way))
        values["Rsum"] = values["t2i_Rsum"] + values["i2t_Rsum"]
        curve = {"step": [468, 936], "epoch": [1.0, 2.0], "Rsum": [values["Rsum"] - 1.0] * 2}
        values |= {"Rsum_best": values["Rsum"] + 1.0, "active": 0.5, "score_matched": 0.75}
        values |= {"steps": 936, "seconds": 60.0, "curve": curve}
        if nap:
            values |= {"proxies": 1000 * (9 - k), "loss_nouns": 0.25}
        records[task.folder] = {
            "name": task.name, "seed": task.seed, "values": values, "device": "cpu", "cores": 2,
        }  # fmt: skip
    return records


def _results(tasks, records=None):
    return report.results(tasks, records or _records(tasks), seeds=3, sweep_seeds=1)


def test_means_and_the_papers_figures_stand_beside_their_rows(tasks):
    file = _results(tasks)
    assert "partial" not in file and not any(file["unfinished_runs"].values())
    assert file["seconds"] == 30 * 60.0
    row = row_of(file, "triplet", "t2i_R@1", model="SCAN i2t")
    assert (row["mean"], row["std"], row["seeds"], row["paper"]) == (11.0, 1.0, 3, 32.3)
    row = row_of(file, "MS+NAP", "Rsum", model="SCAN i2t", recipe="K", K=8)
    # R@1 are 25 and 50; each R@5 has 4 and each R@10 9 more.
    assert (row["mean"], row["std"], row["paper"]) == (3 * 75 + 26, None, 188.7 + 224.2)
    row = row_of(file, "MS+NAP", "proxies", model="SCAN i2t", recipe="K", K=1)
    assert (row["mean"], row["paper"]) == (8000, 3874)
    # Its K says nothing of these: other models, other losses, another context.
    for row in file["rows"]:
        known = row["condition"]["model"] == "SCAN i2t" and row["name"] in ("triplet", "MS+NAP")
        assert row["paper"] is None or (known and row["condition"].get("recipe") != "context")
    # The sums are those of the table of each direction.
    assert report.PAPER[2]["Rsum"] == pytest.approx(417.7)
    assert {k: v["proxies"] for k, v in report.PAPER.items()} == {
        0: 0, 1: 3874, 2: 2444, 3: 1950, 5: 1438, 8: 1102,
    }  # fmt: skip


def test_leads_are_taken_seed_by_seed(tasks):
    gain = report.leads(_results(tasks))
    row = row_of(gain, "triplet+NAP over triplet", "t2i_R@1", model="SCAN i2t")
    # 13, 15, 17 over 10, 11, 12.
    assert row["values"] == {"0": 3.0, "1": 4.0, "2": 5.0} and row["paper"] is None
    assert (row["mean"], row["std"]) == (4.0, 1.0)
    row = row_of(gain, "MS+NAP over MS", "i2t_R@1", model="SGRAF-SAF")
    assert (row["mean"], row["std"], row["seeds"]) == (8.0, None, 1)
    assert row_of(gain, "MS+Proxy-Anchor over MS", "t2i_R@1", model="SCAN t2i")["mean"] == -1.0
    row = row_of(gain, "MS+NAP over triplet", "i2t_Rsum", model="SCAN i2t")
    # One seed of both; the paper has 229.7 and 216.0.
    assert (row["seeds"], row["mean"], row["paper"]) == (1, 3 * 28.0, 13.7)


def test_pages_are_written_from_the_file_alone(tasks, tmp_path):
    path = tmp_path / "claims.json"
    harness.write_results(path, _results(tasks))
    report.write_pages(workdirs.read_json(path), path)
    text = path.with_suffix(".md").read_text()
    assert "| triplet | 11.0 ± 1.0 (32.3) | 15.0 ± 1.0 | 20.0 ± 1.0 | 22.0 ± 2.0 (51.2) |" in text
    assert "| triplet+NAP over triplet | 4.0 ± 1.0 | 12.0 ± 3.0 | 8.0 ± 2.0 |" in text
    assert "| MS+NAP, K = 8 | **25.0** (38.5) | **88.0** (188.7) |" in text
    assert "| without nouns, MS | 20.0 | 73.0 |" in text
    assert "| MS+NAP, K = 1 | 8000 (3874) |" in text
    assert "| per_noun | **26.0** |" in text and "| mean_nouns | 24.0 |" in text
    # 43.9 + 74.2 + 82.8 + 67.9 + 89.0 + 94.4, and 471.7 with NAPReg.
    assert "| SCAN i2t, BiGRU, triplet | 43.9 | 74.2 | 82.8 | 67.9 | 89.0 | 94.4 | 452.2 |" in text
    assert "SCAN i2t +19.5 there, SCAN i2t +126.0 here; SGRAF +7.9 there, SGRAF-SAF +126.0" in text
    assert "LogSumExp pools triplet and triplet+NAP, the mean all others" in text
    assert "| MS | 0.50 | 0.75 | – | 60.00 |" in text
    pictures = {p.name for p in tmp_path.glob("*.png") if p.stat().st_size > 10_000}
    assert pictures == {"claims.png", "claims_curves.png"}
    assert pictures == set(re.findall(r"\]\((\S+\.png)\)", text))


def test_pages_are_written_whatever_is_still_missing(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(report.charts, "draw", lambda *_, **__: None)
    monkeypatch.setattr(report.report, "chart", lambda *_, **__: None)
    path, records, done = tmp_path / "claims.json", _records(tasks), {}
    # Some of every kind alone, and more and more of them.
    for folder in list(records)[::-3]:
        for part in ({folder: records[folder]}, done):
            done[folder] = records[folder]
            file = _results(tasks, part)
            harness.write_results(path, file)
            report.write_pages(workdirs.read_json(path), path)
            text = path.with_suffix(".md").read_text()
            left = sum(file["unfinished_runs"].values())
            assert left == len(tasks) - len(part) and ("**Partial**" in text) == (left > 0)


class _Source:
    """Ten images of five captions."""

    def __len__(self):
        return 10

    def captions(self, index):
        return (f"caption of {index}",) * 5


def test_a_run_is_evaluated_after_every_epoch_of_captions(monkeypatch, tmp_path):
    recalls = {"t2i_R@1": 1.0, "t2i_R@5": 2.0, "t2i_R@10": 3.0}
    recalls |= {"i2t_R@1": 10.0, "i2t_R@5": 20.0, "i2t_R@10": 30.0}
    told = []

    def train(config, folder):
        told.append(config.train.to_dict())
        lines = [
            {"step": 6, "split": "train", "active": 0.75, "score_matched": 0.25},
            {"step": 6, "split": "test", **recalls, "Rsum": 70.0},
            {"step": 12, "split": "train", "active": 0.5, "score_matched": 0.375},
            {"step": 12, "split": "test", **recalls, "Rsum": 66.0},
        ]
        final = {**lines[-1], "Rsum_best": 70.0, "final": True}
        text = "".join(f"{line}\n".replace("'", '"') for line in lines)
        (Path(folder) / "metrics.jsonl").write_text(text)
        workdirs.write_json(Path(folder) / "run.json", {"wall_seconds": 5.0})
        workdirs.write_json(Path(folder) / "vocabulary.json", {"nouns": {"nouns": ["dog", "cat"]}})
        return final

    monkeypatch.setattr(measure.runner, "train", train)
    monkeypatch.setattr(measure.datasets, "open_data", lambda data: (_Source(), None, "test"))
    config = _tasks(1, overrides={"data.batch_size": 8, "train.epochs": 2})[0].config
    values = measure.training(config, tmp_path)
    # 50 captions are 6 whole batches of 8.
    every = {name: told[0][name] for name in ("log_every", "eval_every", "checkpoint_every")}
    assert set(every.values()) == {6} and values["steps"] == 12
    assert (values["t2i_Rsum"], values["i2t_Rsum"]) == (6.0, 60.0)
    assert (values["Rsum"], values["Rsum_best"], values["proxies"]) == (66.0, 70.0, 2)
    assert (values["active"], values["score_matched"], values["seconds"]) == (0.5, 0.375, 5.0)
    curve = values["curve"]
    assert (curve["epoch"], curve["Rsum"]) == ([1.0, 2.0], [70.0, 66.0])
    assert curve["i2t_R@10"] == [30.0, 30.0]


# Several commands in one process, which imports JAX once.
_COMMANDS = """
import json, sys
from benchmarks import claims_napreg
from launch import cli
for words in json.loads(sys.argv[1]):
    cli.run(claims_napreg.main, ["claims_napreg.py", *words])
"""


def test_the_command_goes_on_from_records_of_runs_and_results(tmp_path):
    data = tmp_path / "flickr8k_precomp"
    data.mkdir()
    (data / "train_ims.npy").touch()
    tasks = plan.tasks(seeds=1, data=str(data), cache_dir=tmp_path)
    records = _records(tasks)
    run, kept = tasks[0].folder, tasks[1].folder
    (tmp_path / "runs" / run).mkdir(parents=True)
    workdirs.write_json(tmp_path / "runs" / run / "record.json", records[run])
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "claims.json"
    workdirs.write_json(path, {"records": {kept: records[kept]}})
    same = ("--seeds=1", f"--results={path}")
    commands = [
        # Nothing is left of these two rows, so that it only writes what is known ...
        [*same, f"--runs={tmp_path}/runs", "--only=model=SCAN i2t,name=triplet|triplet+NAP"],
        # ... and this knows both from the results file.
        [*same, f"--runs={tmp_path}/none", "--only=", "--dry-run"],
        [*same, f"--data={tmp_path}"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, json.dumps(commands)],
        cwd=ROOT, env={**os.environ, "TRM_DATA": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert said[0] == "0 runs to do", done.stderr
    file = workdirs.read_json(path)
    assert set(file["records"]) == {run, kept}
    assert row_of(file, "triplet+NAP", "t2i_R@1")["mean"] == 13.0
    assert file["unfinished_runs"] == {"SCAN i2t": 10, "SCAN t2i": 7, "SGRAF-SAF": 7}
    assert "| triplet+NAP over triplet | 3.0 |" in path.with_suffix(".md").read_text()
    listed = [("done" if t.folder in (run, kept) else "todo", t.folder) for t in tasks]
    assert said[1:] == [" ".join(line) for line in listed]
    # A mistake is told in one line.
    told = f"error: --data={tmp_path} has no train_ims.npy; give flickr8k_precomp's folder"
    assert (done.returncode, done.stderr.splitlines()) == (2, [told])

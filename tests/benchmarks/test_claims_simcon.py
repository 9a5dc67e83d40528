"""The plan, the measurement and the pages of the SimCon claims."""

import ast
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import claims_simcon_curves as curves
from benchmarks import claims_simcon_measure as measure
from benchmarks import claims_simcon_plan as plan
from benchmarks import claims_simcon_report as report
from benchmarks import harness
from trm_jax.train import workdirs
from trm_jax.types import BadSampleError, UserError

ROOT = Path(__file__).parents[2]
AT = {"source": "glyphs", "noise": 0.3, "batch": plan.BATCH}


@pytest.fixture(scope="module")
def tasks():
    return plan.tasks(seeds=2, data="data")


def _find(tasks, name, seed=0, **condition):
    (found,) = [t for t in tasks if t.name == name and t.seed == seed and condition in t.conditions]
    return found


def test_the_plan_starts_with_the_ablation_and_has_every_run_once(tasks):
    assert [(t.name, dict(t.conditions[0])) for t in tasks[:5]] == [
        (name, AT) for name in ("InfoNCE", "SimCon", "+views", "+NCS", "+joint positives")
    ]
    assert len({task.folder for task in tasks}) == len(tasks)
    counts = {s: sum(t.conditions[0]["source"] == s for t in tasks) for s in plan.SOURCES}
    # Two seeds of 5 rows and 2 more noises of 2; one seed of 3 more recipes, 5 more batches of 2.
    # And one seed of two methods with two shuffles on the photos.
    wanted = {"glyphs": 2 * (5 + 4) + 3 + 10, "flickr8k_features": 2 * 6, "flickr8k_photos": 4}
    wanted |= {"glyphs_exchanged": 3, "glyphs_later": 2, "glyphs_without_ncs": 2}
    assert counts == wanted
    assert counts == {source: plan.count_runs(source, 2, 1) for source in plan.SOURCES}
    assert (
        plan.count_runs("glyphs", 3, 1) == 40 and plan.count_runs("flickr8k_features", 3, 1) == 18
    )
    more = plan.tasks(seeds=2, sweep_seeds=5)
    assert len(more) == 2 * (5 + 4 + 2 + 3 + 10) + 2 * 3


def test_each_row_of_the_ablation_adds_one_thing(tasks):
    expected = {  # views, joint positives, weight of NCS
        "InfoNCE": ("infonce", None, None),
        "SimCon": ("simcon", None, None),
        "+views": ("mv_simcon", False, 0.0),
        "+NCS": ("mv_simcon", False, 1.0),
        "+joint positives": ("mv_simcon", True, 1.0),
    }
    for name, (loss, joint, weight) in expected.items():
        config = _find(tasks, name, seed=1, **AT).config
        assert config.loss.name == loss and config.seed == 1
        assert config.loss.self_similarity == "exclude"
        if loss == "mv_simcon":
            assert (config.loss.joint_positives, config.loss.ncs_weight) == (joint, weight)


def test_noise_and_seed_reach_the_data(tasks):
    for task in tasks:
        condition, data = task.conditions[0], task.config.data
        glyphs = condition["source"].startswith("glyphs")
        exchanged = condition["source"] not in ("glyphs", *plan.VARIANTS)
        found = data.caption_shuffle if exchanged else data.options.caption_noise
        assert not (glyphs and exchanged and data.options.caption_noise)
        assert found == condition["noise"] and data.batch_size == condition["batch"]
        assert task.config.seed == task.seed
        if not glyphs:
            photos = condition["source"] == "flickr8k_photos"
            assert data.label_seed == task.seed
            assert data.root == ("data/flickr8k" if photos else "data/flickr8k_precomp")
            assert task.config.method == "simcon" and task.config.data.holdout == 0.0
            assert task.config.model.clip.image.kind == ("resnet" if photos else "features")


def test_recipes_and_batch_sizes(tasks):
    for recipe in plan.RECIPES:
        config = _find(tasks, "SimCon", **AT, recipe=recipe).config
        fixed, include = recipe.startswith("tau fixed"), recipe.endswith("include")
        assert config.optimizer.freeze == (("logit_scale$",) if fixed else ())
        assert config.loss.self_similarity == ("include" if include else "exclude")
    # The ablation's SimCon is one of the recipes: it is measured once.
    shared = _find(tasks, "SimCon", **AT)
    assert shared.conditions[1] == {**AT, "recipe": "tau learnable, exclude"}
    rate = _find(tasks, "InfoNCE", **AT).config.optimizer.learning_rate
    four = _find(tasks, "InfoNCE", **{**AT, "batch": 4 * plan.BATCH}).config
    assert four.optimizer.learning_rate == pytest.approx(2 * rate)
    assert four.train.epochs == shared.config.train.epochs and not four.train.steps


def test_validation_sees_other_images_and_a_mistyped_field_is_named(tasks):
    chosen = plan.tasks(seeds=1, data="data", validation=True)
    for task in chosen:
        data = task.config.data
        if task.conditions[0]["source"].startswith("glyphs"):
            assert data.options.seed != tasks[0].config.data.options.seed
        else:
            assert data.holdout == 0.1
    assert not {task.folder for task in chosen} & {task.folder for task in tasks}
    with pytest.raises(UserError, match="config.loss.beta"):
        plan.tasks(seeds=1, overrides={"loss.beta": 1.0})


def test_fields_younger_than_the_records_count_only_where_they_are_set(tasks):
    task = _find(tasks, "InfoNCE", **AT)
    config = task.config.copy_and_resolve_references()
    for field, value in harness._LATER_FIELDS.items():
        section, _, name = field.rpartition(".")
        with_default, without, other = (config.copy_and_resolve_references() for _ in range(3))
        parts = [c[section] if section else c for c in (with_default, without, other)]
        parts[0][name] = value
        if name in parts[1]:
            del parts[1][name]
        others = {str: "x", list: (1,), int: 5, dict: ConfigDict({"x": 1})}
        parts[2][name] = others.get(type(value), 0.5)
        prints = [
            harness.Task("", (), 0, c, measure.training_curve).fingerprint()
            for c in (with_default, without, other)
        ]
        assert prints[0] == prints[1] != prints[2], field


def test_the_curve_joins_evaluation_and_training_lines():
    lines = [
        {"step": 1, "split": "train", "logit_scale": 14.0, "loss": 3.0},
        {"step": 2, "split": "train", "logit_scale": 14.1, "own_weight": 0.5},
        {"step": 2, "split": "test", "mIoU": 10.00004, "Rsum": 50.0},
        {"step": 3, "split": "train", "logit_scale": 14.2, "own_weight": 0.25},
        {"step": 3, "split": "test", "mIoU": 12.0, "Rsum": 40.0, "seconds": 3.0},
        {"step": 3, "split": "test", "mIoU": 12.0, "mIoU_best": 12.0, "final": True},
    ]
    assert measure.read_curve(lines) == {
        "step": [2, 3],
        "mIoU": [10.0, 12.0],
        "Rsum": [50.0, 40.0],
        "own_weight": [0.5, 0.25],
        "logit_scale": [14.1, 14.2],
    }


_BASE = {"InfoNCE": 20, "SimCon": 24, "+views": 19, "+NCS": 26, "+joint positives": 30}


def _records(tasks):
    """mIoU: the row's base, less 10 times the noise, plus the seed; "+views" gains 3 a seed."""
    records = {}
    for task in tasks:
        seed = 3 * task.seed if task.name == "+views" else task.seed
        last = _BASE[task.name] - 10.0 * task.conditions[0]["noise"] + seed
        shares = (0.25, 0.5, 0.75, 1.0) if task.name == "InfoNCE" else (0.5, 0.75, 0.9, 1.0)
        values = {"mIoU": last, "mIoU_best": last, "Rsum": 5 * last, "i2t_R@1": last}
        curve = {name: [share * values[name] for share in shares] for name in ("mIoU", "Rsum")}
        watched = {"logit_scale": 15.0}
        if task.name != "InfoNCE":  # which has no positives
            watched |= {"own_weight": 0.125, "positives_image": 3.5}
        values |= {**watched, "seconds": 10.0, "curve": {"step": [100, 200, 300, 400], **curve}}
        records[task.folder] = {
            "name": task.name, "seed": task.seed, "values": values, "device": "cpu", "cores": 2,
        }  # fmt: skip
    return records


def _results(tasks, records=None, before=None):
    return report.results(
        tasks, records or _records(tasks), seeds=2, sweep_seeds=1, before=before or {}
    )


def test_means_leads_and_steps_by_hand(tasks):
    file = _results(tasks)
    rows = [r for r in file["rows"] if r["condition"] == AT and r["metric"] == "mIoU"]
    # 24 - 3 + {0, 1} and 30 - 3 + {0, 1}
    means = {r["name"]: (r["mean"], r["std"], r["paper"]) for r in rows}
    assert means["SimCon"] == (21.5, 0.7071, 30.4)
    assert means["+joint positives"] == (27.5, 0.7071, 35.0)
    assert not [r for r in file["rows"] if r["paper"] and r not in rows]
    gains = {
        r["name"]: (r["mean"], r["std"])
        for r in report.leads(file)["rows"]
        if r["condition"] == AT and r["metric"] == "mIoU"
    }
    # "+views" is 16 and 19 beside InfoNCE's 17 and 18.
    assert gains["SimCon"] == (4.0, 0.0) and gains["+views"] == (0.0, 1.4142)
    # InfoNCE ends at 17 and 18. SimCon has 10.5, 15.75, 18.9, 21 and 11, 16.5, 19.8, 22.
    assert curves.steps_to_pass(file, "mIoU", AT) == {
        "InfoNCE": {0: 400, 1: 400},
        "SimCon": {0: 300, 1: 300},
        "+views": {0: None, 1: 400},
        "+NCS": {0: 200, 1: 200},
        "+joint positives": {0: 200, 1: 200},
    }


def test_partial_results_keep_what_is_not_planned(tasks):
    whole = _results(tasks)
    assert "partial" not in whole and not any(whole["unfinished_runs"].values())
    glyphs = plan.tasks(seeds=2)
    part = dict(itertools.islice(_records(glyphs).items(), 3))
    file = _results(glyphs, part, whole)
    left = sum(n for source, n in file["unfinished_runs"].items() if source.startswith("gl"))
    assert file["partial"] and left == len(glyphs) - 3
    features = [r for r in whole["rows"] if not r["condition"]["source"].startswith("gl")]
    assert [r for r in file["rows"] if r not in features] == _results(glyphs, part)["rows"]
    assert features and [r for r in file["rows"] if r in features] == features
    kept = {k: r for k, r in whole["records"].items() if k.startswith("flickr8k")}
    assert file["records"] == kept | {k: whole["records"][k] for k in part}


def test_pages_are_written_from_the_file_alone(tasks, tmp_path):
    path = tmp_path / "claims.json"
    harness.write_results(path, _results(tasks))
    report.write_pages(workdirs.read_json(path), path)
    text = path.with_suffix(".md").read_text()
    assert "| InfoNCE | 17.5 ± 0.7 (16.0) | 87.5 ± 3.5 |" in text
    assert "| +joint positives | **27.5 ± 0.7** (35.0) |" in text
    assert "| +views | 0.0 ± 1.4 | 0.0 ± 7.1 |" in text
    assert "InfoNCE 16.0 < SimCon 30.4 < +views 31.1 < +NCS 32.3 < +joint positives 35.0" in text
    assert "| +views | 400 (100 %), 1 of 2 seeds | 400 (100 %), 1 of 2 seeds |" in text
    assert "| SimCon | 300 ± 0 (75 %) | 300 ± 0 (75 %) |" in text
    # One seed, also of the row that the ablation has two of; equal means are all the best.
    assert "| tau fixed, include | **21.0** |" in text
    assert re.search(r"\| mIoU \| 0 % \| 30 % \| 60 % \|", text)
    assert "| mIoU | 64 | 128 | 256 | 512 | 1024 | 2048 |" in text
    pictures = {p.name for p in tmp_path.glob("*.png") if p.stat().st_size > 10_000}
    assert pictures == {
        f"claims_{name}.png" for name in ("curves", "noise", "batch", *plan.SOURCES[-2:])
    }
    assert pictures == set(re.findall(r"\]\((\S+\.png)\)", text))


def test_pages_are_written_whatever_is_still_missing(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(report.charts, "draw", lambda *_, **__: None)
    path, records, done = tmp_path / "claims.json", _records(tasks), {}
    for task in tasks[::-1]:
        for part in ({task.folder: records[task.folder]}, done):
            done[task.folder] = records[task.folder]
            harness.write_results(path, _results(tasks, part))
            report.write_pages(workdirs.read_json(path), path)
            assert len(path.with_suffix(".md").read_text()) > 500


class _Pairs:
    """130 images of three grey levels with captions that name them; one cannot be read."""

    def __len__(self):
        return 130

    def captions(self, index):
        return (f"{index % 3}", "another caption")

    def read(self, index):
        if index == 5:
            raise BadSampleError("5 is broken")
        return {"image": np.full((4, 4, 3), index % 3, np.uint8)}


class _Model:
    """Embeds an image by its grey level and a caption by its token; three directions."""

    config = ConfigDict({
        "method": "simcon", "data": {"text_length": 1}, "loss": {"thresholds": (0.99, 0.9)},
    })  # fmt: skip
    inputs, step = {"image": None}, 7

    def images(self, images, size):
        for start in range(0, len(images), size):
            part = np.stack(images[start : start + size])
            yield {"image": np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))}

    def tokenizer(self, texts, length):
        return np.array([[int(text)] for text in texts])

    def run(self, name, batches):
        for batch in batches:
            level = batch["image"][:, 0, 0, 0] if name == "embed_image" else batch["tokens"][:, 0]
            assert len(level) == 64  # one shape, one program
            yield {"embedding": np.eye(3)[level]}


def test_positives_of_a_run_name_its_readable_images(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(measure.predictor, "load", lambda workdir: _Model())
    monkeypatch.setattr(measure.datasets, "open_data", lambda data: (_Pairs(), None, "test"))
    monkeypatch.setattr(
        measure.positives,
        "render_positives",
        lambda anchors, images, captions, **more: drawn.update(
            anchors=anchors, images=images, captions=captions, **more
        ),
    )
    measure.positives_picture(tmp_path, images=100)
    levels = [int(image[0, 0, 0]) for image in drawn["images"]]
    assert levels == [i % 3 for i in range(101) if i != 5]
    assert drawn["captions"] == [str(level) for level in levels]
    assert {levels[anchor.index] for anchor in drawn["anchors"]} == {0, 1, 2}
    for anchor in drawn["anchors"]:
        alike = {i for i, level in enumerate(levels) if level == levels[anchor.index]}
        for mined in (anchor.by_image, anchor.by_text):
            assert set(mined.indices.tolist()) == alike - {anchor.index}
    assert "100 training images, cosine ≥ 0.9, step 7" in drawn["note"]
    monkeypatch.setattr(_Model, "config", ConfigDict({"method": "contrastive"}))
    with pytest.raises(UserError, match="no run of the method simcon"):
        measure.positives_picture(tmp_path)


TINY = {
    "data.train_size": 16, "data.batch_size": 8, "data.test_size": 6, "train.steps": 3,
    "model.clip.image.width": 16, "model.clip.image.depths": "(1, 1)",
    "model.clip.image.group_tokens": "(4, 0)", "model.clip.image.output_groups": "(4, 0)",
    "model.clip.text.width": 16, "model.clip.text.layers": 1, "evaluate.batch_size": 6,
    "evaluate.segmentation.batch_size": 6, "loss.thresholds": "(0.95, 0.9)",
    "loss.changes": "(0.5,)", "model.initial_from": "''", "model.initial_params": "()",
}  # fmt: skip


def test_one_run_from_the_command_line(tmp_path):
    path = tmp_path / "out" / "claims.json"
    command = [
        sys.executable, "benchmarks/claims_simcon.py", "--seeds=1", "--data=",
        f"--runs={tmp_path}/runs", f"--results={path}", "--only=recipe=tau fixed, include",
        *(f"--set=config.{field}={value}" for field, value in TINY.items()),
    ]  # fmt: skip
    # One device, and programs that are quick to compile.
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, capture_output=True)
    (record,) = workdirs.read_json(path)["records"].values()
    values, curve = record["values"], record["values"]["curve"]
    assert record["name"] == "SimCon" and record["conditions"][0]["batch"] == 8
    assert curve["step"] == [1, 2, 3] and values["steps"] == 3
    # The frozen temperature is the one that CLIP starts with.
    assert curve["logit_scale"] == [14.2857] * 3
    # Beside its similarity with itself, an anchor's own pair hardly counts.
    assert values["positives_text"] >= 1 and 0 < values["own_weight"] < 0.01
    for name in ("mIoU", "Rsum", "i2t_R@1", "t2i_R@10"):
        assert curve[name][-1] == pytest.approx(values[name], rel=1e-5)
        assert max(curve[name]) == pytest.approx(values[f"{name}_best"], rel=1e-5)
    text = path.with_suffix(".md").read_text()
    assert "**Partial**" in text and "| tau fixed, include |" in text
    # Started again, the command would find it.
    fields = {k: ast.literal_eval(v) if isinstance(v, str) else v for k, v in TINY.items()}
    planned = plan.tasks(seeds=1, overrides=fields)
    (task,) = [t for t in planned if t.conditions[0].get("recipe") == "tau fixed, include"]
    assert harness.record_of(task, tmp_path / "runs")["values"] == values

"""The plan and the pages of the TRM-ML claims."""

import itertools

import pytest

from benchmarks import claims_trm_ml_plan as plan
from benchmarks import claims_trm_ml_report as report
from benchmarks import harness, measures
from trm_jax.types import UserError

RANDOM = {"model.pretrained": "random"}


@pytest.fixture(scope="module")
def tasks():
    return plan.tasks(seeds=2, cache_dir="features", data="data", lit="random", overrides=RANDOM)


def test_the_plan_starts_with_the_claim_and_finishes_a_seed_before_the_next(tasks):
    first = [(t.name, t.conditions[0].get("recipe")) for t in tasks[:4]]
    assert first == [
        ("TRM-ML", None),
        ("DualCoOp", "own"),
        ("DualCoOp", "ours"),
        ("baseline", None),
    ]
    main = [t for t in tasks if t.seed is not None and not t.name.startswith("memory")]
    order = [(t.conditions[0]["known"], t.seed) for t in main]
    assert order == sorted(order)


def test_the_plan_has_every_run_once(tasks):
    assert len({task.folder for task in tasks}) == len(tasks)
    for source in plan.KNOWN:
        of_source = [t for t in tasks if t.conditions[0]["source"] == source]
        assert len(of_source) == plan.count_runs(source, 2)


def test_rows_switch_off_what_the_paper_leaves_out(tasks):
    expected = {  # CARL, KD, MMCL, MMCP
        "baseline": (False, True, True, "both"),  # without regions the others are off
        "+CARL": (True, False, False, "none"),
        "+KD": (True, True, False, "none"),
        "+MMCP": (True, False, False, "both"),
        "+MMCL": (True, False, True, "none"),
        "TRM-ML": (True, True, True, "both"),
        "memory: text": (True, True, False, "text"),
        "memory: visual": (True, True, False, "visual"),
        "memory: both": (True, True, False, "both"),
    }
    seen = set()
    for task in tasks:
        if task.name in expected:
            config = task.config
            assert expected[task.name] == (
                config.model.options.region_attention,
                config.loss.distillation_weight > 0,
                config.loss.contrastive_weight > 0,
                config.memory.pseudo_labels,
            )
            seen.add(task.name)
    assert seen == set(expected)


def test_a_seed_draws_run_and_mask_and_full_labels_are_full(tasks):
    for task in (t for t in tasks if t.measure is measures.training):
        condition, data = task.conditions[0], task.config.data
        assert task.config.seed == data.label_seed == task.seed
        assert data.known_fraction == condition["known"]
        assert data.label_protocol == ("full" if condition["known"] == 1.0 else "hash")
        assert data.holdout == 0.0


def test_dualcoop_in_our_recipe_has_trm_mls_optimizer(tasks):
    for source in plan.KNOWN:
        ours, own, full = (
            next(
                t.config
                for t in tasks
                if t.name == name
                and t.conditions[0]["source"] == source
                and t.conditions[0].get("recipe") == recipe
            )
            for name, recipe in (("DualCoOp", "ours"), ("DualCoOp", "own"), ("TRM-ML", None))
        )
        for field in ("name", "learning_rate", "schedule", "warmup_epochs"):
            assert ours.optimizer[field] == full.optimizer[field]
        assert ours.data.batch_size == full.data.batch_size
        assert ours.train.epochs == full.train.epochs
        assert own.optimizer.name == "sgd" and own.loss.weight == 0.03


def test_validation_holds_out_training_images_and_a_mistyped_field_is_named():
    chosen = plan.tasks(seeds=1, cache_dir="f", overrides=RANDOM, validation=True)
    assert all(task.config.data.holdout == 0.2 for task in chosen)
    with pytest.raises(UserError, match="config.loss.beta"):
        plan.tasks(seeds=1, cache_dir="f", overrides={**RANDOM, "loss.beta": 1.0})


def _records(tasks):
    """TRM-ML is 2.0 above every other row, on every mask; a mask is worth its seed."""
    records = {}
    for task in tasks:
        value = 50.0 + 20.0 * task.conditions[0]["known"] + (task.seed or 0)
        value += 2.0 if task.name == "TRM-ML" else 0.0
        records[task.folder] = {
            "values": {"mAP": value, "mAP_best": value + 1.0, "seconds": 10.0},
            "device": "cpu",
            "cores": 2,
        }
    return records


def test_averages_and_paired_differences(tasks):
    file = report.results(tasks, _records(tasks), seeds=2, before={})
    (average,) = [
        row
        for row in file["rows"]
        if row["name"] == "TRM-ML"
        and row["metric"] == report.AVERAGE
        and row["condition"] == {"source": "glyphs"}
    ]
    assert average["mean"] == 58.5 and average["paper"] == 85.4  # 50 + 20 * 0.3 + 0.5 + 2
    gain = report.differences(file)["rows"]
    trained = [row for row in gain if row["name"] in plan.ABLATION]
    assert trained and all(row["mean"] == 2.0 and row["std"] == 0.0 for row in trained)


def test_partial_results_keep_the_rows_of_a_source_that_is_not_planned(tasks):
    whole = report.results(tasks, _records(tasks), seeds=2, before={})
    assert "partial" not in whole and not any(whole["unfinished_runs"].values())
    glyphs = plan.tasks(seeds=2, cache_dir="features", overrides=RANDOM)
    part = dict(itertools.islice(_records(glyphs).items(), 3))
    file = report.results(glyphs, part, seeds=2, before=whole)
    assert file["partial"] and file["unfinished_runs"]["glyphs"] == len(glyphs) - 3
    kept = [row for row in whole["rows"] if row["condition"]["source"] == "coco_features"]
    assert [r for r in file["rows"] if r["condition"]["source"] == "coco_features"] == kept
    records = whole["records"]
    assert file["records"] == part | {k: v for k, v in records.items() if k.startswith("coco")}
    assert set(records) == {task.folder for task in tasks}


def test_pages_are_written_from_the_file_alone(tasks, tmp_path):
    path = tmp_path / "claims.json"
    body = report.results(tasks, _records(tasks), seeds=2, before={})
    harness.write_results(path, body)
    report.write_pages(harness.workdirs.read_json(path), path)
    text = path.with_suffix(".md").read_text()
    assert "| TRM-ML | **54.5 ± 0.7** | **58.5 ± 0.7** | **62.5 ± 0.7** |" in text
    assert "**58.5 ± 0.7** (85.4) |" in text
    assert "baseline 77.7 < +CARL 84.1 < +KD 84.4 < +MMCP 84.7 < +MMCL 85.0 < TRM-ML 85.4" in text
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert (tmp_path / "claims_coco_features.png").exists()

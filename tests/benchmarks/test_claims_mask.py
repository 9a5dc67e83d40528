"""The MASK claims: the plan, one tiny run matched in every way, re-ranking, results and pages."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import claims_mask_measure as measure
from benchmarks import claims_mask_paper as paper
from benchmarks import claims_mask_plan as plan
from benchmarks import claims_mask_report as report
from benchmarks import harness
from tests import knowledge_data, tiny
from tests.benchmarks.results_checks import row_of
from trm_jax.data.caption_words import CaptionWords
from trm_jax.evaluate import retrieval
from trm_jax.train import finetune, workdirs
from trm_jax.types import UserError

ROOT = Path(__file__).parents[2]


PHOTOS = {"flickr8k": plan.SOURCES["flickr8k"]}


def _tasks(seeds=3, sources=PHOTOS, **more):
    given = {"data": Path("data"), "cache_dir": Path("runs/vectors"), **more}
    return plan.tasks(sources=sources, seeds=seeds, **given)


@pytest.fixture(scope="module")
def tasks():
    return _tasks()


def test_the_plan_has_every_run_once_in_the_order_of_their_worth(tasks):
    losses = ["MASK", "w/o L_cm", "w/o L_cl"]
    order = [(task.name, task.seed) for task in tasks]
    assert order[:4] == [("MASK", 0), ("MACK", None), ("w/o L_cm", 0), ("w/o L_cl", 0)]
    assert order[4:10] == [(name, seed) for seed in (1, 2) for name in losses]
    swept = [
        (task.config.loss.cross_modal_weight, task.config.loss.contrastive_weight)
        for task in tasks[10:14]
    ]
    assert swept == [(1.0, 3.0), (5.0, 3.0), (3.0, 1.0), (3.0, 5.0)]
    depths = [task.config.model.knowledge for task in tasks[14:]]
    assert [
        [d[name].attention_layers for name in ("encoder", "reconstructor", "mapper")]
        for d in depths
    ] == [[5, 1, 3], [3, 5, 3], [3, 1, 5]]
    assert len({task.folder for task in tasks}) == len(tasks) == 17
    assert len(_tasks(2, sweep_seeds=5)) == 1 + 2 * (3 + 4 + 3)


def test_each_run_is_its_row(tasks):
    for task in tasks:
        config, condition = task.config, task.conditions[0]
        if task.name == "MACK":
            assert (config.words.unknown, task.measure) == ("drop", measure.raw)
            assert condition == {"source": "flickr8k"}
            continue
        weights = (config.loss.cross_modal_weight, config.loss.contrastive_weight)
        if "recipe" not in condition:
            assert weights == {"MASK": (3, 3), "w/o L_cm": (0, 3), "w/o L_cl": (3, 0)}[task.name]
        assert task.measure is measure.training and config.words.unknown == "interpolate"
        assert config.data.root == "data/coco_regions/train2017.npz"
        assert config.matching.evaluated.split == "test"
        keys = [key for key, _ in config.matching.variants]
        if task.name != "MASK":
            assert keys == ["drop", "nouns"]
        else:
            assert bool(keys) == (len(task.conditions) > 1)


def test_the_first_row_stands_in_every_recipe(tasks):
    own = {"source": "flickr8k", "width": 256, "epochs": 80}
    assert tasks[0].conditions[0] == own
    places = [{k: v for k, v in c.items() if k not in own} for c in tasks[0].conditions[1:]]
    assert places == [
        {"recipe": "m", "m": "10"},
        {"recipe": "unknown", "unknown": "interpolate"},
        {"recipe": "caption_words", "caption_words": "all"},
        {"recipe": "fine-tuning", "fine-tuning": 0},
        {"recipe": "lambda1", "lambda1": 3.0},
        {"recipe": "lambda2", "lambda2": 3.0},
        {"recipe": "depth", "depth": "as in Table 8"},
    ]
    # What a row has of its own is no variant of it.
    keys = [key for key, _ in tasks[0].config.matching.variants]
    assert keys == [
        "drop", "random", "global_mean", "bidirectional", "procrustes", "m=1", "m=K/8", "m=K/2",
        "m=K", "nouns_adjectives", "nouns", "nouns, drop", "fine-tuned 50", "fine-tuned 200",
        "fine-tuned 800", "fine-tuned prototypes",
    ]  # fmt: skip
    moved = _tasks(1, overrides={"words.caption_words": "nouns", "loss.contrastive_weight": 5.0})
    keys = {key for key, _ in moved[0].config.matching.variants}
    assert "all" in keys and "nouns" not in keys
    swept = [task.config.loss.contrastive_weight for task in moved if "lambda2" in task.folder]
    assert swept == [1.0, 3.0]


def test_the_folder_follows_what_a_run_reads(tasks):
    folders = {task.folder for task in tasks}

    def changed(**more):
        return {task.name for task in _tasks(**more) if task.folder not in folders}

    assert not changed(data=Path("elsewhere"), tagger="tagger.zip", cache_dir=Path("x"))
    trained = {"MASK", "w/o L_cm", "w/o L_cl"}
    assert changed(overrides={"optimizer.learning_rate": 2e-3}) == trained
    assert changed(overrides={"matching.fine_tuning.batch_images": 8}) == trained | {"MACK"}
    assert changed(overrides={"words.neighbours": 5}) == trained | {"MACK"}
    assert changed(validation=True) == trained | {"MACK"}
    assert changed(variants=False) == trained | {"MACK"}
    with pytest.raises(UserError, match="config.loss.beta"):
        _tasks(1, overrides={"loss.beta": 1.0})


def test_validation_is_on_other_images():
    split = {task.config.matching.evaluated.split for task in _tasks(1, validation=True)}
    assert split == {"dev"}
    scenes = {"glyphs": plan.SOURCES["glyphs"]}
    for held, seed in ((False, None), (True, 1)):
        for task in _tasks(1, scenes, validation=held):
            assert dict(task.config.matching.evaluated.switches).get("data.options.seed") == seed
            assert dict(task.config.matching.domain.switches)["data.options.seed"] == 2
            assert task.config.data.options.seed == 0


def test_sources_come_side_by_side():
    both = _tasks(2, plan.SOURCES)
    names = [(task.conditions[0]["source"], task.name, task.seed) for task in both[:9]]
    assert names[3:5] == [("flickr8k", "w/o L_cl", 0), ("glyphs", "MASK", 0)]
    assert names[8] == ("flickr8k", "MASK", 1)
    assert len({task.folder for task in both}) == len(both) == 2 * (1 + 6 + 7)
    # Procrustes needs prototypes at least as wide as word vectors.
    assert all(task.config.model.knowledge.width >= 64 for task in both)


def test_chance_by_hand():
    found = measure.chance([2, 1, 3])
    assert found["t2i_R@1"] == pytest.approx(100 / 3) and found["t2i_R@5"] == 100
    # Of six texts 2, 1 and 3 are right ones; among any five, one is missing.
    assert found["i2t_R@1"] == pytest.approx(100 * (2 + 1 + 3) / 18)
    assert found["i2t_R@5"] == pytest.approx(100 * (1 + 5 / 6 + 1) / 3)
    assert found["i2t_R@10"] == 100
    recalls = [value for name, value in found.items() if name != "Rsum"]
    assert found["Rsum"] == pytest.approx(sum(recalls)) and len(recalls) == 6
    assert measure.chance([5] * 1000)["Rsum"] == pytest.approx(3.2, abs=0.02)


def test_coverage_by_hand():
    captions = CaptionWords(
        indptr=np.array([0, 3, 3, 4], np.int64),
        indices=np.array([0, 1, 0, 1], np.int32),
        words=("dog", "hound"),
        known=np.array([True, False]),
        dropped={"the": 4, "a": 2},
    )
    assert measure.coverage(captions) == {
        "uncovered": pytest.approx(100 / 3), "known_words": pytest.approx(2 / 3),
        "other_words": pytest.approx(2 / 3), "dropped_words": 2.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(tasks on the files of tests/knowledge_data.py, their folder)."""
    root = tmp_path_factory.mktemp("claims")
    files = knowledge_data.write(root)

    def make(_):
        config = tiny.mask(*files)
        config.train.steps = 20  # four epochs of forty rows
        config.optimizer.learning_rate = 1e-2
        return config

    part = plan.Part()
    source = plan.Source("small", make, (), test=part, validation=part, domain=part)
    return _tasks(1, {"small": source}, cache_dir=root / "vectors", data=root), root


def _measured(task, folder):
    folder.mkdir(exist_ok=True)
    return task.measure(task.config, folder)


@pytest.fixture(scope="module")
def mask(small):
    """(values of MASK's run, with a rotation in place of fine-tuning; fine-tuning's arguments)."""
    tasks, root = small
    asked = []
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0].astype(np.float32)

    def fit(images, prototypes, captions, **settings):
        asked.append((images, prototypes, captions, settings))
        return finetune.FineTuning(rotation, *(np.zeros(1),) * 3)

    task = tasks[0]
    # The tagger of nouns needs data.
    kept = [pair for pair in task.config.matching.variants if "nouns" not in pair[0]]
    task.config.matching.variants = tuple(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.finetune, "fit", fit)
        return _measured(task, root / "mask"), asked


def _quality(values):
    return [values[name] for name in measure.QUALITY]


def test_one_run_is_matched_in_every_way(mask):
    values, _ = mask
    variants = values["variants"]
    # The evaluator of the training loop says the same.
    assert values["curve"]["Rsum"][-1] == pytest.approx(values["Rsum"], rel=1e-5)
    assert values["curve"]["step"] == [4, 8, 12, 16, 20] and values["steps"] == 20
    assert values["Rsum_best"] == max(values["curve"]["Rsum"])
    assert set(measure.WATCHED) <= values.keys()
    assert values["Rsum"] > 1.5 * measure.chance([2] * 24)["Rsum"]
    assert values["Rsum"] == pytest.approx(sum(_quality(values)[:-1]))
    # Four or five of eight words have synonyms in captions; "and" has a vector, "the" has none.
    assert variants["drop"]["other_words"] == 0 < values["other_words"]
    assert variants["drop"]["known_words"] == values["known_words"]
    assert variants["drop"]["dropped_words"] > values["dropped_words"] == 1.5
    # Eight words have vectors.
    used = {key: found.get("neighbours") for key, found in variants.items()}
    assert values["neighbours"] == 8 and used["m=1"] == 1 and used["drop"] is None
    assert (used["m=K/8"], used["m=K/2"], used["m=K"]) == (1, 4, 8)
    assert variants["procrustes"]["procrustes_rank"] == 6
    # One neighbour is one neighbour; all of ten are all of eight.
    assert _quality(variants["m=K/8"]) == _quality(variants["m=1"])
    assert _quality(variants["m=K"]) == _quality(values)
    different = {key: _quality(found) for key, found in variants.items()}
    for key in ("drop", "random", "global_mean", "bidirectional", "procrustes"):
        assert different[key] != _quality(values), key


def test_fine_tuning_sees_no_pair_and_moves_both_sides(mask):
    values, asked = mask
    assert [settings["steps"] for *_, settings in asked] == list(plan.FINE_TUNING)
    images, prototypes, captions, settings = asked[0]
    assert settings == {
        "steps": 50, "seed": 0, "batch_images": 32, "batch_texts": 128, "learning_rate": 1e-4,
    }  # fmt: skip
    # Every second image of 24 with its four regions, the two captions of each other one.
    assert np.diff(images.indptr).tolist() == [4] * 12 and len(captions.indptr) - 1 == 24
    assert prototypes.shape == (len(captions.words), 16)
    variants = values["variants"]
    # A rotation of both sides changes nothing, that of one side does.
    for steps in plan.FINE_TUNING:
        found = _quality(variants[f"fine-tuned {steps}"])
        np.testing.assert_allclose(found, _quality(values), atol=100 / 48 + 1e-6)
    assert _quality(variants["fine-tuned prototypes"]) != _quality(values)


def test_scores_are_left_and_rerank_others(mask, small):
    values, file = mask[0], small[1] / "mask" / plan.SCORES
    with np.load(file) as arrays:
        scores, owner = arrays["scores"], arrays["image_of_text"]
    assert retrieval.recalls(scores, owner)["Rsum"] == pytest.approx(values["Rsum"])
    # z-scores of one's own scores change no order.
    own = measure.reranked(3 * scores + 1, file, plan.ALPHAS, top=10, name="own")
    assert list(own) == ["0", "0.1", "0.15", "0.2"]
    assert all(_quality(found) == _quality(values) for found in own.values())
    noise = np.random.default_rng(0).normal(size=scores.shape).astype(np.float32)
    found = measure.reranked(noise, file, (0.0, 0.2, 100.0), top=24, name="noise")
    assert _quality(found["0"]) == _quality(retrieval.recalls(noise, owner))
    # Of all candidates, and with all the weight: MASK's own order of images.
    assert found["100"]["t2i_R@1"] == pytest.approx(values["t2i_R@1"], abs=100 / 48 + 1e-6)
    with pytest.raises(UserError, match=r"noise scores are \[48, 24\]"):
        measure.reranked(noise.T, file, (0.1,), top=10, name="noise")


def _naive_mack(root):
    """Recalls of means of raw features by a loop over pairs, of words of the knowledge alone."""
    with np.load(root / "regions.npz") as file:
        features, words = file["features"].astype(np.float32), file["words"]
    means = {word: features[words == word].mean(axis=0) for word in knowledge_data.WORDS}
    images = np.load(root / "test_ims.npy")
    captions = (root / "test_caps.txt").read_text().splitlines()
    scores = np.zeros((len(images), len(captions)))
    for i, regions in enumerate(images):
        for j, caption in enumerate(captions):
            best = [
                max(r @ v / np.linalg.norm(r) / np.linalg.norm(v) for r in regions)
                for word, v in means.items()
                if re.search(rf"\b{word}\b", caption)
            ]
            scores[i, j] = np.mean(best) if best else 0.0
    return retrieval.recalls(scores, np.arange(len(captions)) // 2)


def test_mack_is_the_mean_of_raw_features(small):
    tasks, root = small
    values = _measured(tasks[1], root / "mack")
    expected = _naive_mack(root)
    assert {name: values[name] for name in measure.QUALITY} == pytest.approx(expected)
    variants = values["variants"]
    assert variants["chance"] == measure.chance([2] * 24)
    assert variants["interpolate"]["Rsum"] > values["Rsum"]  # synonyms are near their words
    for key in ("random", "global_mean", "bidirectional"):
        assert _quality(variants[key]) != _quality(values), key


def _records(tasks):
    """Rsum by row, and by variant 100 and its number; the recalls are a seventh of it."""
    rsum = {"MASK": 40, "w/o L_cm": 30, "w/o L_cl": 20, "MACK": 25}
    records = {}
    for task in tasks:

        def found(value):
            values = dict.fromkeys(measure.RECALLS, value / 7) | {"Rsum": float(value)}
            return values | dict.fromkeys(measure.COVERAGE, 0.5)

        own = rsum[task.name] + (task.seed or 0)
        values = found(own + (5 if "recipe" in task.conditions[0] else 0))
        keys = [key for key, _ in task.config.matching.variants]
        variants = {key: found(100.0 + number) for number, key in enumerate(keys)}
        if task.name == "MACK":
            variants["chance"] = found(4.0)
        else:
            values |= dict.fromkeys(measure.WATCHED, 0.25) | {"Rsum_best": own + 1.0, "steps": 200}
        values |= {"seconds": 60.0, "variants": variants}
        records[task.folder] = {
            "name": task.name, "seed": task.seed, "values": values, "device": "cpu", "cores": 2,
        }  # fmt: skip
    return records


def _results(tasks, records=None, reranked=None):
    return report.results(tasks, records or _records(tasks), reranked or {}, seeds=3, sweep_seeds=1)


def test_rows_of_runs_and_of_variants_with_the_papers_figures(tasks):
    file = _results(tasks)
    assert "partial" not in file and file["unfinished_runs"] == {"flickr8k": 0}
    assert file["seconds"] == 17 * 60.0
    row = row_of(file, "MASK", "Rsum")
    assert (row["mean"], row["std"], row["seeds"], row["paper"]) == (41.0, 1.0, 3, 122.8)
    row = row_of(file, "w/o OOD", "Rsum")
    assert (row["mean"], row["seeds"], row["paper"]) == (100.0, 3, 116.2)
    assert row == {**row_of(file, "w/o OOD", "Rsum", unknown="drop", recipe="unknown"),
                   "condition": row["condition"]}  # fmt: skip
    row = row_of(file, "MASK", "t2i_R@5", recipe="m", m="1")
    assert (row["mean"], row["paper"]) == (15.0, 13.9)
    row = row_of(file, "MASK", "Rsum", recipe="lambda2", lambda2=5.0)
    assert (row["mean"], row["seeds"], row["paper"]) == (45.0, 1, 103.4)
    row = row_of(file, "MASK", "Rsum", recipe="depth", depth="FRM, 2 FC + 5 attention")
    assert (row["mean"], row["paper"]) == (45.0, 130.7)
    row = row_of(file, "MACK, global mean", "Rsum")
    assert (row["mean"], row["std"], row["paper"], row["values"]) == (
        102.0, None, 41.7, {"None": 102.0},
    )  # fmt: skip
    assert row_of(file, "chance", "Rsum")["mean"] == 4.0
    assert row_of(file, "MASK", "uncovered")["paper"] is None


def test_leads_are_taken_seed_by_seed(tasks):
    gain = report.leads(_results(tasks))
    row = row_of(gain, "over w/o L_cl", "Rsum")
    assert row["values"] == {"0": 20.0, "1": 20.0, "2": 20.0}
    assert (row["std"], row["paper"]) == (0.0, 30.4)
    row = row_of(gain, "over MACK", "Rsum")  # which has no seed
    assert row["values"] == {"0": 15.0, "1": 16.0, "2": 17.0} and row["paper"] == 27.5


def test_the_papers_recalls_add_up_to_their_sums():
    printed = [*paper.ROWS.values(), *(p for rows in paper.RECIPES.values() for p in rows.values())]
    off = {p.recalls: round(sum(p.recalls) - p.flickr30k, 2) for p in printed}
    assert {recalls: by for recalls, by in off.items() if abs(by) > 0.051} == {}
    planned = {("depth", depth) for depth in (*plan.DEPTHS, plan.AS_TABLE_8)}
    planned |= {(recipe, value) for recipe, (_, values) in plan.WEIGHTS.items() for value in values}
    assert all(value in paper.RECIPES[recipe] for recipe, value in planned)


def test_pages_are_written_from_the_file_alone(tasks, tmp_path):
    path = tmp_path / "claims.json"
    about = {"name": "SCAN", "source": "flickr8k", "run": tasks[0].folder, "top": 100}
    reranked = {
        f"SCAN-{seed}": {**about, "seed": seed, "values": {
            f"{alpha:g}": dict.fromkeys(measure.QUALITY, 200 + 10 * alpha + seed)
            for alpha in plan.ALPHAS
        }}
        for seed in range(2)
    }  # fmt: skip
    harness.write_results(path, _results(tasks, reranked=reranked))
    report.write_pages(workdirs.read_json(path), path)
    text = path.with_suffix(".md").read_text()
    assert "## Knowledge of COCO's boxes, Flickr8k's captions" in text
    cells = "| 5.9 ± 0.1 (4.8) | 5.9 ± 0.1 (14.8) |"
    assert f"| MASK {cells}" in text and "| 41.0 ± 1.0 (122.8) |" in text
    assert "MASK's Rsum is 10.2 times that of chance, 25.0 times without OOD." in text
    assert "| over w/o L_cl | 2.9 ± 0.0 (2.2) | 2.9 ± 0.0 (3.0) | 20.0 ± 0.0 (30.4) |" in text
    assert re.search(r"\| 1 \|.* \*\*45.0\*\* \(112.7\) \|\n\| 3 \|.*\n\| 5 \|", text)
    assert re.search(r"\| m \|.*\n.*\n\| 1 \|.*\n\| 10 \|.*\n\| K/8 \|", text)
    number = [key for key, _ in tasks[0].config.matching.variants].index("m=K/2")
    assert re.search(rf"\| K/2 \|.* {100 + number}.0 ± 0.0 \|", text)
    assert "| 200, prototypes alone |" in text and "| PAE, 1 FC + 5 attention |" in text
    assert re.search(r"\| alpha 0.15 \|.* 202.0 ± 0.7 \|", text)
    assert f"| w/o OOD |{' 0.50 ± 0.00 |' * 4}" in text and "| MACK | 0.50 | 0.50 |" in text
    assert "| lambda1 = 5.0 | 100.9 | 156.5 |" in text and "| ALBEF | 506.9 | 428.3 |" in text
    (picture,) = (p.name for p in tmp_path.glob("*.png") if p.stat().st_size > 10_000)
    assert f"]({picture})" in text


def test_pages_are_written_whatever_is_still_missing(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(report.report, "chart", lambda *_, **__: None)
    path, records, done = tmp_path / "claims.json", _records(tasks), {}
    for folder in list(records)[::-2]:
        for part in ({folder: records[folder]}, done):
            done[folder] = records[folder]
            file = _results(tasks, part)
            harness.write_results(path, file)
            report.write_pages(workdirs.read_json(path), path)
            text = path.with_suffix(".md").read_text()
            left = sum(file["unfinished_runs"].values())
            assert left == len(tasks) - len(part) and ("**Partial**" in text) == (left > 0)


# Several commands in one process, which imports JAX once.
_COMMANDS = """
import json, sys
from benchmarks import claims_mask
from launch import cli
for words in json.loads(sys.argv[1]):
    cli.run(claims_mask.main, ["claims_mask.py", *words])
"""


def test_the_command_goes_on_from_records_and_reranks(tmp_path):
    for file in plan.SOURCES["flickr8k"].files:
        (tmp_path / file).mkdir(parents=True)
    tasks = _tasks(1, data=tmp_path, cache_dir=tmp_path)
    records = _records(tasks)
    run, kept = tasks[0].folder, tasks[1].folder
    (tmp_path / "runs" / run).mkdir(parents=True)
    workdirs.write_json(tmp_path / "runs" / run / "record.json", records[run])
    scores = np.random.default_rng(0).normal(size=(20, 40)).astype(np.float32)
    arrays = {"scores": scores, "image_of_text": np.arange(40) // 2}
    np.savez(tmp_path / "runs" / run / plan.SCORES, **arrays)
    np.save(tmp_path / "scan.npy", scores)
    path = tmp_path / "claims.json"
    workdirs.write_json(path, {"records": {kept: records[kept]}})
    same = ["--seeds=1", f"--results={path}", f"--data={tmp_path}"]
    photos = "--only=source=flickr8k"
    only, base = f"{photos},name=MASK|MACK,recipe=", f"--base=SCAN={tmp_path}/scan.npy"
    commands = [
        # Nothing is left of these two rows: what is known is written, and re-ranks ...
        [*same, f"--runs={tmp_path}/runs", only, base, "--top=10"],
        # ... which is known from then on, without the run.
        [*same, f"--runs={tmp_path}/none", only, base, "--top=10"],
        [*same, f"--runs={tmp_path}/none", photos, "--dry-run"],
        [*same, f"--base={tmp_path}/none.npy"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, json.dumps(commands)],
        cwd=ROOT, env={**os.environ, "TRM_DATA": ""}, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert said[0] == "0 runs to do", done.stderr
    assert said[1].startswith("SCAN re-ranked, seed 0: Rsum ") and said[2] == "0 runs to do"
    file = workdirs.read_json(path)
    assert set(file["records"]) == {run, kept} and len(file["reranked"]) == 1
    rsum = row_of(file, "SCAN", "Rsum", recipe="re-ranked", alpha=0.15)["mean"]
    owner = arrays["image_of_text"]
    assert rsum == pytest.approx(retrieval.recalls(scores, owner)["Rsum"], abs=1e-4)
    assert file["unfinished_runs"] == {"flickr8k": 9, "glyphs": 11}
    listed = [("done" if t.folder in (run, kept) else "todo", t.folder) for t in tasks]
    assert said[3:] == [" ".join(line) for line in listed]
    # A mistake is told in one line.
    (told,) = done.stderr.splitlines()
    assert done.returncode == 2 and "none.npy cannot be read as an array" in told

"""train, evaluate, predict, export on the tiny config; signals to a real process."""

import json
import os
import signal
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.launch.conftest import CONFIG, ROOT
from trm_jax.data.sources.glyphs import CLASS_NAMES, GlyphScenes
from trm_jax.data.tokenizers import from_config
from trm_jax.data.transforms import image_transform
from trm_jax.pretrained import registry
from trm_jax.train import experiment, workdirs
from trm_jax.train.loop import Run
from trm_jax.train.predictor import load

FLAGS = ("--config.train.steps=6", "--config.data.augment=tai")


def _report(workdir):
    return json.loads((workdir / "run.json").read_text())


def test_the_workdir_says_what_was_run(trained):
    final = tiny.lines(trained)[-1]
    assert final["final"] and final["step"] == 6 and 0 <= final["mAP"] <= final["mAP_best"] <= 100
    report = _report(trained)
    assert report["resumed_from"] == [] and report["skipped_samples"] == []
    data = report["dataset"]
    assert data["train"] == 32 and data["test"] == 16 and data["classes"] == 40
    known = data["labels_positive"] + data["labels_negative"]
    assert known + data["labels_unknown"] == 32 * 40
    assert known / (32 * 40) == pytest.approx(0.3, abs=0.05)
    assert len(report["label_mask_sha256"]) == len(report["frozen_sha256"]) == 64
    # d = 8, C = 40: decoder, projections, queries, prompts of two tokens of width 8, tau.
    decoder = 4 * 8 * 9 + (8 * 32 + 32 + 32 * 8 + 8) + 3 * 16 + 40 * 8
    projections = (8 * 32 + 32 + 32 * 8 + 8) + 2 * (8 * 8 + 8)
    assert report["parameters"]["trained"] == decoder + projections + 2 * 40 * 2 * 8 + 1
    config = json.loads((trained / "config.json").read_text())
    assert config["train"]["steps"] == 6 and config["data"]["augment"] == "tai"
    assert any((trained / "tensorboard").iterdir())
    pictures = sorted((trained / "pictures").iterdir())
    assert [path.suffix for path in pictures] == [".png", ".png"]
    height, width, _ = cv2.imread(str(pictures[0])).shape
    assert width > 3 * height > 300  # the image and its five best classes in a row


def test_a_finished_run_says_so(launch, trained):
    before = (trained / "metrics.jsonl").read_text()
    result = launch("train", f"--config={CONFIG}", f"--workdir={trained}", *FLAGS)
    assert result.code == 0 and "is finished at step 6; nothing to do" in result.out
    assert (trained / "metrics.jsonl").read_text() == before


def test_fields_that_change_nothing_may_differ(launch, trained):
    result = launch(
        "train",
        f"--config={CONFIG}",
        f"--workdir={trained}",
        *FLAGS,
        "--config.data.workers=3",
        "--config.train.log_every=7",
        "--config.train.keep=9",
        "--config.mesh.data=1",
    )
    assert result.code == 0 and "is finished" in result.out


def test_another_configs_workdir_is_refused_by_field(launch, trained):
    result = launch(
        "train",
        f"--config={CONFIG}",
        f"--workdir={trained}",
        *FLAGS,
        "--config.seed=1",
        "--config.memory.slots=5",
    )
    line = result.refusal()
    assert "memory.slots (4 there, 5 now)" in line and "seed (0 there, 1 now)" in line


def test_evaluate_repeats_the_final_metrics(launch, trained):
    result = launch("evaluate", f"--config={CONFIG}", f"--workdir={trained}", *FLAGS)
    assert result.code == 0 and "mAP " in result.out
    written = json.loads((trained / "eval.json").read_text())
    final = tiny.lines(trained)[-1]
    assert written["step"] == 6 and written["final"] is True
    for name, value in written.items():
        assert final[name] == pytest.approx(value), name


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """(folder with a jpg, a png and a corrupt jpg, {stem: RGB pixels})."""
    folder = tmp_path_factory.mktemp("photos")
    scenes, pixels = GlyphScenes(seed=5, size=3, image_size=48), {}
    for number, name in enumerate(("one.jpg", "two.png")):
        image = np.ascontiguousarray(scenes.read(number)["image"][..., ::-1])
        cv2.imwrite(str(folder / name), image)
        pixels[name] = cv2.imread(str(folder / name))[..., ::-1]
    (folder / "broken.jpg").write_bytes((folder / "one.jpg").read_bytes()[:300])
    return folder, pixels


def test_predict_then_export_agree_with_each_other(launch, trained, photos, tmp_path):
    folder, pixels = photos
    result = launch("predict", f"--workdir={trained}", f"--images={folder}", f"--out={tmp_path}")
    assert result.code == 0 and "skipped" in result.out and "broken.jpg" in result.out
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [os.path.basename(row["image"]) for row in rows] == ["one.jpg", "two.png"]
    assert all(tuple(row["scores"]) == CLASS_NAMES for row in rows)
    for stem in ("one", "two"):
        assert cv2.imread(str(tmp_path / f"{stem}.png")).std() > 1

    out = tmp_path / "exported"
    assert launch("export", f"--workdir={trained}", f"--out={out}").code == 0
    exported = jax.export.deserialize((out / "predict.stablehlo").read_bytes())
    transform = image_transform("none", 32)
    batch = np.stack([transform(pixels[n], np.random.default_rng(0)) for n in sorted(pixels)])
    scores = np.asarray(exported.call({"image": batch})["scores"])
    wanted = [list(row["scores"].values()) for row in rows]
    np.testing.assert_allclose(scores, wanted, atol=1e-5)
    _check_exported_files(out, trained)


def _check_exported_files(out, trained):
    model = load(trained)
    saved = load_file(out / "model.safetensors")
    np.testing.assert_array_equal(
        saved["prompts/positive"], np.asarray(model.params["prompts"]["positive"])
    )
    assert "extras/text_prototypes" in saved
    clip = registry.load(out / "clip.safetensors", model.clip)
    for x, y in zip(jax.tree.leaves(clip), jax.tree.leaves(model.params["clip"]), strict=True):
        np.testing.assert_array_equal(x, y)
    tokenizer = from_config(registry.tokenizer_config(out / "clip.safetensors"))
    assert tokenizer.encode("a photo of a sun") == model.tokenizer.encode("a photo of a sun")
    provenance = registry.read_metadata(out / "clip.safetensors")["provenance"]
    assert provenance["metrics"]["final"] is True and provenance["step"] == 6
    assert (out / "config.json").read_text() == (trained / "config.json").read_text()
    assert "trm_ml on glyphs" in (out / "README.md").read_text()


def test_two_towers_rank_the_images_for_a_query(launch, photos, tmp_path):
    config = tiny.contrastive()
    workdir = tmp_path / "run"
    built = experiment.build(config, cache_dir=workdir)
    run = Run(built.job, workdir, tiny.mesh())
    run.files.save(run.prepare())
    run.files.close()
    workdirs.claim(workdir, config, built)
    words = (f"--workdir={workdir}", f"--images={photos[0]}", f"--out={tmp_path / 'out'}")
    assert "give --query" in launch("predict", *words).refusal()
    result = launch("predict", *words, "--query=a red sun", "--query=a cat")
    assert result.code == 0, result
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    ]
    assert [row["query"] for row in rows] == ["a red sun", "a cat"]
    for row in rows:
        scores = [hit["score"] for hit in row["results"]]
        assert len(scores) == 2 and scores == sorted(scores, reverse=True)
        assert all(-1.00001 <= score <= 1.00001 for score in scores)
    assert (tmp_path / "out" / "query_1.png").exists()


def _start(*words):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "launch/train.py", *words],
        cwd=ROOT,
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_real_process_stops_on_sigterm_with_75_and_goes_on(tmp_path):
    words = (
        f"--config={CONFIG}:cached",
        f"--workdir={tmp_path}",
        "--config.train.steps=600",
        "--config.train.eval_every=600",
        "--config.train.checkpoint_every=600",
    )
    process = _start(*words)
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    stopped = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert f"stopped at step {stopped}; checkpoint saved" in err and "Traceback" not in err
    assert 5 <= stopped < 600
    out, err = _start(*words).communicate(timeout=240)
    assert f"resuming from step {stopped} of 600" in out, err
    assert _report(tmp_path)["resumed_from"] == [stopped]
    train = [line["step"] for line in tiny.lines(tmp_path) if line["split"] == "train"]
    assert train == list(range(5, 601, 5)) and tiny.lines(tmp_path)[-1]["final"]


def test_help_of_a_real_process_exits_with_0():
    done = subprocess.run(
        [sys.executable, "launch/train.py", "--help"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and "--workdir" in done.stdout and "configs/demo.py" in done.stdout
    assert "Traceback" not in done.stderr

"""launch/prepare.py: what it prints, refuses, and leaves when it is stopped or killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from tests import tiny
from tests.data.sources.layouts import make_coco, make_voc
from tests.launch.conftest import ROOT
from trm_jax.data.sources import open_source


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path / "COCO")


def _words(source, out, dataset="coco"):
    return f"--dataset={dataset}", f"--source={source}", f"--out={out}"


def test_prepare_then_read(launch, coco, tmp_path):
    result = launch("prepare", *_words(coco, tmp_path / "out"))
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[:4] == [
        "reading train: 0 of 7",
        "reading test: 0 of 4",
        "checking train: 0 of 7",
        "checking test: 0 of 4",
    ]
    metadata = json.loads((tmp_path / "out/prepared.json").read_text())
    assert lines[4] == (
        "train: 7 images (the whole split has 118,287), 6 with a label, 6 positives, 4 captions, "
        f"sha256 {metadata['splits']['train']['sha256']}"
    )
    assert lines[6] == (
        f"{tmp_path}/out is ready: --config.data.dataset=coco --config.data.options.year=2017 "
        f"--config.data.root={tmp_path}/out"
    )
    again = launch("prepare", *_words(coco, tmp_path / "out"))
    assert again.code == 0 and "out holds this already; nothing to do" in again.out
    assert again.out.splitlines()[:2] == lines[4:6]
    assert len(open_source("coco", "train", root=str(tmp_path / "out"))) == 6


def test_prepare_options(launch, tmp_path):
    source = make_voc(tmp_path / "VOC")
    broken = source / "VOCdevkit/VOC2007/JPEGImages/000001.jpg"
    broken.write_bytes(b"<html>")
    words = _words(source, tmp_path / "out", "voc")
    line = launch("prepare", *words).refusal()
    assert "1 of 3 test images cannot be decoded: 000001.jpg: not a readable" in line
    result = launch("prepare", *words, "--year=2007", "--split=test", "--skip_bad")
    assert (
        result.code == 0 and "test: 2 images (the whole split has 4,952), 1 skipped" in result.out
    )
    assert "train" not in result.out and "data.options.year=2007" in result.out


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--dataset=coco", "--out=x"], "--source is missing"),
        (["--source=x", "--out=x"], "--dataset is missing"),
        (["--dataset=imagenet", "--source=x", "--out=x"], "--dataset=imagenet: value should be"),
        (["--dataset=coco", "--source=x", "--out=x", "stray"], "'stray' is no flag"),
        (["--dataset=coco", "--source=x", "--out=x", "--split=val"], "--split=val: it is train"),
        (["--dataset=coco", "--source=x", "--out=x", "--split="], "--split=: it is train"),
        (["--dataset=coco", "--source=nowhere", "--out=x"], "--source 'nowhere' is not a folder"),
        (["--dataset=voc", "--source=nowhere", "--out=x"], "--source 'nowhere' is not a folder"),
        (
            ["--dataset=voc", "--source=COCO", "--out=x"],
            "does not look like voc; is --dataset=coco meant?",
        ),
        (["--dataset=coco", "--source=COCO", "--out=x", "--year=2014"], "train2014.json does not"),
        (["--dataset=voc", "--source=COCO", "--out=x", "--year=2013"], "--year is '2013'"),
        (["--dataset=coco", "--source=COCO", "--out=COCO"], "COCO is not an empty folder"),
        (["--dataset=coco", "--source=COCO", "--out=COCO/file/x"], "--out: "),
    ],
)
def test_prepare_refuses(launch, coco, tmp_path, words, wanted):
    (coco / "file").write_text("x")
    paths = ("--source=COCO", "--out=x", "--out=COCO", "--out=COCO/file/x")
    words = [word.replace("=", f"={tmp_path}/", 1) if word in paths else word for word in words]
    line = launch("prepare", *words).refusal()
    assert wanted in line and "data.root" not in line and "data.options" not in line
    assert sorted(os.listdir(tmp_path)) == ["COCO"]


def test_incomplete_sources_are_refused(launch, coco, tmp_path):
    for number in (100, 101, 102):
        (coco / f"train2017/{number:012d}.jpg").unlink()
    line = launch("prepare", *_words(coco, tmp_path / "out")).refusal()
    assert "train2017 lacks 3 of the 7 train images: 000000000100.jpg, " in line
    shutil.rmtree(coco / "val2017")
    line = launch("prepare", *_words(coco, tmp_path / "out")).refusal()
    assert "val2017 does not exist; expected annotations/instances_val2017.json" in line
    assert os.listdir(tmp_path) == ["COCO"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A COCO folder that takes a while: 1,501 names of one large image."""
    root = make_coco(tmp_path_factory.mktemp("large") / "COCO", num_train=1501)
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    first, *others = sorted((root / "train2017").iterdir())
    cv2.imwrite(str(first), noise)
    for path in others:
        path.unlink()
        path.hardlink_to(first)
    return root


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_preparation_starts_anew(large, tmp_path, number):
    out, workspace = tmp_path / "out", tmp_path / ".out.incomplete"
    command = [sys.executable, "launch/prepare.py", *_words(large, out)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(workspace.rglob("*.array_record*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert not out.exists() and "ready" not in printed
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL and workspace.is_dir()
    else:
        assert process.returncode == 75 and not workspace.exists()
        assert errors == "stopped by a signal: nothing was prepared; run the command again\n"
    if number == signal.SIGKILL:
        again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert again.returncode == 0 and again.stderr == "" and "is ready" in again.stdout
        assert os.listdir(tmp_path) == ["out"]
        assert len(open_source("coco", "train", root=str(out))) == 1500


_TINY = """
from tests import tiny

def get_config(arg=""):
    config = tiny.trm_ml(cached=False)
    config.model.tokenizer = "clip"
    config.data.update({"dataset": "coco", "train_size": 0, "test_size": 0, "batch_size": 4})
    config.train.update({"steps": 3, "log_every": 1})
    return config
"""


def test_training_on_prepared_images_gives_the_same_numbers(launch, coco, tmp_path):
    assert launch("prepare", *_words(coco, tmp_path / "out")).code == 0
    (tmp_path / "tiny_coco.py").write_text(_TINY)
    runs = []
    for root in (coco, tmp_path / "out"):
        workdir = tmp_path / f"run_{root.name}"
        words = f"--config={tmp_path}/tiny_coco.py", f"--workdir={workdir}"
        result = launch("train", *words, f"--config.data.root={root}")
        assert result.code == 0, result.err
        report = json.loads((workdir / "run.json").read_text())
        assert report["dataset"]["train"] == 6 and report["skipped_samples"] == []
        runs.append((tiny.lines(workdir), report["label_mask_sha256"]))
    assert runs[0] == runs[1] and len(runs[0][0]) > 3

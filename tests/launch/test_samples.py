"""launch/samples.py after runs, and launch/prepare.py making pairs."""

import json
import os

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import tiny
from tests.data.sources.shards import make_shards, members, write_tar
from trm_jax.data import pipeline
from trm_jax.data.examples import CaptionExamples
from trm_jax.data.sources import open_source
from trm_jax.data.tokenizers import WordTokenizer
from trm_jax.train import workdirs


def test_samples_of_a_run_with_labels(launch, trained, tmp_path):
    result = launch("samples", f"--workdir={trained}", f"--out={tmp_path}/used.tsv")
    assert result.code == 0, result.err
    lines = [line.split("\t") for line in (tmp_path / "used.tsv").read_text().splitlines()]
    # 6 steps of 8 among 32: 4 steps are an epoch, so each once and 16 of them twice.
    assert sorted(int(count) for _, count in lines) == [1] * 16 + [2] * 16
    assert len({name for name, _ in lines}) == 32
    line = "32 samples were used by step 6, 0 could not be read"
    assert result.out == f"{line}: {tmp_path}/used.tsv\n"


@pytest.fixture
def run(tmp_path):
    """What a run on tar shards leaves at step 3, without the training."""
    content = members(range(9))
    content[4 * 3] = (content[12][0], b"")
    write_tar(tmp_path / "web/a.tar", content)
    make_shards(tmp_path / "web/test", (2,))
    config = tiny.contrastive()
    config.data.update({"dataset": "webdataset", "root": f"{tmp_path}/web", "batch_size": 2})
    config.data.update({"train_size": 0, "test_size": 0})
    folder = tmp_path / "run"
    folder.mkdir()
    workdirs.write_json(folder / "config.json", workdirs._plain(config))
    report = {"dataset": {"train": 9}, "label_mask_sha256": None, "skipped_samples": ["a/00004"]}
    workdirs.write_json(folder / "run.json", report)
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        manager.save(3, args=ocp.args.StandardSave({"step": np.asarray(3)}))
        manager.wait_until_finished()
    return folder


def test_samples_of_a_run_on_captions(launch, run, tmp_path):
    result = launch("samples", f"--workdir={run}", f"--out={tmp_path}/used.tsv")
    assert result.code == 0, result.err
    source = open_source("webdataset", "train", root=f"{tmp_path}/web")
    data = CaptionExamples(source, WordTokenizer(["photo"]), 4)
    batches = pipeline.train_batches(data, batch_size=2, seed=0, num_steps=3)
    seen = {source.ids[i] for batch in batches for i in batch["index"].tolist()}
    assert len(seen) == 6
    lines = (tmp_path / "used.tsv").read_text().splitlines()
    assert lines == [f"{name}\t1" for name in sorted(seen - {"a/00004"})]
    assert result.out.startswith(f"{len(lines)} samples were used by step 3, 1 could not be read")


def test_samples_refuses(launch, run, tmp_path):
    words = f"--workdir={run}", f"--out={tmp_path}/no/used.tsv"
    assert f"--out: {tmp_path}/no/used.tsv: No such file" in launch("samples", *words).refusal()
    words = f"--workdir={run}", f"--out={tmp_path}/used.tsv"
    write_tar(tmp_path / "web/a.tar", members(range(7)))
    line = launch("samples", *words).refusal()
    assert "data.root gives 7 training samples, the run had 9; restore" in line
    words = f"--workdir={tmp_path}/web", f"--out={tmp_path}/used.tsv"
    assert "no workdir of a run" in launch("samples", *words).refusal()
    assert sorted(os.listdir(tmp_path)) == ["run", "web"]


def test_prepare_pairs(launch, tmp_path):
    content = members(range(4), "jpg")
    content[2] = (content[2][0], b"")
    write_tar(tmp_path / "web/a.tar", content)
    words = "--dataset=pairs", f"--source=webdataset:{tmp_path}/web", f"--out={tmp_path}/out"
    result = launch("prepare", *words)
    assert result.code == 0 and result.err == "", result
    metadata = json.loads((tmp_path / "out/pairs.json").read_text())
    sha256 = metadata["splits"]["train"]["sha256"]
    assert result.out.splitlines() == [
        "reading train: 0 of 4",
        "checking train: 0 of 3",
        f"train: 3 images, 3 captions, 1 skipped, sha256 {sha256}",
        f"{tmp_path}/out is ready: --config.data.dataset=pairs --config.data.root={tmp_path}/out",
    ]
    assert len(open_source("pairs", "train", root=f"{tmp_path}/out")) == 3
    result = launch("prepare", *words)
    assert result.code == 0 and "out holds this already; nothing to do" in result.out
    result = launch("prepare", *words, '--options={"caption_key": "caption"}').refusal()
    assert "out was prepared from another source" in result


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--source=x"], "--source=x: for pairs it is DATASET:ROOT"),
        (["--source=webdatset:x"], "'webdatset' is unknown; did you mean 'webdataset'"),
        (["--source=webdataset:nowhere"], "nowhere does not exist"),
        (["--source=webdataset:"], "--source is empty; dataset 'webdataset' needs"),
        (["--source=webdataset:x", "--options={"], "--options={ is not JSON"),
        (["--source=webdataset:x", "--options=[]"], "--options=[] is no JSON object"),
        (["--source=webdataset:x", '--options={"a": 1}'], "'webdataset' has no option 'a'"),
        (["--source=webdataset:x", "--split=val"], "--split=val: it is train"),
    ],
)
def test_prepare_pairs_refuses(launch, tmp_path, words, wanted):
    line = launch("prepare", "--dataset=pairs", f"--out={tmp_path}/out", *words).refusal()
    assert wanted in line and "data.root" not in line
    assert os.listdir(tmp_path) == []

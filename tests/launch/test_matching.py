"""Image-text matching from the command line: train, evaluate, ensembles, predict, bad input."""

import json

import cv2
import jax
import numpy as np
import pytest

from tests import precomputed, tiny
from tests.launch.conftest import CONFIG, ROOT, _launch
from trm_jax.train.predictor import load


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder of precomputed regions, folder of the tagger's files)."""
    return precomputed.write(tmp_path_factory.mktemp("precomp"))


def _flags(data, kind="scan"):
    root, tagger = data
    return (
        f"--config={CONFIG}:{kind}",
        f"--config.data.root={root}",
        "--config.data.options.captions_per_image=2",
        f"--config.nouns.tagger={tagger}",
    )


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Finished workdirs of SCAN and of SAF."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("scan", "saf"):
        assert _launch("train", *_flags(data, kind), f"--workdir={folder / kind}") == 0
    return folder


def test_a_run_ranks_all_pairs_and_keeps_its_nouns(runs, data):
    final = tiny.lines(runs / "scan")[-1]
    recalls = [final[f"{way}_R@{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert final["Rsum"] == pytest.approx(sum(recalls)) and final["i2t_R@10"] == 100.0
    assert (data[0] / "train_nouns.npz").is_file()
    saved = json.loads((runs / "scan" / "vocabulary.json").read_text())
    # Twenty-four captions: five of each of the first four, four of the last.
    counts = dict(zip(saved["nouns"]["nouns"], saved["nouns"]["counts"], strict=True))
    assert counts == {"dog": 10, "kid": 9, "box": 5, "paris": 5, "alp": 5}
    counts = json.loads((runs / "scan" / "run.json").read_text())["dataset"]
    assert counts["captions"] == 24 and counts["proxies"] == 5
    assert counts["captions_without_noun"] == 0
    assert saved["tokenizer"]["kind"] == "words" and saved["clip"]["kind"] == "scan"


def test_evaluation_repeats_the_last_line_and_an_ensemble_joins_runs(launch, runs, data):
    flags = _flags(data)
    assert launch("evaluate", *flags, f"--workdir={runs / 'scan'}").code == 0
    final = tiny.lines(runs / "scan")[-1]
    values = json.loads((runs / "scan" / "eval.json").read_text())
    assert values["Rsum"] == final["Rsum"]
    both = launch("evaluate", *flags, f"--workdir={runs / 'scan'}", f"--ensemble={runs / 'saf'}")
    assert both.code == 0
    joined = json.loads((runs / "scan" / "ensemble.json").read_text())
    assert joined["runs"] == [str(runs / "scan"), str(runs / "saf")] and joined["final"]
    alone = launch("evaluate", *flags, f"--workdir={runs / 'scan'}", f"--ensemble={runs / 'scan'}")
    again = json.loads((runs / "scan" / "ensemble.json").read_text())
    assert alone.code == 0 and again["Rsum"] == final["Rsum"]


def test_prediction_shows_hits_in_both_directions_and_where_words_look(
    launch, runs, data, tmp_path
):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(6):
        image = np.full((40, 40, 3), 40 * number, np.uint8)
        cv2.imwrite(str(photos / f"photo{number}.jpg"), image)
    captions = tmp_path / "captions.tsv"
    captions.write_text("photo0.jpg#0\tA dog .\nkids .\nphoto5.jpg\tdogs and kids in Paris\n")
    out = tmp_path / "out"
    result = launch(
        "predict",
        f"--workdir={runs / 'scan'}",
        f"--images={photos}",
        f"--features={data[0] / 'test_ims.npy'}",
        f"--captions={captions}",
        f"--compare={runs / 'saf'}",
        f"--out={out}",
    )
    assert result.code == 0, result
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line.get("query") for line in lines[:3]] == [
        "A dog .", "kids .", "dogs and kids in Paris",
    ]  # fmt: skip
    assert len(lines) == 3 + 6
    for line in lines:
        scores = [found["score"] for found in line["results"]]
        assert scores == sorted(scores, reverse=True) and len(scores) == (
            6 if "query" in line else 3
        )
    # A pair has one score, whichever side asks.
    first = {found["id"]: found["score"] for found in lines[0]["results"]}
    for line in lines[3:]:
        texts = {found["text"]: found["score"] for found in line["results"]}
        assert texts["A dog ."] == first[line["image"]]
    pictures = {path.name for path in out.glob("*.png") if path.stat().st_size > 5_000}
    assert pictures == {
        "images_of_captions.png", "captions_of_images.png", "attention_0.png", "attention_1.png",
    }  # fmt: skip


def test_an_export_scores_pairs_without_this_package(launch, runs, tmp_path):
    assert launch("export", f"--workdir={runs / 'saf'}", f"--out={tmp_path}").code == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        "model.safetensors", "config.json", "vocabulary.json", "README.md", "predict.stablehlo",
    }  # fmt: skip
    model = load(runs / "saf")
    features = np.random.default_rng(0).normal(size=(3, 9, 6)).astype(np.float32)
    texts = ("A dog .", "dogs and kids")
    exported = jax.export.deserialize(bytearray((tmp_path / "predict.stablehlo").read_bytes()))
    found = exported.call({"features": features, "tokens": model.tokenizer(texts, 10)})["scores"]
    np.testing.assert_allclose(found, model.match(features, texts), rtol=1e-5, atol=1e-6)


def test_the_samples_of_a_run_are_its_images_by_their_captions(launch, runs, tmp_path):
    out = tmp_path / "samples.tsv"
    assert launch("samples", f"--workdir={runs / 'scan'}", f"--out={out}").code == 0
    lines = [line.split("\t") for line in out.read_text().splitlines()]
    # Six steps of eight pairs: two epochs of the 24 captions, two of each image.
    assert lines == [[f"photo{number}.jpg", "4"] for number in range(12)]


def _changed(data, tmp_path, change):
    """A copy of the data that `change` spoilt."""
    root = tmp_path / "data"
    root.mkdir()
    for file in data[0].glob("*_*.*"):
        (root / file.name).write_bytes(file.read_bytes())
    change(root)
    return root, data[1]


def _nan(root):
    features = np.load(root / "test_ims.npy")
    features[4, 2, 1] = np.nan
    np.save(root / "test_ims.npy", features)


def _edit(name, function):
    def change(root):
        lines = (root / name).read_text().splitlines()
        (root / name).write_text("\n".join(function(lines)) + "\n")

    return change


SPOILT = {
    "too few captions": (
        _edit("train_caps.txt", lambda lines: lines[:-1]), "train_caps.txt ends at line 23",
    ),
    "empty caption": (
        _edit("train_caps.txt", lambda lines: [*lines[:6], "", *lines[7:]]), "line 7: the caption",
    ),
    "NaN": (_nan, "test_ims.npy: features of row 4"),
    "width": (
        lambda root: np.save(root / "train_ims.npy", np.zeros((12, 9, 5), np.float16)),
        "model.matching.image.regions=9 and .width=5",
    ),
    "regions": (
        lambda root: np.save(root / "train_ims.npy", np.zeros((12, 4, 6), np.float16)),
        "model.matching.image.regions=4",
    ),
    "no noun": (
        _edit("train_caps.txt", lambda lines: ["red ."] * len(lines)), "no noun occurs 1 times",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_data_that_does_not_fit_is_refused(launch, data, tmp_path, name):
    change, wanted = SPOILT[name]
    spoilt = _changed(data, tmp_path, change)
    line = launch("train", *_flags(spoilt), f"--workdir={tmp_path / 'run'}").refusal()
    assert wanted in line and not (tmp_path / "run" / "config.json").exists(), line


def test_the_vocabulary_of_other_captions_is_refused(launch, runs, data, tmp_path):
    other = _changed(
        data, tmp_path, _edit("train_caps.txt", lambda lines: ["A red dog .", *lines[1:]])
    )
    line = launch("evaluate", *_flags(other), f"--workdir={runs / 'scan'}").refusal()
    assert "was trained with other words" in line or "other nouns" in line


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--config.loss.pair=hinge"], "loss.pair='hinge'"),
        (["--config.model.matching.scorer.direction=both"], "model.matching.scorer.direction"),
        (["--config.model.matching.scorer.pooling=lse"], "pooling='mean' or another loss.pair"),
        (["--config.model.matching.text.kind=bert"], "model.matching.text.weights=''"),
        (["--config.data.length_buckets=(9,4)"], "data.length_buckets"),
        (["--config.nouns.tagger=nowhere"], "nowhere"),
        (["--config.evaluate.folds=4"], "6 images cannot be cut into 4"),
        (["--config.optimizer.drop_epochs=()"], "optimizer.drop_epochs"),
    ],
)
def test_settings_that_cannot_be_are_refused(launch, data, tmp_path, flags, wanted):
    line = launch("train", *_flags(data), f"--workdir={tmp_path / 'run'}", *flags).refusal()
    assert wanted in line, line


def test_captions_and_queries_are_for_their_own_kind_of_run(launch, runs, data, trained, tmp_path):
    image = ROOT / "docs" / "demo.png"
    out = f"--out={tmp_path / 'out'}"
    line = launch(
        "predict", f"--workdir={trained}", f"--images={image}", "--captions=x", out
    ).refusal()
    assert "--captions and --compare are for runs that score pairs" in line
    empty = tmp_path / "captions.txt"
    empty.write_text("a dog\n\nkids\n")
    photo = tmp_path / "photo0.jpg"
    cv2.imwrite(str(photo), np.zeros((8, 8, 3), np.uint8))
    words = [f"--workdir={runs / 'scan'}", f"--images={photo}", out]
    words += [f"--features={data[0] / 'test_ims.npy'}"]
    line = launch("predict", *words, f"--captions={empty}").refusal()
    assert "captions.txt, line 2: the caption is empty" in line
    assert "--captions=FILE" in launch("predict", *words, "--query=dog").refusal()

"""launch/match.py: knowledge from a run, scores of captions, re-ranking, fine-tuning, bad input."""

import json

import cv2
import numpy as np
import pytest

from tests import knowledge_data
from tests.launch.conftest import CONFIG, _launch
from trm_jax.memory import knowledge_file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return knowledge_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A finished run of MASK."""
    folder = tmp_path_factory.mktemp("runs") / "mask"
    regions, test, vectors = files
    flags = (
        f"--config={CONFIG}:mask",
        f"--config.data.root={regions}",
        f"--config.data.test_root={test}",
        f"--config.words.vectors={vectors}",
        "--config.train.steps=30",
        "--config.optimizer.learning_rate=0.01",
    )
    assert _launch("train", *flags, f"--workdir={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def built(run):
    """The run's knowledge, and that of the raw features."""
    for name, *more in (("mask",), ("mack", "--raw")):
        out = run / f"{name}.safetensors"
        assert _launch("match", "build", f"--workdir={run}", f"--out={out}", *more) == 0
    return run / "mask.safetensors", run / "mack.safetensors"


def test_a_knowledge_is_the_means_of_the_runs_regions(built, files):
    mask, mack = (knowledge_file.load(path) for path in built)
    with np.load(files[0]) as arrays:
        features, words = arrays["features"].astype(np.float32), arrays["words"]
    assert mask.words == mack.words == tuple(sorted(knowledge_data.WORDS))  # all with a vector
    for row, word in enumerate(mack.words):
        own = features[words == word]
        np.testing.assert_allclose(mack.prototypes[row], own.mean(0), rtol=1e-4, atol=1e-5)
        assert mack.counts[row] == mask.counts[row] == len(own)
        assert np.isclose(own, mack.random_regions[row], atol=1e-6).all(1).any()
    assert mask.prototypes.shape == (8, 16) and mask.provenance["encoder"] != "raw features"


def test_scores_are_the_runs_own_and_help_another(launch, run, built, tmp_path):
    out = tmp_path / "mask.npy"
    flags = (f"--workdir={run}", f"--knowledge={built[0]}")
    assert launch("match", "score", *flags, f"--out={out}").code == 0
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    beside = json.loads((tmp_path / "mask.json").read_text())
    assert beside["recalls"]["Rsum"] == pytest.approx(final["Rsum"], abs=1.0)
    assert beside["words"]["words_unknown"] == 4 and beside["image_of_text"][:3] == [0, 0, 1]
    scores = np.load(out)
    assert scores.shape == (24, 48) and np.abs(scores).max() <= 1.0
    rng = np.random.default_rng(0)
    np.save(tmp_path / "base.npy", rng.normal(size=(24, 48)).astype(np.float32))
    result = launch(
        "match", "rerank", f"--base={tmp_path / 'base.npy'}", f"--other={out}", "--alpha=5",
        "--top=24", "--captions_per_image=2", f"--out={tmp_path / 'new.npz'}",
    )  # fmt: skip
    assert result.code == 0
    before, after = result.out.split("Rsum ")[1].split()[::2]
    assert float(after) > float(before) + 100
    with np.load(tmp_path / "new.npz") as found:
        assert found["to_text_order"].shape == (24, 24) and "to_image_moves" in found
    # The raw features need no encoder, and give other scores.
    raw = (f"--workdir={run}", f"--knowledge={built[1]}", "--raw", "--set=unknown=drop")
    assert launch("match", "score", *raw, f"--out={tmp_path / 'mack.npy'}").code == 0
    assert not np.allclose(np.load(tmp_path / "mack.npy"), scores)


def test_fine_tuning_leaves_a_knowledge_with_a_map(launch, run, built, tmp_path):
    out = tmp_path / "tuned.safetensors"
    flags = (f"--workdir={run}", f"--knowledge={built[0]}")
    assert launch("match", "finetune", *flags, "--steps=3", f"--out={out}").code == 0
    old, new = knowledge_file.load(built[0]), knowledge_file.load(out)
    assert new.region_map is not None and old.region_map is None
    np.testing.assert_allclose(new.prototypes, old.prototypes @ new.region_map, atol=1e-5)
    found = launch("match", "score", f"--workdir={run}", f"--knowledge={out}",
                   f"--out={tmp_path / 's.npy'}")  # fmt: skip
    assert found.code == 0


def test_a_knowledge_is_looked_at_and_merged(launch, built, tmp_path):
    result = launch("match", "inspect", f"--knowledge={built[0]}")
    assert result.code == 0 and json.loads(result.out)["words"] == 8
    near = launch("match", "inspect", f"--knowledge={built[0]}", "--word=dog")
    assert near.out.count("\n") == 2 and "word_vectors: " in near.out
    drawn = launch(
        "match", "inspect", f"--knowledge={built[0]}", f"--compare={built[1]}",
        "--groups=beings:dog,kid;things:ball,car,hat", f"--out={tmp_path / 'words.png'}",
    )  # fmt: skip
    assert drawn.code == 0 and (tmp_path / "words.png").stat().st_size > 5_000
    both = tmp_path / "both.safetensors"
    merged = launch("match", "merge", f"--knowledge={built[0]}", f"--other={built[0]}",
                    f"--out={both}")  # fmt: skip
    assert merged.code == 0
    assert knowledge_file.load(both).counts.sum() == 2 * knowledge_file.load(built[0]).counts.sum()


def test_words_and_what_reranking_moved_are_drawn(launch, run, built, tmp_path):
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for name in range(knowledge_data.TEST_IMAGES):  # the images have no names but their numbers
        cv2.imwrite(str(photos / f"{name}.png"), rng.integers(0, 255, (30, 40, 3), np.uint8))
    flags = ("draw", f"--workdir={run}", f"--knowledge={built[0]}")
    out = tmp_path / "pictures"
    assert launch("match", *flags, f"--images={photos}", f"--out={out}").code == 0
    assert sorted(path.name for path in out.iterdir()) == [f"words_{k}.png" for k in range(1, 5)]
    scores = rng.normal(size=(2, 24, 48)).astype(np.float32)
    for name, matrix in zip("ab", scores, strict=True):
        np.save(tmp_path / f"{name}.npy", matrix)
    both = (f"--base={tmp_path / 'a.npy'}", f"--other={tmp_path / 'b.npy'}", "--top=24")
    drawn = launch("match", *flags, f"--images={photos}", f"--out={out}", *both, "--alpha=2")
    assert drawn.code == 0 and (out / "reranked.png").stat().st_size > 20_000
    cases = [
        ((), "features alone"),
        ((f"--images={tmp_path / 'none'}",), "is no folder"),
        ((f"--images={tmp_path}",), "has no photo"),
        ((f"--images={photos}", both[0]), "belong together"),
        ((f"--images={photos}", *both, "--alpha=0"), "nothing to draw"),
    ]
    for more, message in cases:
        refused = launch("match", *flags, f"--out={out}", *more)
        assert refused.code == 2 and message in refused.refusal(), more


def test_mistakes_are_one_line(launch, run, built, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 8), np.float32))
    np.save(tmp_path / "b.npy", np.full((4, 8), np.nan, np.float32))
    np.save(tmp_path / "c.npy", np.zeros((4, 9), np.float32))
    score = ("score", f"--workdir={run}", f"--out={tmp_path / 's.npy'}")
    rerank = ("rerank", f"--base={tmp_path / 'a.npy'}", f"--out={tmp_path / 'r.npz'}")
    cases = [
        (("rank",), "the command is 'rank'"),
        ((), "the command is 'nothing'"),
        (("build", "--out=x"), "--workdir is missing"),
        (("build", "--workdir=nowhere", "--out=x"), "nowhere is no workdir"),
        (("inspect", "--knowledge=nowhere.safetensors"), "nowhere.safetensors"),
        (("inspect", f"--knowledge={built[0]}", "--word=dgo"), "'dog'"),
        (score, "--knowledge is missing"),
        ((*score, f"--knowledge={built[1]}"), "built with another encoder"),
        ((*score, f"--knowledge={built[0]}", "--raw"), "built with another encoder"),
        ((*score, f"--knowledge={built[0]}", "--set=unknwon=drop"), "the words section has"),
        ((*score, f"--knowledge={built[0]}", "--set=neighbours=ten"), "'ten' is no int"),
        ((*rerank, f"--other={tmp_path / 'b.npy'}", "--top=2"), "b.npy"),
        ((*rerank, f"--other={tmp_path / 'c.npy'}", "--top=2"), "c.npy"),
        ((*rerank, f"--other={tmp_path / 'a.npy'}", "--top=5"), "5"),
        ((*rerank, "--other=nowhere.npy"), "nowhere.npy cannot be read"),
        (
            (*rerank, f"--other={tmp_path / 'a.npy'}", "--top=2", "--captions_per_image=3"),
            "has 8 captions, 12 are known",
        ),
    ]
    for words, message in cases:
        result = launch("match", *words)
        assert result.code == 2 and message in result.err, (words, result)
        assert result.err.count("\n") == 1


def test_an_empty_caption_is_told_by_its_number(launch, run, built, files, tmp_path):
    for name in ("test_ims.npy",):
        (tmp_path / name).write_bytes((files[1] / name).read_bytes())
    lines = (files[1] / "test_caps.txt").read_text().splitlines()
    (tmp_path / "test_caps.txt").write_text("\n".join([*lines[:5], " . ", *lines[6:]]) + "\n")
    flags = (f"--workdir={run}", f"--knowledge={built[0]}", f"--root={tmp_path}")
    result = launch("match", "score", *flags, f"--out={tmp_path / 's.npy'}")
    # Without a usable word a caption scores 0; it is counted.
    assert result.code == 0 and "captions_unusable 1" in result.out
    assert np.all(np.load(tmp_path / "s.npy")[:, 5] == 0)


def test_two_towers_are_scored_by_their_cosines(launch, tmp_path):
    flags = (f"--config={CONFIG}:contrastive", f"--workdir={tmp_path / 'run'}")
    assert launch("train", *flags, "--config.train.steps=2").code == 0
    final = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    out = tmp_path / "base.npy"
    assert launch("match", "score", f"--workdir={tmp_path / 'run'}", f"--out={out}").code == 0
    beside = json.loads((tmp_path / "base.json").read_text())
    assert beside["recalls"]["Rsum"] == pytest.approx(final["Rsum"], abs=1e-4)
    assert np.load(out).shape == (16, 80) and beside["image_of_text"][4:6] == [0, 1]
    refused = launch("match", "build", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'k'}")
    assert refused.code == 2 and "method='mask'" in refused.refusal()

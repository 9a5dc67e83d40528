"""Every mistake of a user is one line that names the field or file, and exit code 2."""

import json

import pytest

from tests.launch.conftest import CONFIG

CASES = {
    "misspelt field": (["--config.train.epoch=3"], "config.train.epoch", "train.epochs?"),
    "misspelt section": (
        ["--config.optimiser.name=sgd"],
        "config.optimiser.name",
        "optimizer.name?",
    ),
    "unknown flag": (["--wrokdir=x"], "wrokdir", ""),
    "word": (["stray"], "'stray' is no flag", "--name=value"),
    "wrong type": (["--config.train.epochs=abc"], "train.epochs", "abc"),
    "missing root": (["--config.data.dataset=coco"], "data.root is empty", "coco"),
    "unknown dataset": (["--config.data.dataset=glyps"], "data.dataset 'glyps'", "'glyphs'"),
    "unknown method": (["--config.method=trm"], "method='trm'", "trm_ml"),
    "no fraction": (["--config.data.known_fraction=0"], "data.known_fraction", "0.1"),
    "large fraction": (["--config.data.known_fraction=1.5"], "data.known_fraction", "1.5"),
    "image size": (["--config.data.image_size=36"], "data.image_size=36", "try 32"),
    "large batch": (["--config.data.batch_size=64"], "data.batch_size 64", "32"),
    "no train size": (["--config.data.train_size=0"], "data.train_size", "at least 1"),
    "label protocol": (["--config.data.label_protocol=has"], "data.label_protocol 'has'", "hash"),
    "augmentation": (["--config.data.augment=mixup"], "mixup", "tai"),
    "cached and augmented": (
        ["--config.data.cache_features=True", "--config.data.augment=tai"],
        "data.augment",
        "none",
    ),
    "optimizer": (["--config.optimizer.name=adam"], "optimizer.name: 'adam'", "adamw"),
    "schedule": (["--config.optimizer.schedule=line"], "optimizer.schedule: 'line'", "one_cycle"),
    "freeze pattern": (["--config.optimizer.freeze=('^clp/',)"], "optimizer.freeze: '^clp/'", ""),
    "bad pattern": (["--config.optimizer.decay=('(',)"], "optimizer.decay: '('", "regular"),
    "microbatch": (["--config.train.microbatch=4"], "train.microbatch", "train.microbatch=0"),
    "precision": (
        ["--config.precision.compute=float16"],
        "precision.compute='float16'",
        "bfloat16",
    ),
    "evaluator": (["--config.evaluate.kinds=('map',)"], "evaluate.kinds: 'map'", "multilabel"),
    "weights": (["--config.model.pretrained=no.safetensors"], "model.pretrained", "no.safetensors"),
    "loss choice": (["--config.loss.reduction=max"], "loss.reduction='max'", "sum, mean"),
    "initial words": (["--config.prompts.initial_words=a"], "initial_words='a'", "prompts.length"),
    "tokenizer": (["--config.model.tokenizer=bpe"], "model.tokenizer='bpe'", "words"),
    "nan policy": (["--config.train.nan_policy=ignore"], "train.nan_policy", "skip"),
}


@pytest.mark.parametrize("name", CASES)
def test_train_refuses(launch, tmp_path, name):
    words, *wanted = CASES[name]
    workdir = tmp_path / "run"
    line = launch("train", f"--config={CONFIG}", f"--workdir={workdir}", *words).refusal()
    assert all(text in line for text in wanted), line
    # The corrected command may use the same workdir.
    assert not (workdir / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--config=configs/none.py", "--workdir=x"], "configs/none.py"),
        ([f"--config={CONFIG}"], "--workdir is missing"),
        (["--workdir=x"], "--config is missing"),
        ([f"--config={CONFIG}:nonsense", "--workdir=x"], "nonsense is unknown; check the word"),
        ([f"--config={CONFIG}:typo", "--workdir=x"], "no option 'caption_nois'"),
        (
            ["--config", CONFIG, "--workdir=x", "--config.train.steps=1", "--config.sed=1"],
            "did you mean --config.seed?",
        ),
    ],
)
def test_train_refuses_whole_commands(launch, words, wanted):
    assert wanted in launch("train", *words).refusal()


def _manifest(tmp_path, rows):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


CAT = {"image": "a.jpg", "positives": ["cat"], "split": "train"}


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([CAT, "{"], "line 2: not JSON"),
        ([CAT, CAT | {"image": "b.jpg", "positives": ["cow"]}], "line 2: class 'cow' is not in"),
        ([CAT | {"negatives": ["dog"]}], "no training image of dog"),
    ],
    ids=["row", "class", "category without images"],
)
def test_train_refuses_manifests(launch, tmp_path, rows, wanted):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    line = launch(
        "train",
        f"--config={CONFIG}:manifest",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.root={_manifest(tmp_path, rows)}",
        f"--config.data.options.classes={tmp_path / 'classes.txt'}",
    ).refusal()
    assert wanted in line


def test_the_others_refuse_what_is_not_there(launch, trained, tmp_path):
    empty = tmp_path / "empty"
    evaluate = launch("evaluate", f"--config={CONFIG}", f"--workdir={empty}")
    assert "holds no checkpoints; train there first" in evaluate.refusal()
    predict = launch("predict", f"--workdir={empty}", "--images=setup.py", f"--out={tmp_path}")
    assert "none of the images" in predict.refusal().splitlines()[-1]
    predict = launch("predict", f"--workdir={trained}", "--images=gone.jpg", f"--out={tmp_path}")
    assert "--images: gone.jpg is neither a file nor a folder" in predict.refusal()
    export = launch("export", f"--workdir={empty}", f"--out={tmp_path}")
    assert "no workdir of a run" in export.refusal()

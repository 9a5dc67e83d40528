"""The step benchmark: its processes, its rows, and the peer that it is measured against."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import step_trm_ml, step_trm_ml_workers
from configs import common
from tests.benchmarks import fake_sides
from trm_jax.data.sources import coco
from trm_jax.data.tokenizers import ClipTokenizer
from trm_jax.methods import dualcoop, frozen_clip
from trm_jax.models import prompts
from trm_jax.models.clip import towers
from trm_jax.pretrained import convert, registry
from trm_jax.types import ArraySpec, DataInfo, UserError

SETTING = step_trm_ml_workers.Setting("RN50", 224, 30, "weights", ("dog", "hair drier"))


def test_a_worker_answers_with_seconds_and_ends_with_its_peak():
    worker = step_trm_ml_workers.Worker(fake_sides.quick, SETTING)
    assert worker.facts["tokens"] == 24
    assert 0.03 <= worker.seconds("step", 2) < 0.3
    assert worker.close() == {"peak_mb": 12.5}


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_dies_is_an_error_and_no_wait():
    with pytest.raises(RuntimeError, match="died"):
        step_trm_ml_workers.Worker(fake_sides.dies, SETTING)


def _rows(size, speed):
    condition = {"arch": "RN50", "image_size": size, "batch": 8}
    row = step_trm_ml._row("TRM-ML", condition, "images_per_s", speed, "images/s")
    return [row | step_trm_ml._ratio([2.0, 9.0, 3.0], [1.0, 3.0, 2.0], "the peer")]


def test_a_job_replaces_its_rows_alone(tmp_path):
    path = tmp_path / "step.json"
    step_trm_ml.write(path, _rows(224, [1.0, 3.0]), {"gflop": 1}, 5.0)
    step_trm_ml.write(path, _rows(448, [5.0]), {"gflop": 2}, 5.0)
    step_trm_ml.write(path, _rows(224, [2.0, 4.0]), {"gflop": 3}, 5.0)
    body = json.loads(path.read_text())
    assert [(r["condition"]["image_size"], r["mean"], r["seeds"]) for r in body["rows"]] == [
        (448, 5.0, 1),
        (224, 3.0, 2),
    ]
    assert body["rows"][0]["ratio"] == 2.0 and body["rows"][0]["against"] == "the peer"
    assert sorted(facts["gflop"] for facts in body["programs"].values()) == [2, 3]
    text = path.with_suffix(".md").read_text()
    assert "## RN50 at 224 pixels, batch 8" in text and "| 3 ± 1.41 images/s | 2.0 |" in text


@pytest.mark.parity
@pytest.mark.parametrize("total", [0, 77])
def test_the_peer_is_dualcoop(tmp_path, total):
    from benchmarks import torch_dualcoop

    architecture = registry.architecture("RN50")
    image = architecture["image"] | {"layers": (1, 1), "width": 8, "heads": 4, "image_size": 32}
    text = architecture["text"] | {"width": 16, "heads": 2, "layers": 2}
    clip = towers.validate(
        architecture | {"embed_dim": 8, "dense_pos_embed": True, "image": image, "text": text}
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda spec: (np.abs(rng.normal(size=spec.shape)) * 0.3 + 0.1).astype(np.float32),
        towers.abstract_variables(clip),
    )
    registry.save_openclip(tmp_path / "clip.safetensors", variables)
    names = ("dog", "hair drier", "cat")
    spec = {"image": ArraySpec((None, 64, 64, 3), np.uint8)}
    method = dualcoop.make(
        info=DataInfo(class_names=names), tokenizer=ClipTokenizer(), clip=clip, inputs=spec,
        grid=(8, 8), prompts=frozen_clip.Prompts(length=16),
    )  # fmt: skip
    params, _ = jax.jit(lambda key: method.init(key, pretrained=variables))(jax.random.key(0))
    ids, lengths = prompts.class_token_ids([*names, *names], ClipTokenizer())
    total = total or prompts.prompt_length([*names, *names], lengths, context=16, context_length=77)
    peer = torch_dualcoop.DualCoOp(clip, ids, 16 + lengths, total=total)
    peer.load(str(tmp_path / "clip.safetensors"))
    torch = torch_dualcoop.torch
    contexts = np.concatenate([params["prompts"]["negative"], params["prompts"]["positive"]])
    with torch.no_grad():
        peer.context.copy_(torch.as_tensor(contexts))
    photos = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    mean, std = (np.float32(clip["image"][name]) for name in ("mean", "std"))
    pixels = (photos / np.float32(255) - mean[None, None, None]) / std[None, None, None]
    with torch.no_grad():
        logits = peer.eval()(torch.as_tensor(pixels).permute(0, 3, 1, 2))
    expected = logits.softmax(1)[:, 1].numpy()
    scores = jax.jit(method.predict["scores"])(params, {}, {"image": photos})["scores"]
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(scores, expected, atol=2e-5)


@pytest.mark.parity
def test_the_peers_loss_is_ours():
    from benchmarks import torch_dualcoop
    from trm_jax.losses import asymmetric

    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4, 2, 5)).astype(np.float32)
    labels = rng.choice((-1, 0, 1), size=(4, 5)).astype(np.int8)
    settings = common.dualcoop(common.openai_clip(common.base(), "RN50")).loss
    difference = jnp.asarray(logits[:, 1] - logits[:, 0])
    focus = {name: settings[name] for name in ("gamma_pos", "gamma_neg", "shift")}
    ours = asymmetric.asymmetric_loss(
        jax.nn.log_sigmoid(difference),
        jax.nn.log_sigmoid(-difference),
        jnp.asarray(labels),
        **focus,
    )
    torch = torch_dualcoop.torch
    theirs = torch_dualcoop.asymmetric_loss(torch.as_tensor(logits), torch.as_tensor(labels))
    np.testing.assert_allclose(settings.weight * float(ours.sum()), float(theirs), rtol=1e-5)


@pytest.mark.realdata
def test_class_names_are_cocos(data_root):
    labels = coco.read_labels(
        coco.annotation_file(data_root / "coco_subset", "instances", "val", "2017")
    )
    assert labels.class_names == step_trm_ml_workers.COCO_NAMES


def test_random_weights_are_an_openclip_file_of_the_architecture(tmp_path, monkeypatch):
    small = registry.architecture("RN50")
    small["image"] |= {"layers": (1,), "width": 4, "heads": 2, "image_size": 32}
    small["text"] |= {"width": 8, "heads": 1, "layers": 1, "vocab_size": 49408}
    monkeypatch.setattr(registry, "architecture", lambda name: towers.validate(small))
    path = step_trm_ml_workers.random_weights("RN50", tmp_path / "w.safetensors")
    variables = registry.load(path, towers.validate(small))
    assert variables is not None
    assert convert.to_openclip(variables)["visual.layer1.0.conv2.weight"].std() > 0.05


@pytest.mark.parametrize(
    "job", ["RN50:224", "ViT-B/16:224:8", "RN50:225:8", "RN5:224:8", "RN50:a:8"]
)
def test_a_job_that_cannot_be_run_is_refused_at_once(job):
    with pytest.raises(UserError, match="--jobs: "):
        step_trm_ml.parse(job)


def test_a_job_is_read():
    assert step_trm_ml.parse("RN101:448:128") == ("RN101", 448, 128)

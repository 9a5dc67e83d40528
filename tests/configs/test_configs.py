"""Every config builds, is consumed to the last field, and its shrunk copy trains."""

import importlib
import inspect
import json
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from configs import common
from tests import knowledge_data, tiny
from trm_jax.data import sources, tokenizers
from trm_jax.data.partial_labels import largeloss_split
from trm_jax.data.sources import coco, voc
from trm_jax.data.sources.glyphs import GlyphScenes
from trm_jax.data.sources.visual_genome import VisualGenome
from trm_jax.pretrained import registry
from trm_jax.train import architecture
from trm_jax.train.loop import Run
from trm_jax.types import UserError

ROOT = Path(__file__).parents[2]
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if not p.stem.startswith("common"))
ARGUMENTS = {
    "clip_glyphs": ("", "1", "5,0.1"),
    "lit_flickr8k": ("",),
    "manifest": ("",),
    "tfds": ("", "coco/2014,0.2"),
    "dualcoop_demo": ("", "own,0.3", "ours"),
    "coco_features": ("", "1", "0.1,dualcoop"),
    "simcon_glyphs": ("", "infonce", "simcon,0.6"),
    "simcon_flickr8k": ("", "infonce", "simcon,folder"),
}
ARGUMENTS |= dict.fromkeys(("sgraf_flickr30k", "sgraf_coco"), ("", "saf", "sgr,folder"))
ARGUMENTS |= dict.fromkeys(("scan_coco", "scan_flickr30k"), ("", "folder"))
ARGUMENTS |= dict.fromkeys(("naaf_coco", "naaf_flickr30k", "napreg_clip"), ("", "folder"))
ARGUMENTS |= {"mask_coco_subset": ("", "regions,test,vectors"), "mask_vg": ("", "folder,vectors")}
ARGUMENTS["mask_glyphs"] = ("", "3")
ARGUMENTS["napreg_flickr8k"] = ("", "saf", "sgr,folder", "naaf")
PAIRS = [name for name in NAMES if name.startswith("groupvit")]
ARGUMENTS |= dict.fromkeys(PAIRS, ("", "infonce", "simcon,folder"))


def _config(name, argument=""):
    return importlib.import_module(f"configs.{name}").get_config(argument)


@pytest.mark.parametrize("name", NAMES)
def test_configs_lock_and_have_the_fields_of_the_tree(name):
    tree = common.base()
    for argument in ARGUMENTS.get(name, ("", "0.2")):
        config = _config(name, argument).lock()
        assert set(config) == set(tree)
        for section in ("data", "model", "optimizer", "train", "mesh", "evaluate", "precision"):
            assert set(config[section]) == set(tree[section]), section
        with pytest.raises(AttributeError, match="learning_rate"):
            config.optimizer.learning_rat = 1.0
        for path, value in _leaves(config.to_dict()):
            # ml_collections refuses to override a plain None from the command line.
            assert value is not None or path == "train.steps"
        json.dumps(config.to_dict())


def _leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_arguments_are_read():
    assert _config("demo", "0.4").data.known_fraction == 0.4
    assert _config("coco").data.known_fraction == 0.1
    assert _config("dualcoop_demo", "own").optimizer.name == "sgd"
    assert _config("dualcoop_demo", "ours,0.5").optimizer.name == "adamw"
    assert _config("lit_flickr8k", "folder").data.root == "folder"
    with pytest.raises(ValueError, match="'own' or 'ours'"):
        _config("dualcoop_demo", "mine")


def test_the_papers_recipe_is_cocos():
    config = _config("coco")
    assert (config.train.epochs, config.data.batch_size, config.data.image_size) == (40, 128, 448)
    assert config.optimizer.learning_rate == 5e-4 and config.optimizer.weight_decay == 1e-4
    assert config.memory.slots == 64 and config.memory.pixels == 4
    assert config.loss.distillation_weight == 0.05 and config.loss.contrastive_weight == 0.01


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve scenes as a manifest of photos with positives and negatives."""
    folder = tmp_path_factory.mktemp("photos")
    scenes = GlyphScenes(seed=1, size=16, image_size=40)
    present = np.flatnonzero((scenes.labels[:12] == 1).any(0))
    rows = []
    for index in range(16):
        cv2.imwrite(str(folder / f"{index}.png"), scenes.read(index)["image"])
        signs = {
            sign: [scenes.class_names[c] for c in present if scenes.labels[index, c] == sign]
            for sign in (1, -1)
        }
        split = "train" if index < 12 else "test"
        rows.append(
            {"image": f"{index}.png", "positives": signs[1], "negatives": signs[-1], "split": split}
        )
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class _FakeFeatures:
    """Forty photos with 3 x 3 region features of width 96, labels and captions."""

    class_names = ("sun", "cloud", "star")

    def __init__(self):
        rng = np.random.default_rng(0)
        self.ids = tuple(map(str, range(40)))
        self.labels = rng.choice((-1, 1), size=(40, 3)).astype(np.int8)
        self.features = rng.normal(size=(40, 9, 96)).astype(np.float16)

    def __len__(self):
        return len(self.ids)

    def read(self, index):
        return {"features": self.features[index]}

    def noun_words(self):
        return {"sun", "cloud", "star", "stars"}

    def captions(self, index):
        return (f"a photo of a {self.class_names[index % 3]} .", "two stars .")


def _shrunk(name, photos, monkeypatch):
    config = _config(name)
    if config.method == "mask" and config.data.dataset != "glyph_regions":
        regions, test, vectors = knowledge_data.write(photos.parent)
        config.words.vectors = str(vectors)
        config.data.update({"root": str(regions), "dataset": "labelled_regions"})
        config.data.update({"test_dataset": "flickr8k_features", "test_root": str(test)})
        config.data.options = type(config)()
        config.data.test_options = type(config)({"captions_per_image": 2})
    augment = config.data.augment
    tiny.shrink(config)
    config.data.augment = augment
    config.train.update({"steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 2})
    if config.data.dataset == "manifest":
        config.data.update({"root": str(photos), "train_size": 0, "test_size": 0})
        config.model.tokenizer = "clip"
    elif config.data.dataset != "glyphs" and config.method != "mask":
        config.data.root = "unused"
        if config.data.dataset not in ("coco_features", "flickr8k_features"):
            config.data.update({"dataset": "glyphs", "test_dataset": ""})
            config.data.options = type(config)()
        else:
            monkeypatch.setattr(sources, "open_source", lambda *_, **__: _FakeFeatures())
    return config


# The recipes on pairs differ in their data alone.
@pytest.mark.parametrize("name", [n for n in NAMES if n not in PAIRS[1:]])
def test_a_shrunk_copy_trains_two_steps(name, photos, monkeypatch, tmp_path):
    config = _shrunk(name, photos, monkeypatch)
    built = tiny.build(config, tmp_path / "features")
    state = tiny.run(built.job, tmp_path)
    assert int(state.step) == 2
    first, second = (line for line in tiny.lines(tmp_path) if line["split"] == "train")
    assert first["skipped"] == second["skipped"] == 0
    assert np.isfinite([first["loss"], second["loss"]]).all()
    final = tiny.lines(tmp_path)[-1]
    if "multilabel" in config.evaluate.kinds:
        assert 0 <= final["mAP"] <= 100
    if {"retrieval", "pair_scores"} & {*config.evaluate.kinds}:
        assert 0 <= final["Rsum"] <= 600
    if config.method == "mask":
        assert 0 < final["Rsum"] <= 600
    if "segmentation" in config.evaluate.kinds:
        assert 0 < final["mIoU"] <= 100 and final["images"] == 16


@pytest.mark.parametrize(
    "name", ["coco", "dualcoop_coco", "voc2007", "voc2012", "manifest", "tfds"]
)
def test_options_are_those_of_the_dataset(name):
    data = _config(name).data
    assert set(data.options) <= set(inspect.signature(sources.DATASETS[data.dataset]).parameters)


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("coco", coco.OFFICIAL_COUNTS["2014", "train"][1]),
        ("dualcoop_coco", coco.OFFICIAL_COUNTS["2014", "train"][1]),
        ("voc2007", voc.OFFICIAL_COUNTS["2007", "train"][0]),
        ("dualcoop_voc2007", voc.OFFICIAL_COUNTS["2007", "train"][0]),
        ("voc2012", len(largeloss_split(voc.OFFICIAL_COUNTS["2012", "train"][0])[0])),
    ],
)
def test_runs_are_evaluated_after_every_epoch(name, images):
    config = _config(name)
    assert config.train.eval_every == images // config.data.batch_size
    assert config.train.checkpoint_every % config.train.eval_every == 0


@pytest.mark.parametrize("name", PAIRS)
def test_recipes_on_pairs_are_the_papers(name):
    config = _config(name, "simcon,folder")
    assert (config.loss.name, config.data.root) == ("simcon", "folder")
    assert (config.data.batch_size, config.train.epochs) == (2048, 30)
    assert config.loss.thresholds == (0.95, 0.90, 0.85)
    parts = config.data.options.get("parts", ())
    wanted = {"27m": 3, "29m": 3, "41m": 4}.get(name.split("_")[1], 0)
    assert len(parts) == wanted and config.data.dataset == ("mixture" if wanted else "webdataset")
    with pytest.raises(ValueError, match="'sim' is none of infonce, simcon, mv_simcon"):
        _config(name, "sim")


def test_masks_recipe_is_the_papers():
    config = _config("mask_vg", "folder,vectors")
    assert (config.data.root, config.words.vectors) == ("folder", "vectors")
    assert (config.optimizer.learning_rate, config.train.epochs) == (1e-4, 400)
    (first, size), (second, half) = config.data.batch_size_schedule
    assert first == second == 200 and size == 2 * half == config.data.batch_size
    loss = config.loss
    assert (loss.cross_modal_weight, loss.contrastive_weight, loss.kl_weight) == (3.0, 3.0, 1.0)
    options = {*config.data.options}, {*config.data.test_options}
    assert options[0] < {*inspect.signature(VisualGenome).parameters}
    assert options[1] < {*inspect.signature(sources.DATASETS["karpathy"]).parameters}


def test_the_peers_recipe_is_dualcoops():
    for name, rate in (("dualcoop_coco", 2e-3), ("dualcoop_voc2007", 1e-3)):
        config = _config(name)
        optimizer, data = config.optimizer, config.data
        assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == (
            "sgd", rate, 5e-4,
        )  # fmt: skip
        assert (data.batch_size, data.image_size, data.augment) == (32, 448, "dualcoop")
        assert config.train.epochs == 50 and config.model.clip.dense_pos_embed


def test_a_single_positive_is_what_voc2012_knows():
    assert _config("voc2012").data.label_protocol == "single_positive_largeloss"
    assert _config("voc2012").model.architecture == "RN50"
    every = _config("voc2012", "0.3")
    assert every.data.label_protocol == "hash"
    assert every.train.eval_every == voc.OFFICIAL_COUNTS["2012", "train"][0] // 128


@pytest.mark.parametrize("name", ["RN101", "RN50", "ViT-B/16"])
def test_an_architecture_is_named_and_its_fields_can_be_overridden(name):
    config = common.openai_clip(common.base(), name)
    config.model.clip.dense_pos_embed = True
    clip = architecture.resolve_clip(config.model, tokenizers.ClipTokenizer())
    assert clip == {**registry.architecture(name), "dense_pos_embed": True}


def test_an_unknown_architecture_is_refused(tmp_path):
    config = tiny.trm_ml(cached=False)
    config.model.architecture = "RN102"
    with pytest.raises(
        UserError, match=r"^model\.architecture: 'RN102' must be one of RN50, RN101"
    ):
        tiny.build(config, tmp_path)


@pytest.mark.parametrize("section", ["model.options", "prompts", "loss", "memory"])
def test_an_unknown_key_is_an_error_that_names_its_section(section, tmp_path):
    config = tiny.trm_ml(cached=False)
    target = config.model.options if section == "model.options" else config[section]
    target.colour = 1
    with pytest.raises(UserError, match=rf"^{section}: .*'colour'"):
        tiny.build(config, tmp_path)


def test_batches_of_every_kind_keep_the_frozen_towers_out_of_the_gradient(tmp_path):
    built = tiny.build(tiny.trm_ml(cached=False), tmp_path)
    run = Run(built.job, tmp_path / "run", tiny.mesh())
    state = run.prepare()
    assert set(state.frozen) == {"clip"} and "clip" not in state.params
    moments = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(state.opt_state)]
    assert not [path for path in moments if "'clip'" in path]
    run.files.close()


def test_the_cudnn_kernel_is_refused_without_a_gpu(tmp_path):
    config = tiny.trm_ml(cached=False)
    config.model.clip.attention = "cudnn"
    with pytest.raises(UserError, match="for a ViT on an NVIDIA GPU .* a resnet on cpu"):
        tiny.build(config, tmp_path)

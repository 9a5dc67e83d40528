"""Runs small enough for two cores: 32-pixel scenes, towers of width 8, one text layer."""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from configs import common, mask_coco_subset, napreg_flickr8k, simcon_glyphs
from trm_jax.train import experiment, metrics, sharding
from trm_jax.train.experiment import Experiment
from trm_jax.train.loop import Job, Run
from trm_jax.train.state import TrainState


def shrink_clip(clip: ConfigDict) -> None:
    """Two stages of width 4 (stride 8), one text layer of width 8, joint width 8."""
    clip.embed_dim = 8
    if clip.image.kind == "resnet":
        clip.image.update({"layers": (1, 1), "width": 4, "heads": 2, "image_size": 32})
    elif clip.image.kind == "groupvit":
        clip.image.update({"width": 8, "heads": 1, "depths": (1, 1), "image_size": 32})
        clip.image.update({"group_tokens": (3, 0), "output_groups": (3, 0)})
    else:
        clip.image.hidden = 8
    clip.text.update({"width": 8, "heads": 1, "layers": 1, "vocab_size": 0, "eos_id": 0})


def _shrink_matching(config: ConfigDict) -> None:
    """Nine regions of width 96, words and joint space of width 8, one text length."""
    matching = config.model.matching
    matching.update({"embed_dim": 8, "image": {"width": 96, "regions": 9}})
    matching.text.update({"embedding": 8, "min_count": 1})
    if matching.kind == "sgraf":
        matching.scorer.update({"sim_dim": 8, "steps": 2})
    config.model.options.block = 4


def shrink(config: ConfigDict) -> ConfigDict:
    """Any config on 32 tiny samples with random towers, 4 steps an epoch, 3 epochs."""
    if config.model.architecture:
        grouping = config.model.architecture == "groupvit"
        config.model.clip = common.groupvit_glyphs(32) if grouping else common.clip_glyphs()
        config.model.architecture = ""
    if config.model.matching:
        _shrink_matching(config)
    elif config.model.knowledge:
        config.model.knowledge.update({"width": 16, "heads": 2})
        config.rows.update({"regions": 6, "samples": 8, "most": 9})
        config.data.batch_size_schedule = ()
    else:
        shrink_clip(config.model.clip)
    config.model.update({"pretrained": "random", "initial_from": "", "initial_params": ()})
    config.model.tokenizer = "words"
    config.data.update(
        {
            "image_size": 32,
            "batch_size": 8,
            "train_size": 32,
            "test_size": 16,
            "workers": 0,
            "text_length": 16,
            "length_buckets": (16,) if config.data.length_buckets else (),
        }
    )
    folds = 4 if config.evaluate.folds > 1 else 1
    config.evaluate.update({"batch_size": 16, "pictures": 0, "folds": folds})
    if config.evaluate.segmentation:
        config.evaluate.segmentation.update({"short_side": 32, "window": 32, "stride": 16})
        config.evaluate.segmentation.batch_size = 16
    config.train.update({"epochs": 3, "log_every": 5, "eval_every": 6, "checkpoint_every": 4})
    if "length" in config.prompts:
        config.prompts.update({"length": 2, "initial_words": ""})
    if "slots" in config.memory:
        config.memory.update({"slots": 4, "pixels": 2, "stage_one_epochs": 1.25})
    return config


def trm_ml(*, cached: bool = True) -> ConfigDict:
    """TRM-ML on glyph scenes; `cached` reads the frozen tower's features, not the images."""
    config = common.base()
    config.model.clip = common.clip_glyphs()
    common.trm_ml(config)
    config.data.known_fraction = 0.3
    config.data.cache_features = cached
    config.optimizer.learning_rate = 1e-2
    return shrink(config)


def dualcoop() -> ConfigDict:
    """DualCoOp's own recipe on cached glyph scenes."""
    config = common.base()
    config.model.clip = common.clip_glyphs()
    common.dualcoop(config)
    config.data.update({"known_fraction": 0.3, "cache_features": True, "augment": "none"})
    return shrink(config)


def contrastive() -> ConfigDict:
    """Two towers on the captions of glyph scenes."""
    config = common.base()
    config.method = "contrastive"
    config.model.clip = common.clip_glyphs()
    config.optimizer.update({"learning_rate": 2e-3, "decay": ("kernel$",), "clip": 1.0})
    config.evaluate.kinds = ("retrieval",)
    return shrink(config)


def napreg(kind: str = "scan") -> ConfigDict:
    """NAPReg on regions of a folder, which the caller gives: `scan`, `sgr`, `saf` or `naaf`."""
    config = shrink(napreg_flickr8k.get_config(kind))
    config.model.matching.image.width = 6
    config.data.update({"train_size": 0, "test_size": 0, "length_buckets": (6, 10)})
    config.train.update({"steps": 6, "log_every": 2, "eval_every": 6, "checkpoint_every": 2})
    config.nouns.min_count = 1
    return config


def mask(regions: Path | str, test: Path | str, vectors: Path | str) -> ConfigDict:
    """MASK on the files of tests/knowledge_data.py."""
    config = shrink(mask_coco_subset.get_config(f"{regions},{test},{vectors}"))
    config.data.update({"train_size": 0, "test_size": 0})
    config.data.test_options.captions_per_image = 2
    config.rows.update({"most": 4, "attention_set": "image"})
    config.words.unknown = "interpolate"
    return config


def simcon(loss: str = "mv_simcon") -> ConfigDict:
    """A GroupViT on glyph scenes with noisy captions, by the streaming loss."""
    config = shrink(simcon_glyphs.get_config(f"{loss},0.3"))
    config.loss.update({"implementation": "streaming", "block": 3})
    config.loss.update({"thresholds": (0.95, 0.9, 0.85), "changes": (1 / 15, 0.5)})
    return config


def mesh(count: int = 1, fsdp: int = 1) -> jax.sharding.Mesh:
    """A mesh over the first `count` devices."""
    return sharding.make_mesh(-1, fsdp, jax.devices()[:count])


def build(config: ConfigDict, cache_dir: Path) -> Experiment:
    """experiment.build, with the config locked as the launchers do."""
    return experiment.build(ConfigDict(config).lock(), cache_dir=cache_dir)


def run(job: Job, workdir: Path, on: jax.sharding.Mesh | None = None) -> TrainState:
    """Trains `job` in `workdir` to its end, resuming what is there."""
    runner = Run(job, workdir, on or mesh())
    state = runner.prepare()
    writer = metrics.MetricsWriter(workdir, step=int(state.step), total_steps=job.total_steps)
    try:
        return runner.train(state, writer)
    finally:
        writer.close()
        runner.files.close()


def lines(workdir: Path) -> list[dict]:
    """metrics.jsonl without wall times."""
    text = (workdir / "metrics.jsonl").read_text()
    return [
        {name: value for name, value in json.loads(line).items() if name != "seconds"}
        for line in text.splitlines()
    ]

"""A small GroupViT on glyph scenes whose captions do not all match: SimCon in minutes on a CPU.

python launch/train.py --config=configs/simcon_glyphs.py:mv_simcon,0.3 --workdir=runs/simcon_glyphs

The text tower starts from the bundled CLIP's and learns on: from nothing, most of a run this short
would be the time until the towers agree on anything. Settings were chosen on other scenes
(benchmarks/claims_simcon.py --validation).
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is LOSS or LOSS,NOISE: infonce, simcon or mv_simcon; share of noisy captions (0.3)."""
    name, _, noise = arg.partition(",")
    config = common.simcon(common.base(), name or "mv_simcon")
    config.model.clip = common.groupvit_glyphs(48)
    config.model.update({
        "tokenizer": "words", "initial_from": "glyphs", "initial_params": ("^clip/params/text/",),
    })
    config.data.update({
        "dataset": "glyphs", "image_size": 48, "text_length": 12, "batch_size": 128,
        "train_size": 19_200, "test_size": 500, "augment": "flip_crop",
    })
    config.data.options.update({
        "caption_noise": float(noise or 0.3), "clutter": 0.0, "max_objects": 2,
        "object_scale": 1.6, "attributes": False, "typical_color": 1.0, "categories": 12,
        "seed": 11, "keep": True,
    })
    config.optimizer.update({
        "learning_rate": 1e-3, "schedule": "cosine", "warmup_epochs": 1.0, "weight_decay": 0.05,
        "b2": 0.98, "decay": ("kernel$",), "clip": 1.0,
    })
    config.loss.update(common.SHORT_RUN)
    config.train.update({
        "epochs": 5, "log_every": 50, "eval_every": 150, "checkpoint_every": 600,
    })
    config.evaluate.update({"kinds": ("segmentation", "retrieval"), "batch_size": 100})
    config.evaluate.segmentation.update({
        "short_side": 48, "window": 48, "stride": 24, "batch_size": 100,
        "background_threshold": 0.0,  # pixels of objects alone; a patch is wider than many a border
    })
    return config

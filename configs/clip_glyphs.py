"""The small CLIP that the package carries: glyph scenes and their captions, two towers, InfoNCE.

A contrastive loss finds no first foothold in small objects among clutter, so the towers start on
large single objects, told by their names alone. Seven runs, each from the towers of the one before:

for stage in 1 2 3 4 5 6 7; do
  python launch/train.py --config=configs/clip_glyphs.py:$stage --workdir=runs/clip_glyphs_$stage
  python launch/export.py --workdir=runs/clip_glyphs_$stage --out=runs/clip_glyphs_$stage/export
done
"""

from configs import common

# pixels, objects, their scale, clutter, colours in captions, scenes, batch size, learning rate
STAGES = {
    "1": (96, 1, 2.0, 0.0, False, 64_000, 64, 1e-3),
    "2": (64, 1, 2.0, 0.0, False, 192_000, 64, 2e-3),
    "3": (64, 3, 1.5, 0.5, True, 192_000, 64, 1e-3),
    "4": (96, 6, 1.0, 1.0, True, 51_200, 128, 1e-3),
    "5": (96, 6, 1.0, 1.0, True, 51_200, 64, 1e-3),
    "6": (96, 6, 1.25, 0.5, True, 307_200, 64, 1e-3),
    "7": (96, 6, 1.25, 0.25, True, 256_000, 64, 1e-3),
}


def get_config(arg: str = ""):
    """`arg` is STAGE (7) or STAGE,NOISE: the share of images whose captions do not match (0)."""
    stage, _, noise = (arg or "7").partition(",")
    if stage not in STAGES:
        raise ValueError(f"clip_glyphs.py:{stage}: the stage is one of {', '.join(STAGES)}")
    pixels, objects, scale, clutter, colours, scenes, batch_size, learning_rate = STAGES[stage]
    config = common.base()
    config.method = "contrastive"
    config.model.clip = common.clip_glyphs()
    config.model.tokenizer = "words"
    # The last three align the dense features, which the methods built on these towers read.
    config.model.options.dense_weight = 1.0 if stage in ("5", "6", "7") else 0.0
    if stage != "1":
        config.model.pretrained = f"runs/clip_glyphs_{int(stage) - 1}/export/clip.safetensors"
    config.data.update({
        "dataset": "glyphs", "image_size": pixels, "text_length": 20, "batch_size": batch_size,
        "train_size": scenes, "test_size": 1000,
    })
    config.data.options.update({
        "caption_noise": float(noise or 0.0), "clutter": clutter, "max_objects": objects,
        "object_scale": scale, "attributes": colours,
        "seed": 100 + int(stage),  # other scenes than the demo's
    })
    config.optimizer.update({
        "learning_rate": learning_rate, "weight_decay": 0.05, "b2": 0.98, "decay": ("kernel$",),
        "clip": 1.0,
    })
    config.train.update({
        "epochs": 1, "log_every": 25, "eval_every": 300, "checkpoint_every": 100,
    })
    config.evaluate.update({"kinds": ("zero_shot", "retrieval"), "batch_size": 100, "pool": "max"})
    return config

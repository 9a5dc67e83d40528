"""MASK on glyph scenes, without any download: regions with words, captions with other words.

python launch/train.py --config=configs/mask_glyphs.py --workdir=runs/mask_glyphs

Regions are the true boxes of the objects, encoded by the bundled CLIP. Half of the synonyms stand
in captions alone; word vectors are made of the captions of further scenes.
"""

from configs import common_mask


def get_config(arg: str = ""):
    """`arg` is the seed of the scenes, default 0."""
    config = common_mask.mask("glyph_regions", "", "")
    config.data.options.update({
        "seed": int(arg or 0), "held_out": 0.5, "colors": False, "texts": 6000,
    })
    config.data.update({
        "train_size": 2000, "test_size": 500, "image_size": 192, "batch_size": 128,
    })
    config.rows.update({"regions": 6, "samples": 6, "most": 6})
    config.words.width = 64
    config.model.knowledge.width = 128
    config.optimizer.learning_rate = 1e-3
    config.loss.kl_weight = 0.01
    config.train.update({"epochs": 20, "log_every": 15, "eval_every": 75, "checkpoint_every": 150})
    return config

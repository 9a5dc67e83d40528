"""TRM-ML on MS-COCO 2014 with OpenAI's CLIP RN101 at 448 pixels: the paper's recipe.

python launch/train.py --config=configs/coco.py:0.1 --workdir=runs/coco --config.data.root=COCO
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is the known fraction, 0.1 by default."""
    config = common.trm_ml(common.openai_clip(common.coco(common.base(), year="2014"), "RN101"))
    config.data.update({
        "image_size": 448, "batch_size": 128, "augment": "tai",
        "known_fraction": float(arg or 0.1),
    })
    config.train.update({"epochs": 40, "eval_every": 641, "checkpoint_every": 641})  # an epoch
    return config

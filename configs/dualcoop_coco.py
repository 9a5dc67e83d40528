"""DualCoOp on MS-COCO 2014 with OpenAI's CLIP RN101 at 448 pixels, in its own recipe.

python launch/train.py --config=configs/dualcoop_coco.py:0.1 --workdir=runs/dualcoop_coco \
    --config.data.root=COCO
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is the known fraction, 0.1 by default."""
    config = common.dualcoop(common.openai_clip(common.coco(common.base(), year="2014"), "RN101"))
    config.data.update({"image_size": 448, "known_fraction": float(arg or 0.1)})
    config.train.update({"eval_every": 2565, "checkpoint_every": 2565})  # an epoch of 82,081 / 32
    return config

"""DualCoOp on Pascal VOC 2007 with OpenAI's CLIP RN101 at 448 pixels, in its own recipe.

python launch/train.py --config=configs/dualcoop_voc2007.py:0.1 --workdir=runs/dualcoop_voc2007 \
    --config.data.root=VOC
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is the known fraction, 0.1 by default."""
    config = common.dualcoop(common.openai_clip(common.voc(common.base(), year="2007"), "RN101"))
    config.data.update({"image_size": 448, "known_fraction": float(arg or 0.1)})
    config.optimizer.learning_rate = 1e-3
    config.train.update({"eval_every": 156, "checkpoint_every": 1560})  # 156: an epoch
    return config

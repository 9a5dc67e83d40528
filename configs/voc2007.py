"""TRM-ML on Pascal VOC 2007 with OpenAI's CLIP RN101 at 448 pixels: the paper's recipe.

python launch/train.py --config=configs/voc2007.py:0.1 --workdir=runs/voc2007 \
    --config.data.root=VOC

VOC is the folder with VOCdevkit/, or what launch/prepare.py made of it.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is the known fraction, 0.1 by default."""
    config = common.trm_ml(common.openai_clip(common.voc(common.base(), year="2007"), "RN101"))
    config.data.update({
        "image_size": 448, "batch_size": 128, "augment": "tai",
        "known_fraction": float(arg or 0.1),
    })
    config.train.update({"epochs": 40, "eval_every": 39, "checkpoint_every": 390})  # 39: an epoch
    return config

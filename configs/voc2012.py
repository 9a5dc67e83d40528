"""TRM-ML on Pascal VOC 2012 with a single positive label per image (Table 2): CLIP RN50 at 448.

python launch/train.py --config=configs/voc2012.py --workdir=runs/voc2012 --config.data.root=VOC

VOC is the folder with VOCdevkit/, or what launch/prepare.py made of it. Trained on LargeLoss's 80 %
of `train`, tested on `val`.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is the known fraction of all labels of `train`; "": LargeLoss's single positives."""
    config = common.trm_ml(common.openai_clip(common.voc(common.base(), year="2012"), "RN50"))
    config.data.update({
        "image_size": 448, "batch_size": 128, "augment": "tai",
        "label_protocol": "single_positive_largeloss",
    })
    config.train.update({"epochs": 40, "eval_every": 35, "checkpoint_every": 350})  # 35: an epoch
    if arg:
        config.data.update({"label_protocol": "hash", "known_fraction": float(arg)})
        config.train.update({"eval_every": 44, "checkpoint_every": 440})
    return config

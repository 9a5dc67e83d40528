"""TRM-ML on Pascal VOC 2012 with a single positive label per image (Table 2): CLIP RN50 at 448.

python launch/train.py --config=configs/voc2012.py --workdir=runs/voc2012 --config.data.root=VOC

VOC is the folder with VOCdevkit/, or what launch/prepare.py made of it. Trained on `train`, tested
on `val`.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is the known fraction of labels; "" knows one positive per image, LargeLoss's draw."""
    config = common.trm_ml(common.openai_clip(common.voc(common.base(), year="2012"), "RN50"))
    config.data.update({
        "image_size": 448, "batch_size": 128, "augment": "tai",
        "label_protocol": "single_positive_largeloss",
    })
    if arg:
        config.data.update({"label_protocol": "hash", "known_fraction": float(arg)})
    config.train.update({"epochs": 40, "eval_every": 44, "checkpoint_every": 440})  # 44: an epoch
    return config

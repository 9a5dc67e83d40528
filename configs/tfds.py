"""TRM-ML on a multi-label dataset that TFDS prepared as ArrayRecord, with OpenAI's CLIP RN101.

python launch/train.py --config=configs/tfds.py:voc/2007 --workdir=runs/tfds \
    --config.data.root=TFDS_DATA_DIR
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is TFDS's name of the dataset, "voc/2007" by default, or NAME,KNOWN_FRACTION."""
    name, _, fraction = arg.partition(",")
    config = common.trm_ml(common.openai_clip(common.base(), "RN101"))
    config.data.update({
        "dataset": "tfds", "image_size": 448, "batch_size": 128, "augment": "tai",
        "known_fraction": float(fraction or 0.1),
    })
    config.data.options.update({
        "name": name or "voc/2007", "train_split": "", "test_split": "", "difficult": "negative",
        "keep_empty": False, "allow_empty_classes": False,
    })
    return config

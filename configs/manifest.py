"""TRM-ML on your own photos: a CSV or JSONL with image paths, positives and negatives.

python launch/train.py --config=configs/manifest.py --workdir=runs/mine \
    --config.data.root=labels.csv
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is data.root, the manifest."""
    config = common.trm_ml(common.openai_clip(common.base(), "RN101"))
    config.data.update({
        "dataset": "manifest", "root": arg, "image_size": 448, "batch_size": 32,
        "augment": "tai", "label_protocol": "full", "known_fraction": 1.0,
    })
    config.data.options.update({
        "test": "", "classes": "", "images": "", "unlisted": "unknown",
        "allow_empty_classes": False,
    })
    return config

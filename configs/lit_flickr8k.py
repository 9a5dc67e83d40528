"""Locked-image tuning on precomputed region features: a projection head and a text tower, InfoNCE.

python launch/train.py --config=configs/lit_flickr8k.py --workdir=runs/lit_flickr8k \
    --config.data.root=PATH/TO/flickr8k_precomp
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is data.root, the folder of {split}_ims.npy, _caps.txt and _ids.txt."""
    config = common.base()
    config.method = "contrastive"
    config.model.clip = common.clip_features(width=96)
    config.model.tokenizer = "words"
    config.model.options.dense_weight = 0.0  # 1.0: dense features that find objects better
    config.data.update({
        "dataset": "flickr8k_features", "root": arg, "text_length": 24, "batch_size": 128,
    })
    config.optimizer.update({
        "learning_rate": 1e-3, "weight_decay": 0.1, "decay": ("kernel$", "embedding$"), "clip": 1.0,
    })
    config.train.update({"epochs": 15, "log_every": 46, "eval_every": 230})
    config.evaluate.update({"kinds": ("retrieval",), "batch_size": 200})
    return config

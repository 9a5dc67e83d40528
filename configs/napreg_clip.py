"""NAPReg on two towers: a CLIP fine-tuned on Flickr8k's photos, both sides drawn to the nouns.

python launch/train.py --config=configs/napreg_clip.py --workdir=runs/napreg_clip \
    --config.data.root=PATH/TO/flickr8k

Fetches OpenAI's ViT-B/32 unless --config.model.pretrained names a file. The supplement of NAPReg
proposes this (section 6) without numbers; the settings are this project's.
"""

from configs import common, common_napreg


def get_config(arg: str = ""):
    """`arg` is data.root, a folder in the layout of Flickr8k."""
    config = common_napreg.retrieval()
    common.openai_clip(config, "ViT-B/32")
    config.data.update({
        "dataset": "flickr8k", "root": arg, "image_size": 224, "text_length": 77,
        "length_buckets": (24, 40, 77), "batch_size": 256, "augment": "flip_crop",
    })
    config.loss.update({"pair": "infonce", "temperature": 0.01})
    config.optimizer.update({
        "learning_rate": 1e-5, "schedule": "cosine", "drop_epochs": (), "warmup_epochs": 0.5,
        "weight_decay": 0.1, "decay": ("kernel$",), "clip": 1.0, "factors": (("^proxies", 100.0),),
    })
    config.train.epochs = 5
    config.evaluate.update({"kinds": ("retrieval",), "batch_size": 128})
    return config

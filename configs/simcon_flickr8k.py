"""Two small towers from nothing on the 6,000 photos of Flickr8k, whose captions may not match.

python launch/train.py --config=configs/simcon_flickr8k.py:mv_simcon --workdir=runs/flickr8k \
    --config.data.root=PATH/TO/flickr8k --config.data.caption_shuffle=0.3
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is the loss: mv_simcon (default), simcon or infonce; LOSS,FOLDER sets data.root too."""
    name, _, root = arg.partition(",")
    config = common.simcon(common.base(), name or "mv_simcon")
    config.model.clip = common.clip_glyphs()
    config.model.clip.image.image_size = 64
    config.model.tokenizer = "words"
    config.data.update({
        "dataset": "flickr8k", "root": root, "image_size": 64, "text_length": 24,
        "batch_size": 128, "augment": "flip_crop",
    })
    config.loss.update(common.SHORT_RUN)
    config.optimizer.update({
        "learning_rate": 1e-3, "schedule": "cosine", "warmup_epochs": 1.0, "weight_decay": 0.1,
        "b2": 0.98, "decay": ("kernel$", "embedding$"), "clip": 1.0,
    })
    config.train.update({"epochs": 20, "log_every": 46, "eval_every": 230})
    config.evaluate.update({"kinds": ("retrieval",), "batch_size": 200})
    return config

"""MASK small enough for a CPU: 80 words from boxes of COCO, matched with captions of Flickr8k.

python launch/train.py --config=configs/mask_coco_subset.py --workdir=runs/mask_coco_subset \
    --config.data.root=REGIONS.npz --config.data.test_root=FLICKR8K_PRECOMP \
    --config.words.vectors=GLOVE.txt
"""

from configs import common_mask


def get_config(arg: str = ""):
    """`arg` is data.root,data.test_root,words.vectors or empty."""
    root, _, rest = arg.partition(",")
    test_root, _, vectors = rest.partition(",")
    config = common_mask.mask("labelled_regions", root, vectors)
    config.data.update({"test_dataset": "flickr8k_features", "test_root": test_root})
    config.data.test_options.captions_per_image = 5
    config.data.options.update({"min_count": 1, "box_format": "xywh"})
    config.data.batch_size = 64
    config.rows.samples = 36
    config.model.knowledge.width = 256
    config.train.update({"epochs": 40, "log_every": 40, "eval_every": 400})
    return config

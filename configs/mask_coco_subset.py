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
    # Chosen on Flickr8k's dev split. Boxes of objects and the cells of a grid that they are matched
    # with have other neighbours, so regions stand alone; of 80 words most others have no neighbour.
    config.data.batch_size = 512
    config.rows.attention_set = "region"
    config.words.unknown = "drop"
    config.loss.kl_weight = 0.01
    config.optimizer.learning_rate = 1e-3
    config.model.knowledge.width = 256
    config.train.update({"epochs": 80, "log_every": 30, "eval_every": 120})
    return config

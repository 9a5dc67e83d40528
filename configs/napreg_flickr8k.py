"""SCAN with NAPReg on weak grid features of Flickr8k, small enough for two CPU cores.

python launch/train.py --config=configs/napreg_flickr8k.py:scan --workdir=runs/napreg_flickr8k \
    --config.data.root=PATH/TO/flickr8k_precomp
"""

from configs import common_napreg


def get_config(arg: str = ""):
    """`arg` is MODEL or MODEL,data.root; MODEL is scan, sgr, saf or naaf."""
    model, _, root = arg.partition(",")
    model = model or "scan"
    if model in ("sgr", "saf"):
        config = common_napreg.sgraf(model, root, epochs=10)
        config.model.matching.scorer.sim_dim = 64
    else:
        config = common_napreg.napreg(model, root)
    config.model.matching.update({"embed_dim": 256, "image": {"width": 96, "regions": 36}})
    config.data.batch_size = 64
    config.optimizer.update({"learning_rate": 5e-4, "drop_epochs": (5,)})
    config.train.update({"epochs": 10, "eval_every": 2340, "checkpoint_every": 468})
    return config

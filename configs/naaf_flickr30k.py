"""NAAF with NAPReg on Flickr30k's bottom-up regions: words that match, and words that do not.

python launch/train.py --config=configs/naaf_flickr30k.py --workdir=runs/naaf_flickr30k \
    --config.data.root=PATH/TO/f30k_precomp
"""

from configs import common_napreg


def get_config(arg: str = ""):
    """`arg` is data.root, the folder of {split}_ims.npy and {split}_caps.txt."""
    config = common_napreg.napreg("naaf", arg)
    config.optimizer.update({"learning_rate": 5e-4, "drop_epochs": (10,)})
    config.train.epochs = 20
    return config

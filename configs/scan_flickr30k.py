"""SCAN with NAPReg on Flickr30k's bottom-up regions: cross-modal retrieval.

python launch/train.py --config=configs/scan_flickr30k.py --workdir=runs/scan_flickr30k \
    --config.data.root=PATH/TO/f30k_precomp

--config.model.matching.text.weights=glove.6B.300d.txt starts the words from GloVe.
"""

from configs import common_napreg


def get_config(arg: str = ""):
    """`arg` is data.root, the folder of {split}_ims.npy and {split}_caps.txt."""
    config = common_napreg.napreg("scan", arg)
    config.train.epochs = 30
    config.optimizer.drop_epochs = (15,)
    return config

"""SGRAF with NAPReg on MS-COCO's bottom-up regions: its SGR half, or SAF; see sgraf_flickr30k.py.

python launch/train.py --config=configs/sgraf_coco.py:sgr --workdir=runs/sgr_coco \
    --config.data.root=PATH/TO/coco_precomp
"""

from configs import common_napreg


def get_config(arg: str = ""):
    """`arg` is MODULE or MODULE,data.root; MODULE is sgr or saf."""
    module, _, root = arg.partition(",")
    config = common_napreg.sgraf(module or "sgr", root, epochs=20)
    config.optimizer.drop_epochs = (10,)
    config.evaluate.folds = 5
    return config

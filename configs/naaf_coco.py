"""NAAF with NAPReg on MS-COCO's bottom-up regions; evaluated as the mean of five folds (COCO-1K).

python launch/train.py --config=configs/naaf_coco.py --workdir=runs/naaf_coco \
    --config.data.root=PATH/TO/coco_precomp
"""

from configs import common_napreg


def get_config(arg: str = ""):
    """`arg` is data.root, the folder of {split}_ims.npy and {split}_caps.txt."""
    config = common_napreg.napreg("naaf", arg)
    config.optimizer.update({"learning_rate": 5e-4, "drop_epochs": (10,)})
    config.train.epochs = 20
    config.evaluate.folds = 5
    return config

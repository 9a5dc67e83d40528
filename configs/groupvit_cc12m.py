"""GroupViT on CC12M by any of the losses.

python launch/train.py --config=configs/groupvit_cc12m.py:mv_simcon --workdir=runs/groupvit_cc12m \
    --config.data.root=PATH/TO/cc12m --config.data.test_root=PATH/TO/VOCdevkit

`data.root` is the folder of the tar shards. VOC 2012 is evaluated at the end.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is the loss: mv_simcon (default), simcon or infonce; LOSS,FOLDER also sets the root."""
    return common.groupvit(arg)

"""GroupViT on CC3M, CC12M and RedCaps12M together by any of the losses.

python launch/train.py --config=configs/groupvit_27m.py:mv_simcon --workdir=runs/groupvit_27m \
    --config.data.root=PATH --config.data.test_root=PATH/TO/VOCdevkit

`data.root` holds the folders cc3m, cc12m, redcaps12m of tar
shards. VOC 2012 is evaluated at the end.
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is the loss: mv_simcon (default), simcon or infonce; LOSS,FOLDER also sets the root."""
    return common.groupvit(arg, parts=("cc3m", "cc12m", "redcaps12m"))

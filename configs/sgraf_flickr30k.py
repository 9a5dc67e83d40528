"""SGRAF with NAPReg on Flickr30k's bottom-up regions: its SGR half, or SAF.

python launch/train.py --config=configs/sgraf_flickr30k.py:sgr --workdir=runs/sgr \
    --config.data.root=PATH/TO/f30k_precomp
python launch/train.py --config=configs/sgraf_flickr30k.py:saf --workdir=runs/saf ...
python launch/evaluate.py --config=configs/sgraf_flickr30k.py:sgr --workdir=runs/sgr \
    --ensemble=runs/saf

Words by a BERT: --config.model.matching.text.kind=bert
--config.model.matching.text.weights=FOLDER (config.json, model.safetensors, vocab.txt).
"""

from configs import common_napreg


def get_config(arg: str = ""):
    """`arg` is MODULE or MODULE,data.root; MODULE is sgr or saf."""
    module, _, root = arg.partition(",")
    return common_napreg.sgraf(module or "sgr", root, epochs={"saf": 30}.get(module, 40))

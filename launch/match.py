"""Knowledge of words (MASK): built from a run, matched with captions, used to re-rank scores.

python launch/match.py build    --workdir=RUN --out=mask.safetensors        # its exact prototypes
python launch/match.py build    --workdir=RUN --raw --out=mack.safetensors  # of the raw features
python launch/match.py inspect  --knowledge=mask.safetensors --word=dog
python launch/match.py inspect  --knowledge=mask.safetensors --compare=mack.safetensors \\
    --groups='animals:dog,cat,horse;vehicles:car,bus,train' --out=prototypes.png
python launch/match.py merge    --knowledge=a.safetensors --other=b.safetensors --out=c.safetensors
python launch/match.py score    --workdir=RUN --knowledge=mask.safetensors --out=mask.npy
python launch/match.py score    --workdir=OTHER_RUN --out=base.npy          # SCAN, two towers ...
python launch/match.py rerank   --base=base.npy --other=mask.npy --alpha=0.15 --out=reranked.npz
python launch/match.py finetune --workdir=RUN --knowledge=mask.safetensors --steps=200 \\
    --out=tuned.safetensors
python launch/match.py draw     --workdir=RUN --knowledge=mask.safetensors --images=PHOTOS \\
    --base=base.npy --other=mask.npy --out=pictures

A score matrix is a .npy file, float [images, captions]; score writes whose captions they are beside
it (.json), for the recalls. --raw goes with a set built --raw; the images and captions are those
that the run is evaluated on, or --dataset, --root and --split; how words are matched is the run's
`words` section, or --set=unknown=drop.
"""

from typing import Any

import cli
from absl import flags

from trm_jax.train import match
from trm_jax.types import UserError

_FLAGS = {
    "workdir": "Folder of the run",
    "knowledge": "File of a knowledge",
    "other": "merge: another knowledge; rerank, draw: the scores that help",
    "compare": "inspect: a knowledge that is drawn beside it",
    "word": "inspect: whose neighbours are listed",
    "groups": "inspect: NAME:WORD,WORD;NAME:.. of the words that are drawn",
    "base": "rerank, draw: the scores that are re-ranked",
    "images": "draw: the folder of the photos",
    "dataset": "score, finetune, draw: a dataset with captions, default: the run's",
    "root": "score, finetune, draw: its folder",
    "out": "The file to write; draw: the folder",
}
for _name, _help in _FLAGS.items():
    flags.DEFINE_string(_name, "", _help)
flags.DEFINE_string("split", "test", "score, finetune, draw: of the dataset")
flags.DEFINE_multi_string("set", [], "score, finetune, draw: FIELD=VALUE of the `words` section")
flags.DEFINE_bool("raw", False, "The features themselves, without an encoder (MACK)")
flags.DEFINE_bool("random_regions", False, "score: in place of prototypes")
flags.DEFINE_bool("transform_regions", True, "score, draw: by the map of a fine-tuned knowledge")
flags.DEFINE_float("alpha", 0.15, "rerank, draw: weight of the scores that help", lower_bound=0.0)
flags.DEFINE_integer("top", 100, "rerank, draw: candidates of a query", lower_bound=1)
flags.DEFINE_integer(
    "captions_per_image", 0, "rerank: of each image, where no .json is beside --base", lower_bound=0
)
flags.DEFINE_integer("steps", 200, "finetune: updates", lower_bound=1)
flags.DEFINE_float("learning_rate", 1e-4, "finetune: Adam's", lower_bound=0.0)
flags.DEFINE_integer("seed", 0, "build: of the random regions; finetune: of the order")


def main(arguments: list[str]) -> None:
    """Runs one of the commands."""
    if len(arguments) != 1 or arguments[0] not in match.COMMANDS:
        given = " ".join(arguments) or "nothing"
        raise UserError(f"the command is {given!r}; it is one of {', '.join(match.COMMANDS)}")
    options: dict[str, Any] = {name: flags.FLAGS[name].value for name in match.Options._fields}
    match.COMMANDS[arguments[0]](match.Options(**options))


if __name__ == "__main__":
    cli.run(main)

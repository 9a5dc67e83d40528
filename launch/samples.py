"""Lists the training samples that a run has used: their ids, and how often each was visited.

python launch/samples.py --workdir=runs/cc12m --out=samples.tsv

Samples that could not be read are left out. Of a run under way or interrupted, the list is that of
its newest checkpoint.
"""

import os
from pathlib import Path

import cli
from absl import flags
from tqdm import tqdm

from trm_jax.data import used_samples
from trm_jax.data.caption_pairs import caption_owners
from trm_jax.data.examples import captioned
from trm_jax.train import datasets, workdirs
from trm_jax.train.checkpoints import Checkpoints
from trm_jax.types import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
_OUT = flags.DEFINE_string(
    "out", None, "File to write: a line ID<TAB>VISITS a sample", required=True
)


def main(arguments: list[str]) -> None:
    """Writes the list and says how long it is."""
    cli.no_arguments(arguments)
    folder, out = Path(_WORKDIR.value), Path(_OUT.value)
    config = workdirs.read_config(folder)
    report = workdirs.read_json(folder / "run.json")
    checkpoints = Checkpoints(folder, read_only=True)
    step = checkpoints.latest_step()
    checkpoints.close()
    if step is None or not report:
        raise UserError(f"{folder} holds no finished checkpoint; train first")
    train = datasets.open_data(config.data)[0]
    if len(train) != report["dataset"]["train"]:
        raise UserError(
            f"data.root gives {len(train):,} training samples, the run had "
            f"{report['dataset']['train']:,}; restore what it was started with"
        )
    # A run without a label mask learns from captions: one of each image, or all of them.
    has_labels = report["label_mask_sha256"] is not None
    indices = range(len(train)) if has_labels else captioned(train)
    if config.data.get("length_buckets", ()):
        indices = caption_owners(train)
    counts = used_samples.visits(len(indices), config.data.batch_size, seed=config.seed, steps=step)
    skipped = set(report["skipped_samples"])
    samples = used_samples.used_samples(train, indices, counts, skipped)
    number = 0
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for name, count in tqdm(samples, desc="samples", unit="sample", disable=None):
                file.write(used_samples.line(name, count))
                number += 1
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    print(
        f"{number:,} samples were used by step {step:,}, {len(skipped):,} could not be read: {out}"
    )


if __name__ == "__main__":
    cli.run(main)

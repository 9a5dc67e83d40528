"""Trains one config on a workdir; started again, it goes on where it stopped.

python launch/train.py --config=configs/demo.py --workdir=runs/demo [--config.a.b=value ...]

On several hosts the same command is started once on each; tpu_pod.sh, slurm.sbatch and
k8s_jobset.yaml do so.
"""

import cli
from absl import flags

from trm_jax.train import runner

cli.define_config()
cli.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)


def main(arguments: list[str]) -> None:
    """Runs the job of the flags."""
    cli.no_arguments(arguments)
    cli.join_processes()
    runner.train(flags.FLAGS.config, _WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)

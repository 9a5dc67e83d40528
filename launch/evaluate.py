"""Evaluates the newest checkpoint of a run with all its evaluators; writes WORKDIR/eval.json.

python launch/evaluate.py --config=configs/demo.py --workdir=runs/demo

Runs that score pairs can be joined with others: --ensemble=OTHER_WORKDIR, any number of times,
takes the mean of their scores and writes WORKDIR/ensemble.json.
"""

import cli
from absl import flags

from trm_jax.train import distributed, runner

cli.define_config()
cli.define_processes()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
_ENSEMBLE = flags.DEFINE_multi_string("ensemble", [], "Folder of a run to average scores with")


def main(arguments: list[str]) -> None:
    """Prints the metrics, one a line."""
    cli.no_arguments(arguments)
    cli.join_processes()
    values = runner.evaluate(flags.FLAGS.config, _WORKDIR.value, _ENSEMBLE.value)
    if distributed.is_first():
        for name, value in values.items():
            print(f"{name} {value:.4g}")


if __name__ == "__main__":
    cli.run(main)

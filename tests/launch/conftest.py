"""Launchers run inside this process: a start costs no import of jax."""

import runpy
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
from absl import flags

from tests import tiny
from trm_jax.train import sharding

ROOT = Path(__file__).parents[2]
CONFIG = "tests/launch/tiny_config.py"


class Result(NamedTuple):
    """What a launcher left."""

    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one line of an exit with code 2."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.out + self.err
        return lines[0]


def _launch(name: str, *words) -> int:
    """The exit code of a launcher, run on one device."""
    before, mesh = set(flags.FLAGS), tiny.mesh(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_: mesh)
        patch.setattr(sys, "path", [str(ROOT / "launch"), *sys.path])
        patch.setattr(sys, "argv", sys.argv)  # cli.run replaces it
        patch.chdir(ROOT)
        # Of ml_collections, which loads config files the old way.
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
        try:
            module = runpy.run_path(str(ROOT / "launch" / f"{name}.py"), run_name=f"launch_{name}")
            module["cli"].run(module["main"], [f"{name}.py", *map(str, words)])
            return 0
        except SystemExit as stop:
            return stop.code
        finally:
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)
            flags.FLAGS.unparse_flags()


@pytest.fixture
def launch(capsys):
    """launch("train", "--flag=value", ...) -> Result."""

    def call(name, *words):
        capsys.readouterr()
        code = _launch(name, *words)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A workdir that launch/train.py finished: TRM-ML on images, 6 steps."""
    workdir = tmp_path_factory.mktemp("trained")
    assert (
        _launch(
            "train",
            f"--config={CONFIG}",
            f"--workdir={workdir}",
            "--config.train.steps=6",
            "--config.data.augment=tai",
        )
        == 0
    )
    return workdir

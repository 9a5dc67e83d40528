"""Two real processes on this machine train, stop, resume and fail as one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests import precomputed, tiny

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--config=tests/launch/tiny_config.py:simcon",
    "--config.train.steps=5",
    "--config.train.log_every=1",
    "--config.train.eval_every=4",
    "--config.train.checkpoint_every=4",
)
# launch/train.py in a process that is asked to stop once it has done its second step.
SIGNALLED = """
import os, runpy, signal, sys
from trm_jax.train import metrics
advance, steps = metrics.MetricsWriter.advance, []
def signalled(self):
    advance(self)
    steps.append(1)
    if len(steps) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
metrics.MetricsWriter.advance = signalled
sys.argv = ["launch/train.py", *sys.argv[1:]]
sys.path.insert(0, "launch")
runpy.run_path("launch/train.py", run_name="__main__")
"""


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def _run(*commands):
    """[(exit code, stdout, stderr)] of one process for each list of words, run as one run."""
    port, started = _free_port(), []
    for index, words in enumerate(commands):
        variables = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(len(commands)),
            "JAX_PROCESS_ID": str(index),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        started.append(
            subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, **variables},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        ends = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *end) for p, end in zip(started, ends, strict=True)]


def _errors(text):
    """The lines of stderr that are ours."""
    return [line for line in text.splitlines() if line.startswith(("error: ", "stopped "))]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two processes that one of them, not the first, stopped; then it was resumed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    words = (*FLAGS, f"--workdir={folder}", "--start_timeout=60")
    stopped = _run(["launch/train.py", *words], ["-c", SIGNALLED, *words])
    assert [code for code, _, _ in stopped] == [75, 75], stopped
    # A vote of step 2 is known to all after step 3.
    for _, _, stderr in stopped:
        assert _errors(stderr) == ["stopped at step 3; checkpoint saved"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["3"]
    resumed = _run(*[["launch/train.py", *words]] * 2)
    assert [code for code, _, _ in resumed] == [0, 0], resumed
    assert "resuming from step 3 of 5" in resumed[0][1]
    spoken = [line for line in resumed[1][1].splitlines() if not line.startswith("[Gloo]")]
    assert spoken == [] and _errors(resumed[1][2]) == []
    return folder


def test_two_processes_give_the_numbers_of_one(workdir, tmp_path):
    config = tiny.simcon("simcon")
    config.train.update({"log_every": 1, "eval_every": 4})
    config.train.steps = 5
    tiny.run(tiny.build(config, tmp_path).job, tmp_path / "one", tiny.mesh(2))
    one, two = tiny.lines(tmp_path / "one"), tiny.lines(workdir)
    assert [(x["step"], x["split"]) for x in one] == [(x["step"], x["split"]) for x in two]
    assert len(one) == 5 + 2 + 1
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("loss", "grad_norm", "positives_image", "Rsum", "mIoU"):
            if name in mine:
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-6, err_msg=name)


def test_two_processes_score_pairs_as_one_does(tmp_path):
    # The halves of a batch have captions of other lengths: both must cut it to the same bucket.
    root, tagger = precomputed.write(tmp_path)
    fields = {"log_every": 1, "steps": 4, "eval_every": 4, "checkpoint_every": 4}
    flags = [f"--config.train.{name}={value}" for name, value in fields.items()]
    flags += [f"--config.data.root={root}", "--config.data.options.captions_per_image=2"]
    flags += [f"--config.nouns.tagger={tagger}", f"--workdir={tmp_path / 'two'}"]
    words = ("launch/train.py", "--config=tests/launch/tiny_config.py:scan", *flags)
    ends = _run(words, words)
    assert [code for code, _, _ in ends] == [0, 0], ends
    config = tiny.napreg("scan")
    config.train.update(fields)
    config.data.root, config.data.options.captions_per_image = str(root), 2
    config.nouns.tagger = str(tagger)
    tiny.run(tiny.build(config, tmp_path).job, tmp_path / "one", tiny.mesh(2))
    one, two = tiny.lines(tmp_path / "one"), tiny.lines(tmp_path / "two")
    assert len(one) == len(two) == 4 + 1 + 1
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("loss", "loss_nouns", "grad_norm", "score_hardest", "Rsum"):
            if name in mine:
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, err_msg=name)


def test_another_config_on_one_process_ends_both(workdir):
    words = ("launch/train.py", *FLAGS, f"--workdir={workdir}")
    ends = _run(words, (*words, "--config.train.keep=3"))
    assert [code for code, _, _ in ends] == [2, 2], ends
    there, here = (_errors(stderr) for _, _, stderr in ends)
    assert len(there) == len(here) == 1
    assert "process 0 has a config of its own: train.keep (3 here, 2 there)" in here[0]
    host = socket.gethostname()
    assert there[0] == here[0].replace("error: ", f"error: process 1 on {host} stopped: ")


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sbatch"])
def test_scripts_parse(name):
    subprocess.run(["bash", "-n", ROOT / "launch" / name], check=True)


def test_the_jobset_counts_its_pods_once():
    (body,) = yaml.safe_load_all((ROOT / "launch" / "k8s_jobset.yaml").read_text())
    (job,) = body["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert str(spec["parallelism"]) == str(spec["completions"]) == values["JAX_NUM_PROCESSES"]
    run = body["metadata"]["name"]
    assert values["JAX_COORDINATOR_ADDRESS"].startswith(f"{run}-{job['name']}-0-0.{run}:")

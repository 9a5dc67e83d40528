"""The notebook of MASK runs from its first cell to its last, on a run of a few steps."""

import pytest

from tests.notebooks.executed import execute

TINY = {
    "data.options.texts": 100,
    "data.train_size": 60,
    "data.test_size": 12,
    "data.image_size": 64,
    "data.batch_size": 16,
    "evaluate.batch_size": 12,
    "words.width": 8,
    "model.knowledge.width": 16,
    "train.epochs": 1,
    "train.log_every": 2,
    "train.eval_every": 0,
}


# The warnings of Jupyter's client are not this package's.
@pytest.mark.filterwarnings("default")
def test_runs_and_shows_its_pictures(tmp_path):
    """Every cell runs; the run's own prototypes have its recalls; pictures are inline."""
    text, final = execute("inspect_knowledge.ipynb", tmp_path / "run", TINY)
    assert f"final Rsum: {final['Rsum']}" in text
    ways = [
        line for line in text.splitlines() if line.startswith(("MACK ", "MASK ")) and "R@" in line
    ]
    assert [line.split()[:2] for line in ways] == [
        [name, unknown] for name in ("MACK", "MASK") for unknown in ("interpolate", "drop")
    ]
    assert float(ways[2].rpartition("Rsum ")[2]) == pytest.approx(final["Rsum"], abs=0.1)
    assert " by prototypes: " in text
    files = sorted((tmp_path / "run" / "pictures").glob("*.png"))
    assert [file.stem for file in files] == ["prototypes", "words_1", "words_2"]
    assert (tmp_path / "run" / "mack.safetensors").is_file()

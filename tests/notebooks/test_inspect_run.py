"""The notebook of TRM-ML runs from its first cell to its last, on a run of a few steps."""

import pytest

from tests.notebooks.executed import execute

TINY = {
    "model.pretrained": "random",  # the pictures need no good model
    "model.clip.text.layers": 1,
    "prompts.length": 4,
    "data.image_size": 64,
    "data.train_size": 64,
    "data.test_size": 32,
    "data.known_fraction": 0.5,
    "data.batch_size": 32,
    "evaluate.batch_size": 32,
    "evaluate.pictures": 0,  # the notebook makes its own
    "memory.stage_one_epochs": 1.0,
    "train.epochs": 3,
    "train.log_every": 2,
    "train.eval_every": 0,
}


# The warnings of Jupyter's client are not this package's.
@pytest.mark.filterwarnings("default")
def test_runs_and_shows_its_pictures(tmp_path):
    """Every cell runs; the printed mAP is the run's; pictures are inline."""
    text, final = execute("inspect_run.ipynb", tmp_path / "run", TINY)
    assert f"final mAP: {final['mAP']}" in text
    assert final["step"] == 6
    files = sorted((tmp_path / "run" / "pictures").glob("*.png"))
    assert [file.stem for file in files] == [
        "curves", "prototypes", "regions_0", "regions_1", "regions_2", "thresholds"
    ]  # fmt: skip

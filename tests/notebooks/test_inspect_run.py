"""The notebook runs from its first cell to its last, on a run of a few steps."""

import base64
import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
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
    workdir = tmp_path / "run"
    environment = os.environ | {
        "TRM_NOTEBOOK_WORKDIR": str(workdir),
        "TRM_NOTEBOOK_OVERRIDES": json.dumps(TINY),
        "XLA_FLAGS": "",  # one device compiles faster than the eight of these tests
    }
    book = nbformat.read(ROOT / "notebooks" / "inspect_run.ipynb", as_version=4)
    client = NotebookClient(book, timeout=300, kernel_name="python3")
    client.resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    client.execute(env=environment)

    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    final = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"final mAP: {final['mAP']}" in text
    assert final["step"] == 6

    shown = [
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    files = sorted((workdir / "pictures").glob("*.png"))
    assert sorted(map(base64.b64decode, shown)) == sorted(file.read_bytes() for file in files)
    assert [file.stem for file in files] == [
        "curves", "prototypes", "regions_0", "regions_1", "regions_2", "thresholds"
    ]  # fmt: skip

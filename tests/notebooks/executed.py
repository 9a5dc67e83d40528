"""A notebook, executed as a user would, on a run of a few steps."""

import base64
import json
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def execute(name, workdir, overrides):
    """(what it printed, the last line of the run's metrics); its pictures are those of the run."""
    environment = os.environ | {
        "TRM_NOTEBOOK_WORKDIR": str(workdir),
        "TRM_NOTEBOOK_OVERRIDES": json.dumps(overrides),
        "XLA_FLAGS": "",  # one device compiles faster than the eight of these tests
    }
    book = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    client = NotebookClient(book, timeout=300, kernel_name="python3")
    client.resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    client.execute(env=environment)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    shown = [
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    files = (workdir / "pictures").glob("*.png")
    assert sorted(map(base64.b64decode, shown)) == sorted(file.read_bytes() for file in files)
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return text, json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])

"""What the tests of several benchmarks ask of results."""

import json
from typing import Any

import pytest

from benchmarks import measurements


def row_of(file, name, metric, **condition):
    """The one row of a results file; of no recipe, if none is asked for."""
    found = [
        row
        for row in file["rows"]
        if (row["name"], row["metric"]) == (name, metric)
        and condition.items() <= row["condition"].items()
        and ("recipe" in condition or "recipe" not in row["condition"])
    ]
    (row,) = found
    return row


def goes_on_where_it_stopped(benchmark, tasks, make_row, path, monkeypatch, *, message):
    """Runs two tasks of which the second fails at first; returns the text of the page.

    make_row: task -> its row, whose name says which task it is of. message: of the failure.
    """
    calls, names = [], [make_row(task)["name"] for task in tasks]
    broken = {names[1]}

    def measure(of, task):
        assert of is benchmark
        row = make_row(task)
        if row["name"] in broken:
            return [], "exit code 1"
        calls.append(task)
        return [row | {"device": "cpu", "load": 0.1}], ""

    monkeypatch.setattr(measurements, "measure", measure)
    options: dict[str, Any] = {"again": False, "backend": "cpu", "device": "cpu"}
    with pytest.raises(RuntimeError, match=f"1 measurements failed: {message} .*exit code 1"):
        measurements.run(benchmark, tasks, path, **options)
    assert json.loads(path.read_text())["partial"] is True
    broken.clear()
    measurements.run(benchmark, tasks, path, **options)
    body = json.loads(path.read_text())
    assert calls == tasks and "partial" not in body
    assert [row["name"] for row in body["rows"]] == names
    measurements.run(benchmark, tasks, path, **options | {"again": True})
    assert calls == tasks * 2
    return path.with_suffix(".md").read_text()

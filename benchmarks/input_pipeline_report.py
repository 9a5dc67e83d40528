"""The plan, the figures and the table of benchmarks/input_pipeline.py."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from trm_jax.types import UserError

METHODS = Path(__file__).with_name("input_pipeline_methods.py")
PEERS = ("torch DataLoader", "cv2", "cv2, antialiased")
UNITS = {"images_per_s_per_core": "images/CPU-s", "images_per_s": "images/s"}


def plan(sizes: Sequence[int], recipes: Sequence[str], workers: Sequence[int]) -> list[dict]:
    """The measurements of one round; peers stand beside each other."""
    tasks = []
    for size in sizes:
        bare = {"image_size": size, "augment": "none", "workers": 0}
        tasks += [{"name": name, **bare} for name in ("cv2", "cv2, antialiased")]
        for augment in recipes:
            for count in workers:
                condition = {"image_size": size, "augment": augment, "workers": count}
                tasks += [{"name": name, **condition} for name in ("trm_jax", "torch DataLoader")]
    return tasks


def describe(task: Mapping[str, Any]) -> str:
    """One measurement in words."""
    return f"{task['name']}, {task['image_size']} px, {task['augment']}, workers {task['workers']}"


def rows(tasks: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Rows of the results file: each figure once, or once for each peer it is compared with."""
    speeds: dict[tuple[str, str], dict[int, float]] = {}
    for one in measured:
        for metric in UNITS:
            seconds = one["cpu_seconds" if metric.endswith("core") else "wall_seconds"]
            values = speeds.setdefault((describe(one), metric), {})
            values[one["round"]] = one["images"] / seconds
    result = []
    for task in tasks:
        condition = {"source": "coco", **{k: v for k, v in task.items() if k != "name"}}
        for metric, unit in UNITS.items():
            own = speeds[describe(task), metric]
            row = harness.make_row(task["name"], condition, metric, dict(own), unit, None)
            row["rounds"] = row.pop("seeds")
            row["median"] = round(statistics.median(own.values()), 2)
            peers = [
                (name, speeds.get((describe({**task, "name": name}), metric))) for name in PEERS
            ]
            compared = [
                {
                    **row,
                    "ratio": round(statistics.median(own[n] / theirs[n] for n in own), 3),
                    "against": name,
                }
                for name, theirs in peers
                if theirs and task["name"] == "trm_jax"
            ]
            result += compared or [row]
    return result


def page(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; medians, and from the lowest to the highest round."""
    lines = [
        "# input_pipeline",
        "",
        "Made by `benchmarks/input_pipeline.py`. Images per second of CPU time, median over the "
        "rounds (lowest to highest); ratios are medians of quotients within a round.",
        "",
        "| pixels | recipe | workers | method | images/s/core | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        if row["metric"] != "images_per_s_per_core":
            continue
        c, values = row["condition"], row["values"].values()
        ratio = f"{row['ratio']:.2f} x {row['against']}" if "against" in row else ""
        lines.append(
            f"| {c['image_size']} | {c['augment']} | {c['workers']} | {row['name']} | "
            f"{row['median']:.0f} ({min(values):.0f} to {max(values):.0f}) | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """Of a fresh process; UserError with its last words if it fails."""
    command = [sys.executable, str(METHODS), json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{describe(task)}: {last}")
    return json.loads(done.stdout.splitlines()[-1])

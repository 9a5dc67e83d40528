"""The tables of benchmarks/scoring.py."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_HEAD = """# scoring

Made by `benchmarks/scoring.py`: scores of all pairs of images and captions beside a PyTorch loop
over captions, with the same weights, regions and words. "times" is how many times as fast ours is,
the median over the rounds; figures in brackets are the lowest and the highest. CPU seconds are
those that cores worked for the process, in user and system code. "load" is the load average before
the measurement: where it is above the number of threads, others worked on the same cores, and the
times by the clock measure them, too.
"""
_EVALUATION = """## Evaluation

"of matmul" is the share of the rate of a large float32 product in the same process: the FLOPs that
the scores cannot do without (`flop` in `scoring_programs.py`; words that pad captions do not count)
in our seconds. "padding" is how many tokens a real one comes with. Blocks that were timed are in
the JSON file's conditions ("timed").
"""
_TRAINING = """## Training: scores of a batch and their gradients
"""
_EQUAL = """## Agreement

The greatest difference of two scores, beside the range of all scores, and that of two entries of
the words' gradient (without its part along the word, which an encoder's norm takes away), beside
the greatest entry.
"""
_MEMORY = """## Temporaries of the compiled programs, MB

Of a batch of images and as many captions, by `model.options.block` (0: all captions at once).
"""


def page(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    parts = [_HEAD]
    for title, table in (
        (_EVALUATION, _speeds(rows, "evaluation")),
        (_TRAINING, _speeds(rows, "training")),
        (_EQUAL, _differences(rows)),
        (_MEMORY, _memory(rows)),
    ):
        if len(table) > 2:
            parts.append("\n".join([title, *table]) + "\n")
    return "\n".join(parts)


def _speeds(rows: Sequence[Row], part: str) -> list[str]:
    last = ["of matmul"] if part == "evaluation" else []
    head = [
        "device", "threads", "images x captions", "width", "block", "", "pairs/s", "PyTorch",
        "times", "seconds", "PyTorch", "CPU s", "PyTorch", "times", "padding", *last, "load",
    ]  # fmt: skip
    lines = [_line(head), "|---" * len(head) + "|"]
    for found in _grouped(rows, part, ("pairs_per_s", "seconds", "cpu_seconds", "gflop_per_s")):
        ours, theirs = found["ours"], found["theirs"]
        speed, c = ours["pairs_per_s"], ours["pairs_per_s"]["condition"]
        share = [f"{ours['gflop_per_s']['ratio']:.2f}"] if part == "evaluation" else []
        cells = [
            speed["device"],
            c["threads"] or "",
            c["size"],
            c["width"],
            c["block"],
            speed["name"],
            _spread(speed),
            _spread(theirs["pairs_per_s"]),
            f"**{speed['ratio']:.2f}**",
            *(f"{side['seconds']['median']:.4g}" for side in (ours, theirs)),
            *(f"{side['cpu_seconds']['median']:.4g}" for side in (ours, theirs)),
            f"{ours['cpu_seconds']['ratio']:.2f}",
            f"{ours['padding']['mean']:.2f}",
            *share,
            speed["load"],
        ]
        lines.append(_line(cells))
    return lines


def _grouped(rows: Sequence[Row], part: str, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """{"ours", "theirs"}: metric -> row, for each measurement and size."""
    found: dict[tuple, dict[str, dict[str, Row]]] = {}
    for row in rows:
        size = row["condition"].get("size")
        if row["part"] == part and size and row["metric"] in (*metrics, "padding"):
            sides = found.setdefault((row["task"], size), {"ours": {}, "theirs": {}})
            side = "theirs" if row["name"].endswith("PyTorch") else "ours"
            sides[side][row["metric"]] = row
    return list(found.values())


def _spread(row: Row) -> str:
    values = row["values"].values()
    text = f"{row['median']:.4g}"
    return text + f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else text


def _differences(rows: Sequence[Row]) -> list[str]:
    columns = ("max_difference", "score_range", "gradient_difference")
    head = ["device", "threads", "width", "part", "", "scores", "range", "gradient"]
    lines = [_line(head), "|---" * len(head) + "|"]
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["metric"] in columns:
            c = row["condition"]
            key = row["device"], c["threads"] or "", c["width"], row["part"], row["name"]
            found.setdefault((row["task"], *key), {})[row["metric"]] = row["mean"]
    for (_, *key), values in found.items():
        cells = [f"{values[name]:.2g}" if name in values else "" for name in columns]
        lines.append(_line([*key, *cells]))
    return lines


def _memory(rows: Sequence[Row]) -> list[str]:
    chosen = [row for row in rows if row["part"] == "memory"]
    blocks = list(dict.fromkeys(row["condition"]["block"] for row in chosen))
    head = ["device", "images x captions", "tokens", "width", "", "program", *blocks]
    lines = [_line(head), "|---" * len(head) + "|"]
    found: dict[tuple, dict[int, float]] = {}
    for row in chosen:
        c, program = row["condition"], row["metric"].removesuffix("_mb")
        key = row["device"], c["size"], c["length"], c["width"], row["name"], program
        found.setdefault(key, {})[c["block"]] = row["mean"]
    for key, values in found.items():
        cells = [f"{values[block]:.4g}" if block in values else "" for block in blocks]
        lines.append(_line([*key, *cells]))
    return lines


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"

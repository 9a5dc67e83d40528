"""The tables of benchmarks/matching.py."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
# MASK, Table 14: seconds of a query and millions of parameters, the detector's 42.5 included for
# MACK and MASK.
PAPER = {
    "CLIP": (0.08, 291.0),
    "ALBEF": (0.29, 209.5),
    "MACK": (0.03, 42.5),
    "MASK": (0.04, 50.6),
}
_HEAD = """# matching

Made by `benchmarks/matching.py`: scores of all pairs of images and captions by prototypes of words
(`evaluate.knowledge_matching.score_all`) beside the same algorithm in NumPy and a PyTorch loop over
images. Figures in brackets are the lowest and the highest. "load" is the load average before the
measurement: where it is above the number of threads, others worked on the same cores.
"""
_SPEED = """## All pairs

"times" is how many times as long the others take, the median over the rounds. CPU seconds are those
that cores worked for the process. PyTorch is scaled from the images in "timed". "apart" is the
greatest difference of a score from ours, on these images.
"""
_MEMORY = """## Peak memory

How far a process rises above its inputs and the result in its first run, which compiles.
"""
_QUERY = """## A single query

From an image's features, or a caption's text, to the best ten of the other side; a detector is not
part of it. "first" is the first query, which compiles; a caption with another number of different
words compiles again. The lines with a colon are parts of the line above.
"""
_SIZE = """## Model size (Table 14)
"""


def page(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    parts = [_HEAD]
    for title, table in (
        (_SPEED, _speeds(rows)),
        (_MEMORY, _memory(rows)),
        (_QUERY, _queries(rows)),
        (_SIZE, _sizes(rows)),
    ):
        if len(table) > 2:
            parts.append("\n".join([title, *table]) + "\n")
    return "\n".join([*parts, *_paper()])


def _of(rows: Sequence[Row], part: str) -> dict[tuple[str, str], dict[str, Row]]:
    """(task, name) -> metric -> row, of one part."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["part"] == part:
            found.setdefault((row["task"], row["name"]), {})[row["metric"]] = row
    return found


def _speeds(rows: Sequence[Row]) -> list[str]:
    head = [
        "device", "threads", "images x captions", "regions", "width", "distinct words", "",
        "pairs/s", "seconds", "CPU s", "times", "timed", "apart", "load",
    ]  # fmt: skip
    lines = [_line(head), "|---" * len(head) + "|"]
    found = _of(rows, "speed")
    tasks = list(dict.fromkeys(task for task, _ in found))
    # Rows of ours come behind the differences of others.
    for task, name in sorted(found, key=lambda key: (tasks.index(key[0]), key[1] != "ours")):
        of = found[task, name]
        speed = of["pairs_per_s"]
        c, apart = speed["condition"], of.get("max_difference")
        cells = [
            speed["device"],
            c["threads"] or "",
            c["size"],
            c["regions"],
            c["width"],
            c["distinct_words"],
            name,
            _spread(speed),
            f"{of['seconds']['median']:.4g}",
            f"{of['cpu_seconds']['median']:.4g}",
            f"**{speed['ratio']:.2f}**" if "ratio" in speed else "",
            c["timed_images"],
            f"{apart['mean']:.1e}" if apart else "",
            speed["load"],
        ]
        lines.append(_line(cells))
    return lines


def _memory(rows: Sequence[Row]) -> list[str]:
    head = ["device", "threads", "images x captions", "", "peak, MB", "inputs, MB", "result, MB"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for (_, name), of in _of(rows, "memory").items():
        row = of["peak_mb"]
        c = row["condition"]
        cells = [row["device"], c["threads"] or "", c["size"], name, f"{row['mean']:.4g}"]
        lines.append(_line([*cells, c["inputs_mb"], c["result_mb"]]))
    return lines


def _queries(rows: Sequence[Row]) -> list[str]:
    head = ["device", "threads", "images x captions", "", "seconds", "first, s", "load"]
    lines = [_line(head), "|---" * len(head) + "|"]
    for (_, name), of in _of(rows, "query").items():
        row = of["seconds"]
        c = row["condition"]
        cells = [row["device"], c["threads"] or "", c["size"], name, _spread(row)]
        first = f"{of['first']['mean']:.3g}" if "first" in of else ""
        lines.append(_line([*cells, first, row["load"]]))
    return lines


def _sizes(rows: Sequence[Row]) -> list[str]:
    lines = [_line(["", "millions of numbers"]), "|---|---:|"]
    for (_, name), of in _of(rows, "size").items():
        lines.append(_line([name, f"{of['millions']['mean']:.2f}"]))
    return lines


def _paper() -> list[str]:
    lines = [
        "The paper's Table 14, on an NVIDIA L40; MACK's and MASK's hold a detector of 42.5 "
        "million parameters:\n",
        _line(["", "seconds of a query", "millions of parameters"]),
        "|---|---:|---:|",
    ]
    return ["\n".join([*lines, *(_line([name, *cells]) for name, cells in PAPER.items())]) + "\n"]


def _spread(row: Row) -> str:
    values = row["values"].values()
    text = f"{row['median']:.4g}"
    return text + f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else text


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"

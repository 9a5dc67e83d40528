"""The tables of benchmarks/simcon_loss.py."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_KINDS = ("all-gather", "collective-permute", "all-reduce", "reduce-scatter")
_HEAD = """# simcon_loss

Made by `benchmarks/simcon_loss.py`: loss and gradient of streaming SimCon. A ratio says how many
times as long as another side of the same run it takes, the median over the rounds.
"""
_TIME = """## Seconds

"limit" is the time of the products of tiles that the loss cannot do without, at the rate at which
this device multiplies such tiles: 4, 8 and 14 units of 2 B^2 d FLOPs for InfoNCE, SimCon and
MV-SimCon.
"""
_MEMORY = """## Temporaries of the compiled program, MB
"""
_DEVICES = """## Per device of several

FLOPs are those of the tiles' products, counted in the jaxpr, whose scans state their length, and
equal to the plan. Sent bytes are those of the collectives in the compiled text, each times the trip
count of the loops that it stands in. Temporaries are those that grow with the batch and those of
the tiles, by a straight line through B and 2 B. Bytes accessed are XLA's of the program, whose
loops it counts once, and of the two passes' tiles for all further visits. Rows in italics follow
from the formulas alone.
"""
_OTHER = """## Agreement, peak memory, the record
"""
_OTHER_METRICS = (
    "peak_extra_mb", "largest_batch", "loss_error", "gradient_cosine", "threshold_margin",
    "mean_positives", "relative_difference",
)  # fmt: skip


def with_shares(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows; those of a device of several say how its part of the memory compares with one's."""
    alone = {
        (row["name"], row["condition"]["batch"], row["condition"]["width"]): row["mean"]
        for row in rows
        if row["metric"] == "program_mb_of_batch" and row["condition"]["devices"] == 1
    }
    result = []
    for row in rows:
        c = row["condition"]
        one = alone.get((row["name"], c["batch"], c["width"]))
        if row["metric"] == "program_mb_of_batch" and one and c["devices"] > 1:
            row = {**row, "ratio": round(row["mean"] / one, 4), "against": "1 device"}
        result.append(dict(row))
    return result


def page(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    parts = [_HEAD]
    for title, table in (
        (_TIME, _times(rows)),
        (_MEMORY, _memory(rows)),
        (_DEVICES, _devices(rows)),
        (_OTHER, _others(rows)),
    ):
        if len(table) > 2:
            parts.append("\n".join([title, *table]) + "\n")
    return "\n".join(parts)


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _times(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| device | batch | width | dtype | block | | seconds (lowest to highest) | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    chosen = [r for p in ("time", "fit", "record") for r in _of(rows, p)]
    grouped: dict[tuple, list[Row]] = {}
    for row in chosen:
        if row["metric"] in ("seconds", "gflop_per_s"):
            c = row["condition"]
            key = (row["device"], c["batch"], c["width"], c["dtype"], c["block"], row["name"])
            grouped.setdefault((*key, row["task"]), []).append(row)
    for (*key, name, _), same in grouped.items():
        first, values = same[0], same[0]["values"].values()
        spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
        unit = " GFLOP/s" if first["metric"] == "gflop_per_s" else ""
        ratios = [f"{r['ratio']:.2f} x {_short(r)}" for r in same if "against" in r]
        cells = [*key, name, f"{first['median']:.3g}{spread}{unit}", ", ".join(ratios)]
        lines.append(_line(cells))
    return lines


def _short(row: Row) -> str:
    return "limit" if row["against"].startswith("matmul limit") else row["against"]


def _memory(rows: Sequence[Row]) -> list[str]:
    chosen = _of(rows, "memory")
    names = list(dict.fromkeys(row["name"] for row in chosen))
    lines = [_line(["device", "batch", "width", "block", *names]), "|---" * (4 + len(names)) + "|"]
    cells: dict[tuple, dict[str, float]] = {}
    for row in chosen:
        c = row["condition"]
        key = (row["device"], c["batch"], c["width"], c["block"])
        cells.setdefault(key, {})[row["name"]] = row["mean"]
    for key, found in cells.items():
        lines.append(_line([*key, *(f"{found[n]:.4g}" if n in found else "" for n in names)]))
    return lines


def _devices(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| batch | width | block | | devices | columns | GFLOP | units | GB accessed | MB sent "
        "(by formula) | collectives | MB of the batch (of one device's) | MB of tiles |",
        "|---" * 13 + "|",
    ]
    grouped: dict[tuple, dict[str, Row]] = {}
    for row in [*_of(rows, "devices"), *_of(rows, "planned")]:
        c = row["condition"]
        key = (c["batch"], c["width"], c["block"], row["name"], c["devices"], c.get("columns", ""))
        grouped.setdefault(key, {})[row["metric"]] = row
    for key, found in grouped.items():
        mean = {metric: row["mean"] for metric, row in found.items()}
        planned = any(row.get("extrapolated") for row in found.values())
        sent = [mean[f"{kind}_mb_sent"] for kind in _KINDS if f"{kind}_mb_sent" in mean]
        by_formula = _number(mean, "planned_mb_sent")
        share = found.get("program_mb_of_batch", {}).get("ratio")
        cells = [
            *key,
            *(_number(mean, name) for name in ("gflop", "units", "gb_accessed")),
            by_formula if planned else f"{sum(sent):.4g} ({by_formula})",
            ", ".join(f"{mean[f'{k}_count']:.0f} {k}" for k in _KINDS if f"{k}_count" in mean),
            _number(mean, "program_mb_of_batch") + (f" ({share:.3f})" if share else ""),
            _number(mean, "program_mb_of_tiles"),
        ]
        lines.append(_line([f"*{cell}*" if planned and cell else cell for cell in map(str, cells)]))
    return lines


def _number(mean: Mapping[str, float], metric: str) -> str:
    return f"{mean[metric]:.4g}" if metric in mean else ""


def _others(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| device | batch | width | dtype | | measure | value |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (r for part in ("time", "peak", "fit", "record") for r in _of(rows, part)):
        if row["metric"] in _OTHER_METRICS:
            c = row["condition"]
            more = f", {row['out_of_memory']} does not fit" if "out_of_memory" in row else ""
            value = f"{row['mean']:.6g} {row['unit']}".strip() + more
            cells = [row["device"], c["batch"], c["width"], c["dtype"], row["name"]]
            lines.append(_line([*cells, row["metric"], value]))
    return lines


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"

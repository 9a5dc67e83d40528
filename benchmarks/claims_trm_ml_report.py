"""Results of the TRM-ML claims as a results file, Markdown tables and charts."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import claims_trm_ml_plan as plan
from benchmarks import harness
from benchmarks.result_rows import page_head
from trm_jax.evaluate import pseudo_labels
from trm_jax.visualize import report

COMMAND = (
    "python benchmarks/claims_trm_ml.py --jobs=2 --seeds={seeds} --data=FOLDER "
    "--lit=runs/lit_flickr8k/export/clip.safetensors"
)
# TRM-ML, Table 3, MS-COCO 2014, RN101 at 448 px: the average over 10 % to 90 % known labels.
PAPER_AVERAGE = {
    "baseline": 77.7,
    "+CARL": 84.1,
    "+KD": 84.4,
    "+MMCP": 84.7,
    "+MMCL": 85.0,
    "TRM-ML": 85.4,
}
AVERAGE = "mAP_average"
_UNITS = {"mAP": "%", "mAP_best": "%", "seconds": "s", "regularization": ""} | {
    f"pseudo_{name}": "%"
    for name in (
        "accuracy",
        "precision",
        "recall",
        "precision_positive",
        "recall_positive",
        "precision_negative",
        "recall_negative",
    )
}
ROWS: dict[str, dict[str, Any]] = {
    "zero-shot, pooled embedding": {"name": "zero-shot", "recipe": "global"},
    "zero-shot, best position": {"name": "zero-shot", "recipe": "max"},
    "logistic regression (raw features)": {"name": "logistic regression (raw features)"},
    "logistic regression": {"name": "logistic regression"},
    "DualCoOp, its own recipe": {"name": "DualCoOp", "recipe": "own"},
    "DualCoOp, our recipe": {"name": "DualCoOp", "recipe": "ours"},
    **{name: {"name": name} for name in ("baseline", "+CARL", "+KD", "+MMCP", "+MMCL", "TRM-ML")},
}
_MEMORY_ROWS = {
    "none": {"name": "+KD"},
    **{name.removeprefix("memory: "): {"name": name} for name in plan.MEMORY},
}
_SOURCES = {
    "glyphs": "Glyph scenes, the bundled CLIP",
    "coco_features": "COCO photos (317 to learn from, 159 to be tested on), precomputed features "
    "in the joint space of lit_flickr8k",
}


def results(
    tasks: Sequence[harness.Task],
    records: Mapping[str, Mapping[str, Any]],
    *,
    seeds: int,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """The body of the results file.

    Rows and records of a source that this plan does not have stay as they are in the file `before`.
    """
    rows = harness.summarize(tasks, records, units=_UNITS, paper=lambda *_: None)
    rows += averages(rows)
    planned = {condition["source"] for task in tasks for condition in task.conditions}
    kept = [row for row in before.get("rows", []) if row["condition"]["source"] not in planned]
    unfinished = {source: plan.count_runs(source, seeds) for source in plan.KNOWN}
    unfinished |= before.get("unfinished_runs", {})
    for source in planned:
        unfinished[source] = sum(
            not records.get(t.folder) for t in tasks if t.conditions[0]["source"] == source
        )
    finished = [records[t.folder] for t in tasks if records.get(t.folder)]
    partial = {"partial": True} if any(unfinished.values()) else {}
    return {
        "name": "claims_trm_ml",
        "command": COMMAND.format(seeds=seeds),
        "device": finished[-1]["device"],
        "cores": finished[-1]["cores"],
        "seconds": round(sum(record["values"]["seconds"] for record in finished), 1),
        "unfinished_runs": unfinished,
        **partial,
        "rows": rows + kept,
        "records": _other_records(before, planned)
        | {t.folder: records[t.folder] for t in tasks if records.get(t.folder)},
    }


def _other_records(before: Mapping[str, Any], planned: set[str]) -> dict[str, Any]:
    """Records of the sources that are not planned; those of planned ones may be stale."""
    found = before.get("records", {})
    return {name: record for name, record in found.items() if not name.startswith(tuple(planned))}


def averages(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the metric mAP_average: mean over 10, 30 and 50 % of each seed that has all three.

    The paper's figure beside them averages 10 to 90 % of another dataset: its order is what can
    be compared.
    """
    groups: dict[tuple, dict[float, Mapping[str, Any]]] = {}
    for row in rows:
        condition = dict(row["condition"])
        known = condition.pop("known")
        if row["metric"] == "mAP":
            groups.setdefault((row["name"], *condition.items()), {})[known] = row
    made = []
    for (name, *condition), by_known in groups.items():
        if not set(plan.AVERAGED) <= by_known.keys():
            continue
        values = [by_known[known]["values"] for known in plan.AVERAGED]
        common = [seed for seed in values[0] if all(seed in other for other in values)]
        if common:
            mean = {seed: statistics.fmean(v[seed] for v in values) for seed in common}
            paper = PAPER_AVERAGE.get(name)
            made.append(harness.make_row(name, dict(condition), AVERAGE, mean, "%", paper))
    return made


def differences(file: Mapping[str, Any]) -> dict[str, Any]:
    """A results file of TRM-ML's mAP minus each row's, seed by seed: the masks are the same."""
    rows = [row for row in file["rows"] if row["metric"] in ("mAP", AVERAGE)]
    ours = {_place(row): row["values"] for row in rows if row["name"] == "TRM-ML"}
    made = []
    for row in rows:
        reference = ours.get(_place(row), {})
        # A row without seeds (zero-shot) has one value, which every seed is compared with.
        other = row["values"]
        gain = {
            seed: value - other.get(seed, other.get("None", 0.0))
            for seed, value in reference.items()
            if seed in other or "None" in other
        }
        if gain and row["name"] != "TRM-ML":
            made.append(
                harness.make_row(row["name"], row["condition"], row["metric"], gain, "%", None)
            )
    return {"name": file["name"], "rows": made}


def _place(row: Mapping[str, Any]) -> tuple:
    condition = row["condition"]
    return condition["source"], condition.get("known"), row["metric"]


def write_pages(file: Mapping[str, Any], path: Path) -> None:
    """The Markdown page beside the results file, and one chart for each source."""
    parts = page_head("Claims of TRM-ML, measured", file)
    parts.append(
        "mAP in per cent after the last epoch, mean ± sample standard deviation over the seeds; a "
        "seed draws the parameters, the order of the images and the label mask. In brackets the "
        "paper's figure (MS-COCO 2014, RN101 at 448 pixels, average over 10–90 % known labels): "
        "other data and another encoder, so that only the order can be compared.\n"
    )
    for source, title in _SOURCES.items():
        if any(row["condition"]["source"] == source for row in file["rows"]):
            suffix = "" if source == "glyphs" else f"_{source}"
            picture = path.with_name(f"{path.stem}{suffix}.png")
            parts += [f"## {title}\n", *_section(file, source, picture)]
    path.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")


def _section(file: Mapping[str, Any], source: str, picture: Path) -> list[str]:
    columns = report.condition_columns(dict(file), "known", metric="mAP", source=source)
    rows = _present(file, ROWS, source)
    head = f"known labels, {source}"
    with_average = dict(columns)
    if any(_is(row, AVERAGE, source) for row in file["rows"]):
        with_average["average 10–50 %"] = {"metric": AVERAGE, "source": source}
    parts = [report.markdown_table(file, rows, with_average, head=head), _orders(file, source)]
    gain = differences(file)
    if any(row["condition"]["source"] == source for row in gain["rows"]):
        less = {label: row for label, row in rows.items() if label != "TRM-ML"}
        parts.append("TRM-ML minus the row, on the same masks:\n")
        parts.append(
            report.markdown_table(
                gain, _present(gain, less, source), with_average, head=head, bold_best=False
            )
        )
    best = {name: {**c, "metric": "mAP_best"} for name, c in columns.items()}
    trained = {label: row for label, row in rows.items() if _any(file, row, "mAP_best", source)}
    if trained:
        parts.append("The best epoch on the evaluated images, as peers report it:\n")
        parts.append(report.markdown_table(file, trained, best, head=head))
    parts += _memory(file, source) + _pseudo(file, source)
    report.chart(
        file,
        rows,
        columns,
        path=picture,
        kind="points",
        ylabel="mAP (%)",
        xlabel="known labels",
        title=_SOURCES[source].partition(" (")[0],
    )
    return [*parts, f"![mAP by known labels]({picture.name})\n"]


def _memory(file: Mapping[str, Any], source: str) -> list[str]:
    known = plan.KNOWN[source][0]
    rows = {
        label: row
        for label, row in _present(file, _MEMORY_ROWS, source).items()
        if _any(file, {**row, "known": known}, "mAP", source)
    }
    if len(rows) < 2:
        return []
    where = {"source": source, "known": known}
    columns = report.metric_columns(["mAP", "pseudo_precision", "pseudo_recall"], **where)
    table = report.markdown_table(file, rows, columns, head="pseudo-labels by", bold_best=False)
    return [
        f"Who gives pseudo-labels (Table 6: +KD and a memory, no MMCL), {100 * known:g} % known; "
        "the paper on VOC2007: none 93.2, text 94.3, visual 94.2, both 94.8.\n",
        table,
    ]


def _pseudo(file: Mapping[str, Any], source: str) -> list[str]:
    measured: dict[float, dict[str, float]] = {}
    for row in file["rows"]:
        if (
            row["name"] == "TRM-ML"
            and _is(row, row["metric"], source)
            and row["metric"].startswith("pseudo_")
        ):
            measured.setdefault(row["condition"]["known"], {})[row["metric"]] = row["mean"]
    if not measured:
        return []
    return [
        "TRM-ML's pseudo-labels in the last epoch, over all unknown training entries, in per "
        "cent:\n",
        pseudo_labels.table(measured),
    ]


def _orders(file: Mapping[str, Any], source: str) -> str:
    """The paper's order of the ablation and the one measured, of the averages."""
    means = {
        row["name"]: row["mean"]
        for row in file["rows"]
        if _is(row, AVERAGE, source) and row["name"] in PAPER_AVERAGE
    }
    text = f"Order in the paper: {_order(PAPER_AVERAGE)}.\n"
    return text + (f"Order measured here: {_order(means)}.\n" if len(means) > 1 else "")


def _order(values: Mapping[str, float]) -> str:
    return " < ".join(f"{n} {values[n]:.1f}" for n in sorted(values, key=lambda name: values[name]))


def _present(file, rows: Mapping[str, dict], source: str) -> dict[str, dict]:
    return {label: row for label, row in rows.items() if _any(file, row, "mAP", source)}


def _any(file: Mapping[str, Any], selector: Mapping[str, Any], metric: str, source: str) -> bool:
    return any(
        _is(row, metric, source)
        and all({**row["condition"], "name": row["name"]}.get(k) == v for k, v in selector.items())
        for row in file["rows"]
    )


def _is(row: Mapping[str, Any], metric: str, source: str) -> bool:
    return row["metric"] == metric and row["condition"]["source"] == source


def validation_table(
    tasks: Sequence[harness.Task], records: Mapping[str, Mapping[str, Any]]
) -> str:
    """Name, condition, mean mAP and the seeds' values, best first."""
    rows = harness.summarize(tasks, records, units={"mAP": "%"}, paper=lambda *_: None)
    lines = ["| row | mean mAP | std | by seed |", "|---|---:|---:|---|"]
    for row in sorted(rows, key=lambda row: -row["mean"]):
        place = " ".join(str(value) for value in row["condition"].values())
        values = " ".join(f"{value:.2f}" for value in row["values"].values())
        std = "–" if row["std"] is None else f"{row['std']:.2f}"
        lines.append(f"| {row['name']}, {place} | {row['mean']:.2f} | {std} | {values} |")
    return "\n".join(lines)

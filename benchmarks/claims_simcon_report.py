"""Results of the SimCon claims as a results file, Markdown tables and charts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import claims_simcon_charts as charts
from benchmarks import claims_simcon_curves as curves
from benchmarks import claims_simcon_measure as measure
from benchmarks import claims_simcon_plan as plan
from benchmarks import harness
from benchmarks.result_rows import page_head, plain, rows_at
from trm_jax.visualize import report

COMMAND = (
    "python benchmarks/claims_simcon.py --jobs=2 --seeds={seeds} --sweep_seeds={sweep_seeds} "
    "--data=FOLDER"
)
# SimCon, ablation: trained on CC3M, zero-shot segmentation of Pascal VOC, mIoU.
PAPER = {
    "InfoNCE": 16.0,
    "SimCon": 30.4,
    "+views": 31.1,
    "+NCS": 32.3,
    "+joint positives": 35.0,
}
_UNITS = (
    dict.fromkeys(measure.QUALITY, "%")
    | {f"{name}_best": "%" for name in measure.QUALITY}
    | {"positives_image": "", "positives_text": "", "own_weight": "", "logit_scale": ""}
    | {"clipped": "", "steps": "steps", "seconds": "s"}
)
# Fig. 3.
_PAPER_PASSING = " (the paper on CC3M: SimCon after 7 of 30 epochs, MV-SimCon after 3)"
_CHIEF = ("mIoU", "Rsum", "i2t_R@1", "t2i_R@1")
_RECALLS = tuple(name for name in measure.QUALITY if "_R@" in name)
_TITLES = {
    "glyphs": "Glyph scenes, a small GroupViT",
    "flickr8k_features": "Flickr8k, precomputed region features, two towers",
    "flickr8k_photos": "Flickr8k, photos of 64 pixels, two small towers from nothing",
}
_ORDER = tuple(plan.METHODS)
Place = Mapping[str, Any]
_ABLATION: Place = {"source": "glyphs", "noise": plan.NOISE, "batch": plan.BATCH}


def results(
    tasks: Sequence[harness.Task],
    records: Mapping[str, Mapping[str, Any]],
    *,
    seeds: int,
    sweep_seeds: int,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """The body of the results file.

    Rows and records of a source that this plan does not have stay as they are in the file `before`.
    A record also says where its run stands, so that the charts need the file alone.
    """
    rows = harness.summarize(tasks, records, units=_UNITS, paper=_paper)
    done = {
        t.folder: {**records[t.folder], "conditions": [dict(c) for c in t.conditions]}
        for t in tasks
        if records.get(t.folder)
    }
    planned = {task.conditions[0]["source"] for task in tasks}
    kept = [row for row in before.get("rows", []) if row["condition"]["source"] not in planned]
    others = {
        folder: record
        for folder, record in before.get("records", {}).items()
        if not folder.startswith(tuple(planned))
    }
    unfinished = {source: plan.count_runs(source, seeds, sweep_seeds) for source in plan.SOURCES}
    unfinished |= before.get("unfinished_runs", {})
    for source in planned:
        unfinished[source] = sum(
            not records.get(t.folder) for t in tasks if t.conditions[0]["source"] == source
        )
    partial = {"partial": True} if any(unfinished.values()) else {}
    last = list(done.values())[-1]
    return {
        "name": "claims_simcon",
        "command": COMMAND.format(seeds=seeds, sweep_seeds=sweep_seeds),
        "device": last["device"],
        "cores": last["cores"],
        "seconds": round(sum(r["values"]["seconds"] for r in (others | done).values()), 1),
        "unfinished_runs": unfinished,
        **partial,
        "rows": rows + kept,
        "records": others | done,
    }


def _paper(name: str, condition: Place, metric: str) -> float | None:
    return PAPER.get(name) if metric == "mIoU" and dict(condition) == _ABLATION else None


def leads(file: Mapping[str, Any]) -> dict[str, Any]:
    """A results file of each row minus InfoNCE's of the same condition, seed by seed.

    Recipes, which have no InfoNCE of their own, are left out.
    """
    base = {_key(row): row["values"] for row in file["rows"] if row["name"] == plan.BASELINE}
    made = []
    for row in file["rows"]:
        other = base.get(_key(row), {})
        gain = {seed: v - other[seed] for seed, v in row["values"].items() if seed in other}
        if gain and row["name"] != plan.BASELINE and row["metric"] in measure.QUALITY:
            made.append(
                harness.make_row(row["name"], row["condition"], row["metric"], gain, "%", None)
            )
    return {"name": file["name"], "rows": made}


def _key(row: Mapping[str, Any]) -> tuple:
    return row["metric"], *sorted(row["condition"].items())


def write_pages(file: Mapping[str, Any], path: Path) -> None:
    """The Markdown page beside the results file, and its charts."""
    parts = page_head("Claims of SimCon, measured", file)
    parts.append(
        "After the last step, in per cent, mean ± sample standard deviation over the seeds; a seed "
        "draws the parameters, the order of the images, their augmentation and, on Flickr8k, which "
        "captions are exchanged. Noise is the share of the training images whose captions are not "
        "theirs; test captions are right. +joint positives is all of MV-SimCon.\n"
    )
    for section in (_ablation, _noise, _variants, _exchanged, _recipes, _batches):
        parts += section(file, path)
    for source in (s for s in plan.SOURCES if s.startswith("flickr8k")):
        parts += _flickr8k(file, path, source)
    path.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")


def _ablation(file: Mapping[str, Any], path: Path) -> list[str]:
    part = plain(file, **_ABLATION)
    if not part["rows"]:
        return []
    head = f"{100 * plan.NOISE:g} % noise"
    parts = [
        f"## Ablation: {_TITLES['glyphs']}, {head}\n",
        "Each row adds one thing. In brackets the paper's mIoU (trained on CC3M, tested on Pascal "
        "VOC): other data and a larger model, so that only the order can be compared.\n",
        _table(part, _CHIEF, head=head),
        _orders(part),
        *_lead_table(part, _CHIEF, head),
        "The best evaluation of a run:\n",
        _table(part, [f"{name}_best" for name in _CHIEF], head=head),
        *curves.passing_table(file, ("mIoU", "Rsum"), _ABLATION, _PAPER_PASSING),
        *_watched(part, head),
    ]
    return parts + _curve_chart(file, path, "curves", ("mIoU", "Rsum"), _ABLATION, head)


def _noise(file: Mapping[str, Any], path: Path) -> list[str]:
    part = plain(file, source="glyphs", batch=plan.BATCH)
    return _by(part, path, "noise", "Robustness to caption noise: glyph scenes\n")


def _variants(file: Mapping[str, Any], path: Path) -> list[str]:
    del path
    noise = max(plan.NOISES)
    rows = plain(file, source="glyphs", noise=noise, batch=plan.BATCH)["rows"]
    labels = {
        row["name"]: {"name": row["name"], "source": "glyphs", "noise": noise} for row in rows
    }
    measured = [source for source in plan.VARIANTS if rows_at(file, source=source)]
    if not measured:
        return []
    for source in measured:
        label = f"{plan.FULL}, {plan.VARIANTS[source][0]}"
        labels[label] = {"name": plan.FULL, "source": source}
    columns = report.metric_columns(_CHIEF)
    table = report.markdown_table(file, labels, columns, head=f"{100 * noise:g} % noise")
    return [f"### The most noise: later positives (not after a quarter), no NCS\n\n{table}"]


def _exchanged(file: Mapping[str, Any], path: Path) -> list[str]:
    del path
    part = plain(file, source="glyphs_exchanged")
    if not part["rows"]:
        return []
    head = f"{100 * max(plan.NOISES):g} % exchanged"
    watched = ("positives_image", "positives_text", "own_weight")
    mined = any(row["metric"] in watched for row in part["rows"])
    return [
        "### All noise is other scenes' captions\n",
        "Above, half of the noise is captions that fit many scenes: generic ones, and true ones "
        "cut short. Here captions are exchanged among the same share of the scenes.\n",
        _table(part, _CHIEF, head=head),
        *_lead_table(part, _CHIEF, head),
        *([_table(part, watched, head=head, digits=2, bold_best=False)] if mined else []),
    ]


def _batches(file: Mapping[str, Any], path: Path) -> list[str]:
    part = plain(file, source="glyphs", noise=plan.NOISE)
    title = f"Batch size: glyph scenes, {100 * plan.NOISE:g} % noise\n\n"
    title += (
        "All runs see as many images; the learning rate goes with the square root of the batch. "
        "The largest batches take few steps. No deviation: one seed.\n"
    )
    return _by(part, path, "batch", title)


def _by(part: Mapping[str, Any], path: Path, key: str, title: str) -> list[str]:
    """Tables, leads and a chart of InfoNCE and MV-SimCon by one condition."""
    names = [name for name in (plan.BASELINE, plan.FULL) if rows_at(part, name=name)]
    part = {**part, "rows": [row for row in part["rows"] if row["name"] in names]}
    if len({row["condition"][key] for row in part["rows"]}) < 2:
        return []
    parts, panels = [f"## {title}"], []
    for metric in ("mIoU", "Rsum"):
        columns = report.condition_columns(part, key, metric=metric)
        parts.append(report.markdown_table(part, names, columns, head=metric, paper=False))
        gain = leads(part)
        if rows_at(gain, metric=metric):
            columns = report.condition_columns(gain, key, metric=metric)
            parts.append(f"{metric}, lead over InfoNCE with the same seed:\n")
            parts.append(report.markdown_table(gain, None, columns, head=metric, bold_best=False))
        drawn = {
            name: charts.series(
                {
                    row["condition"][key]: list(row["values"].values())
                    for row in rows_at(part, name=name, metric=metric)
                }
            )
            for name in names
        }
        panels.append(charts.Panel(f"{metric} (%)", drawn))
    picture = path.with_name(f"{path.stem}_{key}.png")
    heading = title.partition("\n")[0]
    xlabel = "captions that are not the image's" if key == "noise" else "batch size"
    log2, percent = key == "batch", key == "noise"
    charts.draw(
        panels, path=picture, xlabel=xlabel, title=heading, names=_ORDER, log2=log2, percent=percent
    )
    return [*parts, f"![{heading}]({picture.name})\n"]


def _recipes(file: Mapping[str, Any], path: Path) -> list[str]:
    del path
    rows = [row for row in file["rows"] if "recipe" in row["condition"]]
    if not rows:
        return []
    part = {**file, "rows": rows}
    labels = {name: {"name": "SimCon", "recipe": name} for name in plan.RECIPES}
    labels = {k: v for k, v in labels.items() if rows_at(part, recipe=k)}
    watched = report.metric_columns(["logit_scale", "own_weight", "clipped"])
    return [
        f"## The anchor's own similarity and the temperature: SimCon, {100 * plan.NOISE:g} % noise"
        "\n",
        'Eq. 3 to the letter ("include") keeps the similarity of an anchor with itself, which is '
        "always 1. Over the last sixth of training: 1/tau, the share of an anchor's pull that "
        "goes to its own pair, and the share of steps whose gradient was clipped.\n",
        report.markdown_table(part, labels, report.metric_columns(_CHIEF), head="recipe"),
        report.markdown_table(part, labels, watched, head="recipe", digits=3, bold_best=False),
    ]


def _flickr8k(file: Mapping[str, Any], path: Path, source: str) -> list[str]:
    part = plain(file, source=source)
    if not part["rows"]:
        return []
    parts = [
        f"## {_TITLES[source]}\n",
        "Captions are exchanged among a share of the training images.\n",
        report.markdown_table(
            part, _names(part), report.condition_columns(part, "noise", metric="Rsum"), head="Rsum"
        ),
    ]
    gain = leads(part)
    if gain["rows"]:
        columns = report.condition_columns(gain, "noise", metric="Rsum")
        parts.append("Rsum, lead over InfoNCE with the same seed and captions:\n")
        parts.append(report.markdown_table(gain, None, columns, head="Rsum", bold_best=False))
    panels = []
    for noise in sorted({row["condition"]["noise"] for row in part["rows"]}):
        (batch, *_) = {row["condition"]["batch"] for row in part["rows"]}
        place = {"source": source, "noise": noise, "batch": batch}
        parts.append(f"### {100 * noise:g} % noise\n")
        parts.append(_table(plain(file, **place), _RECALLS, head=f"{100 * noise:g} % noise"))
        parts += curves.passing_table(file, ("Rsum",), place)
        panels.append(_panel(file, "Rsum", place, f"Rsum (%), {100 * noise:g} % noise"))
    return parts + _draw_curves(panels, path, source, _TITLES[source])


def _table(part: Mapping[str, Any], metrics: Sequence[str], *, head: str, **look: Any) -> str:
    present = [m for m in metrics if rows_at(part, metric=m)]
    columns = report.metric_columns(present)
    return report.markdown_table(part, _names(part), columns, head=head, **look)


def _lead_table(part: Mapping[str, Any], metrics: Sequence[str], head: str) -> list[str]:
    gain = leads(part)
    if not gain["rows"]:
        return []
    return ["Lead over InfoNCE with the same seed:\n", _table(gain, metrics, head=head)]


def _watched(part: Mapping[str, Any], head: str) -> list[str]:
    trained = {**part, "rows": [r for r in part["rows"] if r["metric"] in measure.WATCHED]}
    if not trained["rows"]:
        return []
    return [
        "Over the last sixth of training: positives of an image and of a text (the own pair "
        "counts), the share of an anchor's pull that goes to its own pair, 1/tau, and the share of "
        "steps whose gradient was clipped; in seconds, a run:\n",
        _table(
            part, [*measure.WATCHED, "seconds"], head=head, digits=2, bold_best=False, paper=False
        ),
    ]


def _curve_chart(file, path: Path, suffix: str, metrics, place: Place, head: str) -> list[str]:
    panels = [_panel(file, metric, place, f"{metric} (%)") for metric in metrics]
    return _draw_curves(panels, path, suffix, f"{_TITLES['glyphs']}, {head}")


def _panel(file, metric: str, place: Place, ylabel: str) -> charts.Panel:
    """Curves of all methods at one place, and InfoNCE's final value."""
    drawn = {}
    for name, of_seeds in curves.curves(file, metric, place).items():
        points: dict[float, list[float]] = {}
        for curve in of_seeds.values():
            for step, value in curve.items():
                points.setdefault(step, []).append(value)
        drawn[name] = charts.series(points)
    base = drawn.get(plan.BASELINE)
    return charts.Panel(ylabel, drawn, base.mean[-1] if base else None)


def _draw_curves(panels: Sequence[charts.Panel], path: Path, suffix: str, title: str) -> list[str]:
    panels = [panel for panel in panels if panel.series]
    if not panels:
        return []
    picture = path.with_name(f"{path.stem}_{suffix}.png")
    charts.draw(
        panels, path=picture, xlabel="steps", title=title, names=_ORDER, level_name="InfoNCE, final"
    )
    return [f"![{title}, against steps]({picture.name})\n"]


def _orders(part: Mapping[str, Any]) -> str:
    """The paper's order of the ablation and the one measured."""
    means = {row["name"]: row["mean"] for row in rows_at(part, metric="mIoU")}
    text = f"Order in the paper: {_order(PAPER)}.\n"
    return text + (f"Order measured here: {_order(means)}.\n" if len(means) > 1 else "")


def _order(values: Mapping[str, float]) -> str:
    return " < ".join(f"{n} {values[n]:.1f}" for n in sorted(values, key=lambda name: values[name]))


def _names(part: Mapping[str, Any]) -> list[str]:
    """The methods that have rows, in the plan's order."""
    found = {row["name"] for row in part["rows"]}
    return [name for name in plan.METHODS if name in found]


def validation_table(
    tasks: Sequence[harness.Task], records: Mapping[str, Mapping[str, Any]]
) -> str:
    """Name, condition, metric, mean and the seeds' values, the best mean of a metric first."""
    units = {"mIoU": "%", "Rsum": "%"}
    rows = harness.summarize(tasks, records, units=units, paper=lambda *_: None)
    lines = ["| row | metric | mean | std | by seed |", "|---|---|---:|---:|---|"]
    for row in sorted(rows, key=lambda row: (row["metric"], -row["mean"])):
        place = " ".join(str(value) for value in row["condition"].values())
        values = " ".join(f"{value:.2f}" for value in row["values"].values())
        std = "–" if row["std"] is None else f"{row['std']:.2f}"
        label = f"{row['name']}, {place}"
        lines.append(f"| {label} | {row['metric']} | {row['mean']:.2f} | {std} | {values} |")
    return "\n".join(lines)

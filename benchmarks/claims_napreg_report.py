"""Results of the NAPReg claims as a results file, Markdown tables and charts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import claims_napreg_measure as measure
from benchmarks import claims_napreg_plan as plan
from benchmarks import claims_simcon_charts as charts
from benchmarks import harness
from benchmarks.result_rows import page_head, plain, rows_at
from trm_jax.visualize import report

COMMAND = (
    "python benchmarks/claims_napreg.py --jobs=2 --seeds={seeds} --sweep_seeds={sweep_seeds} "
    "--data=FOLDER"
)
# NAPReg, Table 1: Flickr8k, SCAN. K -> proxies, then R@1 and Rsum of text to image and of image to
# text; 0 is without NAPReg.
_TABLE_1 = {
    0: (0, 32.3, 168.9, 51.2, 216.0),
    1: (3874, 39.2, 189.7, 54.5, 226.6),
    2: (2444, 39.2, 188.0, 56.2, 229.7),
    3: (1950, 39.1, 189.8, 53.9, 227.1),
    5: (1438, 38.5, 187.9, 55.0, 227.7),
    8: (1102, 38.5, 188.7, 53.4, 224.2),
}
PAPER = {
    k: {
        "proxies": proxies,
        "t2i_R@1": t2i,
        "t2i_Rsum": t2i_sum,
        "i2t_R@1": i2t,
        "i2t_Rsum": i2t_sum,
        "Rsum": round(t2i_sum + i2t_sum, 1),
    }
    for k, (proxies, t2i, t2i_sum, i2t, i2t_sum) in _TABLE_1.items()
}
# Table 2: Flickr30k; the recalls in the order of measure.RECALLS.
FLICKR30K = {
    "SCAN i2t, BiGRU, triplet": (43.9, 74.2, 82.8, 67.9, 89.0, 94.4),
    "SCAN i2t, BiGRU, NAPReg": (51.4, 77.6, 85.7, 70.8, 90.9, 95.3),
    "SCAN i2t, GloVe, NAPReg": (54.6, 81.7, 88.4, 74.9, 92.6, 96.6),
    "SGRAF, BiGRU, triplet": (58.5, 83.0, 88.8, 77.8, 94.1, 97.4),
    "SGRAF, BiGRU, NAPReg": (60.0, 84.1, 90.2, 79.6, 95.6, 98.0),
    "SGRAF, BERT, NAPReg": (62.5, 87.1, 92.1, 82.2, 95.5, 98.0),
    "SGRAF, ensemble, NAPReg": (63.5, 87.8, 92.6, 82.2, 96.4, 98.3),
    "NAAF, BiGRU, triplet": (58.9, 83.3, 89.0, 78.3, 94.1, 97.7),
    "NAAF, GloVe, triplet": (61.0, 85.3, 90.6, 81.9, 96.1, 98.3),
}
# A row and what it adds the nouns to; the last is what the paper's tables compare.
LEADS = (
    ("triplet+NAP", "triplet"),
    ("MS+NAP", "MS"),
    ("MS+Proxy-Anchor", "MS"),
    ("MS+NAP", "triplet"),
)
_UNITS = (
    dict.fromkeys(measure.QUALITY, "%")
    | dict.fromkeys(measure.WATCHED, "")
    | {"proxies": "", "steps": "steps", "seconds": "s"}
)
_COMPARED = ("NAPReg", "triplet")
_CHIEF = ("t2i_R@1", "t2i_Rsum", "i2t_R@1", "i2t_Rsum", "Rsum")
_NAMES = tuple(plan.METHODS)


def results(
    tasks: Sequence[harness.Task],
    records: Mapping[str, Mapping[str, Any]],
    *,
    seeds: int,
    sweep_seeds: int,
) -> dict[str, Any]:
    """The body of the results file.

    A record also says where its run stands, so that the charts need the file alone.
    """
    done = {
        t.folder: {**records[t.folder], "conditions": [dict(c) for c in t.conditions]}
        for t in tasks
        if records.get(t.folder)
    }
    unfinished = dict.fromkeys(plan.MODELS, 0)
    for task in tasks:
        unfinished[task.conditions[0]["model"]] += not records.get(task.folder)
    partial = {"partial": True} if any(unfinished.values()) else {}
    last = list(done.values())[-1]
    return {
        "name": "claims_napreg",
        "command": COMMAND.format(seeds=seeds, sweep_seeds=sweep_seeds),
        "device": last["device"],
        "cores": last["cores"],
        "seconds": round(sum(record["values"]["seconds"] for record in done.values()), 1),
        "unfinished_runs": unfinished,
        **partial,
        "rows": harness.summarize(tasks, records, units=_UNITS, paper=_paper),
        "records": done,
    }


def _paper(name: str, condition: Mapping[str, Any], metric: str) -> float | None:
    """Table 1 beside the rows that it has: SCAN without NAPReg, and with it at each K."""
    if condition["model"] != plan.CHIEF or condition.get("recipe") == "context":
        return None
    k = {"triplet": 0, plan.FULL: condition.get("K")}.get(name)
    return PAPER.get(k, {}).get(metric) if k is not None else None


def leads(file: Mapping[str, Any]) -> dict[str, Any]:
    """A results file of LEADS: a row minus the other of the same model, seed by seed.

    The paper's figure is its own lead, where its tables have both.
    """
    rows = plain(file)["rows"]
    found = {(row["condition"]["model"], row["name"], row["metric"]): row for row in rows}
    made = []
    for (model, name, metric), row in found.items():
        for base in (base for above, base in LEADS if above == name):
            other = found.get((model, base, metric))
            if metric not in measure.QUALITY or other is None:
                continue
            gain = {
                s: v - other["values"][s] for s, v in row["values"].items() if s in other["values"]
            }
            known = row["paper"] is not None and other["paper"] is not None
            paper = round(row["paper"] - other["paper"], 4) if known else None
            if gain:
                place, label = {"model": model}, f"{name} over {base}"
                made.append(harness.make_row(label, place, metric, gain, "%", paper))
    return {"name": file["name"], "rows": made}


def write_pages(file: Mapping[str, Any], path: Path) -> None:
    """The Markdown page beside the results file, and its charts."""
    parts = page_head("Claims of NAPReg, measured", file)
    parts.append(
        "Retrieval on Flickr8k's 1,000 test images after the last step, in per cent, mean ± sample "
        "standard deviation over the seeds; a seed draws the parameters and the order of the "
        "captions. `flickr8k_precomp` has features of a 6 × 6 grid of 96 numbers, much weaker than "
        "the paper's, and the models are of width 256: in brackets the paper's figure on Flickr8k "
        "(Table 1), of which only leads and order can be compared. NAP are the nouns as proxies "
        "(Eq. 2), MS is the multi-similarity loss; the paper's NAPReg is both.\n"
    )
    parts += _overview(file, path)
    for model in plan.MODELS:
        parts += _model(file, model)
    parts += [*_frequencies(file), *_contexts(file), *_flickr30k(file), *_watched(file)]
    path.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")


def _overview(file: Mapping[str, Any], path: Path) -> list[str]:
    part, parts = plain(file), []
    columns = {
        model: {"model": model, "metric": "Rsum"}
        for model in plan.MODELS
        if rows_at(part, model=model, metric="Rsum")
    }
    if not columns:
        return []
    picture, title = path.with_suffix(".png"), "Rsum by loss and model"
    report.chart(
        part, _names(part), columns, path=picture, kind="points", ylabel="Rsum (%)", title=title,
        paper=False,
    )  # fmt: skip
    parts = [f"![{title}]({picture.name})\n"]
    panels = [charts.Panel(f"Rsum (%), {model}", _curves(file, model)) for model in columns]
    picture, title = path.with_name(f"{path.stem}_curves.png"), "Rsum after each epoch"
    charts.draw(panels, path=picture, xlabel="epochs", title=title, names=_NAMES)
    return [*parts, f"![{title}]({picture.name})\n"]


def _curves(file: Mapping[str, Any], model: str) -> dict[str, charts.Series]:
    """Rsum against epochs of a model's rows."""
    points: dict[str, dict[float, list[float]]] = {}
    for record in file["records"].values():
        if "recipe" not in record["conditions"][0] and record["conditions"][0]["model"] == model:
            curve = record["values"]["curve"]
            of_name = points.setdefault(record["name"], {})
            for epoch, value in zip(curve["epoch"], curve["Rsum"], strict=True):
                of_name.setdefault(epoch, []).append(value)
    return {name: charts.series(points[name]) for name in _NAMES if name in points}


def _model(file: Mapping[str, Any], model: str) -> list[str]:
    part = plain(file, model=model)
    if not part["rows"]:
        return []
    pooled = {row["name"]: row["condition"].get("pooling") for row in part["rows"]}
    lse = [name for name in _names(part) if pooled[name] == "lse"]
    note = (
        f" LogSumExp pools {' and '.join(lse)}, the mean all others; a lead of one over the other "
        "is of the pooling too."
        if lse
        else ""
    )
    if plan.MODELS[model][1].get("loss.warmup_epochs"):
        note += " The triplet keeps to the mean over negatives: at the hardest it collapsed."
    columns = report.metric_columns([*measure.RECALLS, "Rsum", "Rsum_best"])
    parts = [
        f"## {model}\n",
        f"`Rsum_best` is the best evaluation of a run, on the same images.{note}\n",
        report.markdown_table(part, _names(part), columns, head=model),
    ]
    gain = leads(part)
    if gain["rows"]:
        columns = report.metric_columns(_CHIEF)
        parts.append("Lead with the same seed, as measured:\n")
        parts.append(report.markdown_table(gain, None, columns, head=model, bold_best=False))
    return parts


def _frequencies(file: Mapping[str, Any]) -> list[str]:
    swept = rows_at(file, recipe="K")
    if not swept:
        return []
    rows: dict[str, dict[str, Any]] = {
        f"without nouns, {name}": {"name": name, "model": plan.CHIEF} for name in ("triplet", "MS")
    }
    own = plain(file, model=plan.CHIEF)
    rows = {label: row for label, row in rows.items() if rows_at(own, name=row["name"])}
    for k in sorted({row["condition"]["K"] for row in swept}):
        rows[f"{plan.FULL}, K = {k}"] = {"name": plan.FULL, "K": k, "recipe": "K"}
    counts = {label: row for label, row in rows.items() if "K" in row}
    return [
        f"## How often a noun must occur: {plan.CHIEF}\n",
        "A noun has a proxy if the training captions have it at least K times.\n",
        report.markdown_table(file, rows, report.metric_columns(_CHIEF)),
        report.markdown_table(
            file, counts, report.metric_columns(["proxies"]), digits=0, bold_best=False
        ),
    ]


def _contexts(file: Mapping[str, Any]) -> list[str]:
    swept = rows_at(file, recipe="context")
    if not swept:
        return []
    contexts = [c for c in plan.RECIPES["context"][1] if rows_at(file, context=c)]
    rows = {context: {"name": plan.FULL, "context": context} for context in contexts}
    return [
        f"## What is drawn to the proxies: {plan.CHIEF}, {plan.FULL}\n",
        "A pair has one anchor, the mean over its nouns, or one for each noun.\n",
        report.markdown_table(file, rows, report.metric_columns(_CHIEF), head="context"),
    ]


def _flickr30k(file: Mapping[str, Any]) -> list[str]:
    printed = []
    for name, values in FLICKR30K.items():
        by_metric = {**dict(zip(measure.RECALLS, values, strict=True)), "Rsum": sum(values)}
        printed += [
            harness.make_row(name, {}, metric, {None: value}, "%", None)
            for metric, value in by_metric.items()
        ]
    table = report.markdown_table(
        {"name": "paper", "rows": printed},
        None,
        report.metric_columns([*measure.RECALLS, "Rsum"]),
        head="Flickr30k, the paper",
        bold_best=False,
    )
    parts = [
        "## The paper's Table 2: Flickr30k\n",
        "Other images, regions of an object detector and full width; its SGRAF is the mean of SGR "
        "and SAF.\n",
        table,
    ]
    name = f"{plan.FULL} over triplet"
    gain = {r["condition"]["model"]: r for r in rows_at(leads(file), name=name, metric="Rsum")}
    told = []
    for theirs, ours in (("SCAN i2t", "SCAN i2t"), ("SGRAF", "SGRAF-SAF")):
        with_nouns, without = (FLICKR30K[f"{theirs}, BiGRU, {loss}"] for loss in _COMPARED)
        here = f"{gain[ours]['mean']:+.1f}" if ours in gain else "not yet measured"
        lead = sum(with_nouns) - sum(without)
        told.append(f"{theirs} {lead:+.1f} there, {ours} {here} here")
    return [*parts, f"Rsum, NAPReg over the triplet: {'; '.join(told)}.\n"]


def _watched(file: Mapping[str, Any]) -> list[str]:
    part, parts = plain(file), []
    for model in plan.MODELS:
        of_model = {**part, "rows": rows_at(part, model=model)}
        present = [m for m in (*measure.WATCHED, "seconds") if rows_at(of_model, metric=m)]
        if present:
            columns = report.metric_columns(present)
            parts.append(
                report.markdown_table(
                    of_model, _names(of_model), columns, head=model, digits=2, bold_best=False
                )
            )
    if not parts:
        return []
    text = (
        "Over the last epoch: the share of pairs with a loss, the score of a pair and that of its "
        "hardest caption of another image, the noun term, the share of captions with a kept noun, "
        "and of steps whose gradient was clipped; in seconds, a run.\n"
    )
    return ["## Watched\n", text, *parts]


def _names(part: Mapping[str, Any]) -> list[str]:
    """The rows' names in the plan's order."""
    found = {row["name"] for row in part["rows"]}
    return [name for name in _NAMES if name in found]

"""Results of the MASK claims as a results file, Markdown tables and a chart."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import claims_mask_measure as measure
from benchmarks import claims_mask_paper as paper
from benchmarks import claims_mask_plan as plan
from benchmarks import harness
from benchmarks.result_rows import page_head, plain, rows_at
from trm_jax.visualize import report

COMMAND = (
    "python benchmarks/claims_mask.py --jobs=2 --seeds={seeds} --sweep_seeds={sweep_seeds} "
    "--data=FOLDER"
)
# Rows of the main table, and what MASK's own is compared with.
MAIN = (
    *plan.LOSSES,
    *dict.fromkeys(
        variant.name
        for name in plan.LOSSES
        for variant in plan.VARIANTS[name]
        if variant.name != plan.MASK
    ),
    plan.MACK,
    *(v.name for v in plan.VARIANTS[plan.MACK]),
)
_UNITS = (
    dict.fromkeys((*measure.QUALITY, "Rsum_best", "uncovered"), "%")
    | dict.fromkeys(("known_words", "other_words", "dropped_words", *measure.MADE), "")
    | dict.fromkeys(measure.WATCHED, "")
    | {"steps": "steps", "seconds": "s"}
)
_RECIPES = {
    "lambda1": "Weight of L_cm, lambda_1 (Tables 4 and 15)",
    "lambda2": "Weight of L_cl, lambda_2 (Tables 4 and 15)",
    "m": "Neighbours of a word outside the knowledge, m (Table 5)",
    "unknown": "Words outside the knowledge: interpolation or Procrustes (appendix B)",
    "caption_words": "Which words of a caption",
    "fine-tuning": "Steps of fine-tuning (appendix H)",
    "depth": "Depths of the networks (Table 12)",
}
_NOTES = {
    "m": "K are the words of the knowledge that have a vector; the paper's K is 12,385.\n",
    "fine-tuning": (
        'On the domain\'s training images and the captions of others of them. "Prototypes alone" '
        "leaves the regions as they are.\n"
    ),
    "lambda1": "The other weight is MASK's own.\n",
    "lambda2": "The other weight is MASK's own.\n",
}


def results(
    tasks: Sequence[harness.Task],
    records: Mapping[str, Mapping[str, Any]],
    reranked: Mapping[str, Mapping[str, Any]],
    *,
    seeds: int,
    sweep_seeds: int,
) -> dict[str, Any]:
    """The body of the results file.

    Args:
      tasks, records: of the plan.
      reranked: see `claims_mask.rerank`.
      seeds, sweep_seeds: of the command.
    """
    done = {t.folder: records[t.folder] for t in tasks if records.get(t.folder)}
    unfinished = dict.fromkeys((task.conditions[0]["source"] for task in tasks), 0)
    for task in tasks:
        unfinished[task.conditions[0]["source"]] += not records.get(task.folder)
    partial = {"partial": True} if any(unfinished.values()) else {}
    last = list(done.values())[-1]
    rows = harness.summarize(*plan.expanded(tasks, records), units=_UNITS, paper=paper.figure)
    return {
        "name": "claims_mask",
        "command": COMMAND.format(seeds=seeds, sweep_seeds=sweep_seeds),
        "device": last["device"],
        "cores": last["cores"],
        "seconds": round(sum(record["values"]["seconds"] for record in done.values()), 1),
        "unfinished_runs": unfinished,
        **partial,
        "rows": rows + _reranked_rows(reranked.values()),
        "records": done,
        "reranked": dict(reranked),
    }


def _reranked_rows(found: Any) -> list[dict[str, Any]]:
    """A row for each base, alpha and metric over the seeds of MASK."""
    values: dict[tuple[str, str, str, str], dict[int | None, float]] = {}
    for one in found:
        for alpha, metrics in one["values"].items():
            for metric, value in metrics.items():
                place = one["source"], one["name"], alpha, metric
                values.setdefault(place, {})[one["seed"]] = value
    return [
        harness.make_row(
            name,
            {"source": source, "recipe": "re-ranked", "alpha": float(alpha)},
            metric,
            of_seeds,
            "%",
            None,
        )
        for (source, name, alpha, metric), of_seeds in values.items()
    ]


def leads(file: Mapping[str, Any]) -> dict[str, Any]:
    """A results file of MASK minus each other row of the main table, seed by seed.

    The paper's figure is its own lead, where it has both. A row without seeds is what every seed of
    MASK is compared with.
    """
    part = [row for row in file["rows"] if "recipe" not in row["condition"]]
    own = {
        (row["condition"]["source"], row["metric"]): row
        for row in part
        if row["name"] == plan.MASK and row["metric"] in measure.QUALITY
    }
    made = []
    for row in sorted(part, key=lambda row: MAIN.index(row["name"])):
        mine = own.get((row["condition"]["source"], row["metric"]))
        if mine is None or row["name"] == plan.MASK:
            continue
        fixed = row["values"].get("None")
        gain = {
            seed: value - row["values"].get(seed, fixed)
            for seed, value in mine["values"].items()
            if row["values"].get(seed, fixed) is not None
        }
        known = row["paper"] is not None and mine["paper"] is not None
        lead = round(mine["paper"] - row["paper"], 4) if known else None
        if gain:
            place = {"source": row["condition"]["source"]}
            label = f"over {row['name']}"
            made.append(harness.make_row(label, place, row["metric"], gain, "%", lead))
    return {"name": file["name"], "rows": made}


def write_pages(file: Mapping[str, Any], path: Path) -> None:
    """The Markdown page beside the results file, and its chart."""
    parts = page_head("Claims of MASK, measured", file)
    parts.append(
        "Retrieval by words alone, no pair of an image and a text in training: recalls in both "
        "directions and their sum, in per cent, mean ± sample standard deviation over the seeds. "
        "In brackets the paper's figure on Flickr30K, with 12,385 words of Visual Genome, regions "
        "of an object detector and vectors of 300 numbers: only leads and order can be compared. "
        '"chance" is the expectation of rankings at random. Settings were chosen on other '
        "images.\n"
    )
    parts += _overview(file, path)
    for source in dict.fromkeys(row["condition"]["source"] for row in file["rows"]):
        parts += _source(file, source)
    parts += paper.tables()
    path.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")


def _overview(file: Mapping[str, Any], path: Path) -> list[str]:
    part = plain(file)
    columns = {
        source: {"source": source, "metric": "Rsum"}
        for source in dict.fromkeys(row["condition"]["source"] for row in part["rows"])
    }
    if not columns:
        return []
    picture, title = path.with_suffix(".png"), "Rsum by row"
    report.chart(
        part, _names(part), columns, path=picture, kind="bars", ylabel="Rsum (%)", title=title,
        paper=False,
    )  # fmt: skip
    return [f"![{title}]({picture.name})\n"]


def _source(file: Mapping[str, Any], source: str) -> list[str]:
    known = plan.SOURCES.get(source)
    parts = [f"## {known.title if known else source}\n"]
    part = plain(file, source=source)
    if part["rows"]:
        columns = report.metric_columns([*measure.RECALLS, "Rsum"])
        parts += [report.markdown_table(part, _names(part), columns), _factor(part)]
    gain = leads(part)
    if gain["rows"]:
        columns = report.metric_columns(["t2i_R@1", "i2t_R@1", "Rsum"])
        table = report.markdown_table(gain, None, columns, head="MASK", bold_best=False)
        parts += ["MASK's lead with the same seed, the paper's in brackets:\n", table]
    for recipe, title in _RECIPES.items():
        parts += _recipe(file, source, recipe, title)
    return [*parts, *_reranking(file, source), *_words(part), *_watched(part)]


def _factor(part: Mapping[str, Any]) -> str:
    means = {row["name"]: row["mean"] for row in rows_at(part, metric="Rsum")}
    if not {plan.MASK, plan.CHANCE} <= means.keys():
        return ""
    text = f"MASK's Rsum is {means[plan.MASK] / means[plan.CHANCE]:.1f} times that of chance"
    if "w/o OOD" in means:
        text += f", {means['w/o OOD'] / means[plan.CHANCE]:.1f} times without OOD"
    return f"{text}.\n"


def _recipe(file: Mapping[str, Any], source: str, recipe: str, title: str) -> list[str]:
    found = rows_at(file, source=source, recipe=recipe)
    if not found:
        return []
    found.sort(key=lambda row: _order(row["condition"][recipe]))
    labelled = [{**row, "name": _label(row["condition"], recipe)} for row in found]
    columns = report.metric_columns([*measure.RECALLS, "Rsum"])
    table = report.markdown_table({**file, "rows": labelled}, None, columns, head=recipe)
    return [f"### {title}\n", *filter(None, [_NOTES.get(recipe)]), table]


def _order(value: Any) -> float:
    """Numbers by their size, in texts too; K, K/2 behind them; all else as it is planned."""
    if isinstance(value, str):
        return float(value) if value.isdigit() else math.inf
    return float(value)


def _label(condition: Mapping[str, Any], recipe: str) -> str:
    value, alone = condition[recipe], condition.get("prototypes_alone")
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text}, prototypes alone" if alone else text


def _reranking(file: Mapping[str, Any], source: str) -> list[str]:
    found = rows_at(file, source=source, recipe="re-ranked")
    parts = ["### Re-ranking (Table 6)\n"] if found else []
    for name in dict.fromkeys(row["name"] for row in found):
        rows = {
            f"alpha {alpha:g}": {"name": name, "alpha": alpha}
            for alpha in dict.fromkeys(r["condition"]["alpha"] for r in found if r["name"] == name)
        }
        columns = report.metric_columns([*measure.RECALLS, "Rsum"], recipe="re-ranked")
        parts.append(report.markdown_table({**file, "rows": found}, rows, columns, head=name))
    return parts


def _words(part: Mapping[str, Any]) -> list[str]:
    named = {row["name"] for row in rows_at(part, metric="uncovered")}
    chosen = [name for name in (plan.MASK, "w/o OOD", plan.MACK) if name in named]
    if not chosen:
        return []
    columns = report.metric_columns(measure.COVERAGE)
    text = (
        "Captions without a usable word, in per cent (they score 0 with every image); and of a "
        "caption its words of the knowledge, its others with a vector that were used, and those "
        "dropped.\n"
    )
    table = report.markdown_table(part, chosen, columns, digits=2, bold_best=False)
    return ["### Words of the captions\n", text, table]


def _watched(part: Mapping[str, Any]) -> list[str]:
    named = {row["name"] for row in rows_at(part, metric="steps")}
    chosen = [name for name in plan.LOSSES if name in named]
    if not chosen:
        return []
    columns = report.metric_columns([*measure.WATCHED, "Rsum_best", "steps", "seconds"])
    text = (
        "Losses over the last sixth of a run; `Rsum_best` of six evaluations; in seconds a run, "
        "with all ways to match it.\n"
    )
    table = report.markdown_table(part, chosen, columns, digits=2, bold_best=False)
    return ["### Watched\n", text, table]


def _names(part: Mapping[str, Any]) -> list[str]:
    """The rows' names in the order of MAIN."""
    found = {row["name"] for row in part["rows"]}
    return [name for name in MAIN if name in found]

"""Curves of the SimCon claims from a results file, and how soon a method passes InfoNCE."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import claims_simcon_plan as plan

Place = Mapping[str, Any]


def curves(file: Mapping[str, Any], metric: str, place: Place) -> dict[str, dict[int, dict]]:
    """name -> seed -> {step: value} of the runs whose condition is `place`, in the plan's order."""
    found: dict[str, dict[int, dict]] = {}
    for record in file["records"].values():
        curve = record["values"].get("curve", {})
        if dict(place) in record["conditions"] and metric in curve:
            points = dict(zip(curve["step"], curve[metric], strict=True))
            found.setdefault(record["name"], {})[record["seed"]] = points
    return {name: found[name] for name in plan.METHODS if name in found}


def steps_to_pass(
    file: Mapping[str, Any], metric: str, place: Place
) -> dict[str, dict[int, int | None]]:
    """name -> seed -> the first evaluated step at which a run has InfoNCE's final value.

    The value is that of InfoNCE with the same seed after its last step; None: never reached.
    """
    runs = curves(file, metric, place)
    final = {seed: points[max(points)] for seed, points in runs.get(plan.BASELINE, {}).items()}
    return {
        name: {
            seed: min((step for step, v in points.items() if v >= final[seed]), default=None)
            for seed, points in of_seeds.items()
            if seed in final
        }
        for name, of_seeds in runs.items()
    }


def passing_table(
    file: Mapping[str, Any], metrics: Sequence[str], place: Place, note: str = ""
) -> list[str]:
    """The table of `steps_to_pass`, with the sentence before it; [] with fewer than two rows.

    `note` ends the sentence.
    """
    found = {metric: steps_to_pass(file, metric, place) for metric in metrics}
    found = {metric: steps for metric, steps in found.items() if plan.BASELINE in steps}
    if not found or len(next(iter(found.values()))) < 2:
        return []
    total = max(max(p) for of in curves(file, metrics[-1], place).values() for p in of.values())
    names = list(dict.fromkeys(name for steps in found.values() for name in steps))
    lines = [
        "| first evaluation at InfoNCE's final | " + " | ".join(found) + " |",
        "|---|" + "---:|" * len(found),
    ]
    for name in names:
        cells = [_pass_cell(steps.get(name, {}), total) for steps in found.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = f"Steps of {total:,} until a run has the value that InfoNCE of its seed ends with"
    return [f"{text}{note}:\n", "\n".join(lines) + "\n"]


def _pass_cell(steps: Mapping[int, int | None], total: int) -> str:
    """ "200 ± 50 (50 %)"; how many seeds got there, if not all did."""
    passed = [step for step in steps.values() if step is not None]
    if not passed:
        return "never" if steps else "–"
    mean = statistics.fmean(passed)
    text = f"{mean:,.0f}"
    if len(passed) > 1:
        text += f" ± {statistics.stdev(passed):,.0f}"
    text += f" ({100 * mean / total:.0f} %)"
    missed = f", {len(passed)} of {len(steps)} seeds"
    return text + (missed if len(passed) < len(steps) else "")

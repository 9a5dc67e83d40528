"""The paper's figures beside those of benchmarks/claims_mask.py: Tables 1 to 6, 12 and 15."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks import claims_mask_measure as measure
from trm_jax.visualize import report


class Printed(NamedTuple):
    """A row: recalls on Flickr30K in the order of measure.RECALLS, Rs there and on MSCOCO."""

    recalls: tuple[float, ...]
    flickr30k: float
    coco: float | None = None


_MASK = Printed((4.8, 14.8, 22.0, 12.1, 30.1, 39.0), 122.8, 209.5)
# Row of the main table -> the figures of Tables 1 and 3.
ROWS: dict[str, Printed] = {
    "MASK": _MASK,
    "w/o OOD": Printed((4.5, 13.6, 20.5, 11.8, 28.5, 37.3), 116.2, 193.1),
    "w/o L_cm": Printed((3.1, 10.5, 15.2, 10.2, 26.6, 35.4), 101.0, 150.8),
    "w/o L_cl": Printed((2.6, 8.3, 13.7, 9.1, 23.9, 34.8), 92.4, 123.5),
    "random region": Printed((2.5, 9.1, 14.5, 5.6, 17.1, 23.9), 72.7, 148.5),
    "global mean": Printed((4.5, 14.1, 22.1, 2.9, 7.7, 12.0), 63.3, 112.7),
    "MACK": Printed((3.0, 9.9, 15.4, 10.1, 24.6, 32.3), 95.3, 201.7),
    "MACK, random region": Printed((1.6, 5.3, 8.8, 5.3, 16.4, 22.7), 60.1, 139.0),
    "MACK, global mean": Printed((2.5, 9.0, 14.3, 1.7, 5.6, 8.6), 41.7, 94.1),
}
# Recipe -> value -> the figures of Tables 15 (of which 4 is a part), 5 and 12.
RECIPES: dict[str, dict[Any, Printed]] = {
    "lambda1": {
        1.0: Printed((4.2, 13.0, 19.2, 11.6, 27.9, 36.8), 112.7, 185.1),
        3.0: _MASK,
        5.0: Printed((3.1, 10.2, 16.6, 11.2, 25.5, 34.3), 100.9, 156.5),
    },
    "lambda2": {
        1.0: Printed((3.9, 12.2, 18.0, 11.2, 27.5, 36.4), 109.2, 174.8),
        3.0: _MASK,
        5.0: Printed((3.6, 11.7, 17.8, 11.6, 25.2, 33.5), 103.4, 165.4),
    },
    "m": {
        "1": Printed((4.6, 13.9, 20.9, 11.9, 28.9, 37.7), 117.9, 197.3),
        "10": _MASK,
        "50": Printed((5.0, 15.8, 23.2, 12.3, 31.4, 40.4), 128.1, 222.6),
        "100": Printed((4.9, 15.3, 22.6, 12.2, 30.7, 39.7), 125.4, 216.0),
    },
    "unknown": {"interpolate": _MASK, "drop": ROWS["w/o OOD"]},
    "depth": {
        "as in Table 8": _MASK,
        "PAE, 1 FC + 1 attention": Printed((4.2, 13.4, 19.8, 11.2, 26.6, 35.4), 110.6),
        "PAE, 1 FC + 5 attention": Printed((4.6, 15.3, 26.3, 12.3, 28.5, 41.7), 128.7),
        "PAE, 3 FC + 3 attention": Printed((2.6, 11.8, 16.4, 10.3, 26.1, 36.2), 103.4),
        "PAE, 5 FC + 3 attention": Printed((1.9, 9.3, 12.6, 9.6, 24.8, 33.9), 92.1),
        "FRM, 1 FC + 1 attention": Printed((4.2, 13.9, 21.2, 11.7, 29.6, 37.5), 118.1),
        "FRM, 3 FC + 1 attention": Printed((3.7, 12.6, 20.2, 10.8, 28.7, 36.1), 112.1),
        "FRM, 2 FC + 3 attention": Printed((4.9, 12.8, 24.5, 13.3, 32.6, 38.2), 126.3),
        "FRM, 2 FC + 5 attention": Printed((4.6, 15.3, 24.2, 13.9, 33.8, 38.9), 130.7),
        "MTM, 1 FC + 3 attention": Printed((3.9, 12.4, 18.8, 10.0, 26.1, 34.5), 105.7),
        "MTM, 5 FC + 3 attention": Printed((2.7, 11.3, 16.1, 9.2, 23.5, 32.4), 95.2),
        "MTM, 3 FC + 1 attention": Printed((4.2, 13.6, 20.4, 11.7, 28.2, 37.5), 115.6),
        "MTM, 3 FC + 5 attention": Printed((5.1, 13.9, 22.7, 12.8, 32.4, 41.3), 128.2),
    },
}
# Tables 2 and 6: Rs of a model before and after MASK re-ranks it, on Flickr30K and MSCOCO.
RERANKED = {
    "CLIP": (525.5, 386.0),
    "CLIP, alpha 0.1": (533.1, 398.2),
    "CLIP, alpha 0.15": (534.3, 400.4),
    "CLIP, alpha 0.2": (531.5, 396.9),
    "ALBEF": (506.9, 428.3),
    "ALBEF, alpha 0.15": (518.1, 436.2),
}


def figure(name: str, condition: Mapping[str, Any], metric: str) -> float | None:
    """The figure on Flickr30K of a row of the results file, None where there is none."""
    recipe = condition.get("recipe", "")
    found = RECIPES.get(recipe, {}).get(condition.get(recipe)) if recipe else ROWS.get(name)
    if found is None or metric not in measure.QUALITY:
        return None
    return dict(zip(measure.QUALITY, (*found.recalls, found.flickr30k), strict=True))[metric]


def tables() -> list[str]:
    """The sums on both datasets, as a part of the page."""
    found = {name: (row.flickr30k, row.coco) for name, row in ROWS.items()}
    for recipe in ("lambda1", "lambda2", "m", "depth"):
        for value, row in RECIPES[recipe].items():
            label = value if recipe == "depth" else f"{recipe} = {value}"
            if row is not _MASK:
                found[label] = row.flickr30k, row.coco
    rows = [
        {"name": name, "condition": {}, "metric": metric, "mean": value, "std": None, "paper": None}
        for name, pair in {**found, **RERANKED}.items()
        for metric, value in zip(("Flickr30K", "MSCOCO"), pair, strict=True)
        if value is not None
    ]
    columns = report.metric_columns(["Flickr30K", "MSCOCO"])
    table = report.markdown_table(
        {"name": "paper", "rows": rows}, None, columns, head="Rs, the paper", bold_best=False
    )
    text = "MASK has lambda1 = lambda2 = 3 and m = 10. Table 4 has ratios of Table 15's weights.\n"
    return ["## The paper's Tables 1 to 6, 12 and 15\n", text, table]

"""Line charts of the SimCon claims: means over seeds with one standard deviation."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator

from trm_jax.visualize import style

_MARKERS = ("o", "s", "^", "D", "v")


class Series(NamedTuple):
    """One method: a mean and a sample standard deviation (0 for one seed) at each x."""

    x: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Panel(NamedTuple):
    """One set of axes.

    series: label -> what is drawn.
    level:  drawn as a dashed line, such as the baseline's final value; None for none.
    """

    ylabel: str
    series: Mapping[str, Series]
    level: float | None = None


def series(points: Mapping[float, Sequence[float]]) -> Series:
    """The values of the seeds by x, in the order of x."""
    ordered = sorted(points.items())
    return Series(
        tuple(x for x, _ in ordered),
        tuple(statistics.fmean(values) for _, values in ordered),
        tuple(statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in ordered),
    )


def draw(
    panels: Sequence[Panel],
    *,
    path: Path,
    xlabel: str,
    title: str,
    names: Sequence[str],
    log2: bool = False,
    percent: bool = False,
    level_name: str = "",
) -> Path:
    """Writes the panels side by side as one PNG with one legend; returns `path`.

    Args:
      panels: at least one.
      path: the file to write.
      xlabel, title: of the picture.
      names: all labels of all pictures, so that each has the same colour everywhere.
      log2: a logarithmic x axis with a tick at every x.
      percent: x are shares; a tick at every x, in per cent.
      level_name: what the dashed lines are.
    """
    banded = not log2 and not percent
    with matplotlib.rc_context(style.RC):
        figure = style.new_figure(1.6 + 3.4 * len(panels), 3.1)
        for number, panel in enumerate(panels, 1):
            axis = figure.add_subplot(1, len(panels), number)
            for label, drawn in panel.series.items():
                _line(axis, drawn, label, names.index(label), banded=banded)
            if panel.level is not None:
                axis.axhline(
                    panel.level, color="0.35", linewidth=0.9, linestyle=(0, (4, 3)),
                    label=level_name, zorder=1,
                )  # fmt: skip
            axis.set(xlabel=xlabel, ylabel=panel.ylabel)
            _ticks(axis, panel, log2=log2, percent=percent)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, weight="bold")
        found = [axis.get_legend_handles_labels() for axis in figure.axes]
        named: dict[str, Any] = {
            label: handle
            for handles, names in found
            for handle, label in zip(handles, names, strict=True)
        }
        figure.legend(list(named.values()), list(named), loc="outside right upper")
        figure.supxlabel(_note(panels, banded), x=0.995, ha="right", fontsize=7, color="0.4")
        return style.save(figure, path, 200)


def _line(axis: Axes, drawn: Series, label: str, place: int, *, banded: bool) -> None:
    """A mean with a band, or with error bars where only some points may have several seeds."""
    colour = style.COLOURS[place % len(style.COLOURS)]
    look: dict[str, Any] = {"color": colour, "marker": _MARKERS[place % len(_MARKERS)]}
    look |= {"markersize": 4, "linewidth": 1.5, "label": label}
    if not banded:
        bars = [std or math.nan for std in drawn.std]
        axis.errorbar(drawn.x, drawn.mean, bars, elinewidth=0.9, capsize=2.5, **look)
        return
    axis.plot(drawn.x, drawn.mean, **look)
    if any(drawn.std):
        low = [m - s for m, s in zip(drawn.mean, drawn.std, strict=True)]
        high = [m + s for m, s in zip(drawn.mean, drawn.std, strict=True)]
        axis.fill_between(drawn.x, low, high, color=colour, alpha=0.18, linewidth=0)


def _ticks(axis: Axes, panel: Panel, *, log2: bool, percent: bool) -> None:
    if not log2 and not percent:
        axis.set_xlim(left=0)
        return
    values = sorted({x for drawn in panel.series.values() for x in drawn.x})
    if log2:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
    names = [f"{100 * x:g} %" if percent else f"{x:,.0f}" for x in values]
    axis.set_xticks(values, names)


def _note(panels: Sequence[Panel], banded: bool) -> str:
    """What the bands or error bars are."""
    if not any(any(drawn.std) for panel in panels for drawn in panel.series.values()):
        return "one seed"
    return f"{'bands' if banded else 'error bars'}: ±1 standard deviation over the seeds"

"""Prototypes of words in the plane: do words of one meaning lie together?

The picture is Fig. 3 of the MASK paper, where the prototypes of raw features (MACK) stand beside
those of a trained encoder. The t-SNE that places the words needs scikit-learn, an extra of this
package.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from scipy.linalg import orthogonal_procrustes

from trm_jax.memory.knowledge_file import Knowledge, check
from trm_jax.types import UserError
from trm_jax.visualize import inches, style

_GROUP_COLOURS = (*style.COLOURS[5:7], style.COLOURS[2], style.COLOURS[4], style.COLOURS[3],
                  style.COLOURS[1], style.COLOURS[7])  # fmt: skip
# (marker, size in points); eight beside seven colours: 56 groups differ.
_MARKERS = (("o", 4.2), ("s", 4.0), ("D", 4.0), ("^", 4.8), ("v", 4.8), ("P", 5.2), ("X", 5.2),
            ("*", 6.4))  # fmt: skip
_PERPLEXITY, _TSNE_FROM = 30.0, 5
_EDGE, _HEAD, _FOOT, _LINE = 0.15, 0.34, 0.4, 0.16  # inches
_SMALLEST, _LARGEST = 3.6, 7.5  # inches of a panel
_MARKER = 4.2  # points, room for one
_LOOK: dict[Any, Any] = style.RC | {"axes.grid": False}


class _Words(NamedTuple):
    """The words to draw, the group of each, and the wanted ones that a set lacks."""

    words: list[str]
    group: np.ndarray
    missing: list[str]


class _Label(NamedTuple):
    """A word at (left, bottom) with a size, in points; far: whether a line leads to its marker."""

    left: float
    bottom: float
    width: float
    height: float
    far: bool


def embed(vectors: Float[np.ndarray, "n Z"], *, seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """t-SNE of vectors by their cosines, from a start by principal components.

    The perplexity is a third of the other words, at most 30. Fewer than 5 words, or words that are
    all the same, are placed by their principal components alone. The exact gradient, which is
    repeatable, takes about 0.5 s for 60 words and 10 s for 500.

    Args:
        vectors: [n, Z] of any scale, finite.
        seed: of the principal components' solver.

    Raises:
        UserError: scikit-learn is not installed.
    """
    unit = _unit(vectors)
    if len(unit) < _TSNE_FROM or np.ptp(unit, axis=0).max(initial=0.0) < 1e-9:
        return _principal(unit)
    try:
        # Late: an extra of this package, and slow to import.
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError(
            "the t-SNE of prototypes needs scikit-learn: pip install scikit-learn"
        ) from None
    solver = TSNE(
        perplexity=_perplexity(len(unit)),
        init="pca" if unit.shape[1] > 1 else "random",
        method="exact",
        random_state=seed,
    )
    return solver.fit_transform(unit).astype(np.float64)


def own_group_nearest(vectors: Float[np.ndarray, "n Z"], group: Int[np.ndarray, " n"]) -> int:
    """How many of n words have a word of their own group as the nearest by cosine.

    Unlike distances in the plane, which t-SNE distorts, this is a figure of the prototypes.

    Args:
        vectors: [n, Z], n >= 2; of equal cosines the earlier word is the nearest.
        group: [n].
    """
    unit = _unit(vectors)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return int((group[cosines.argmax(axis=1)] == group).sum())


def render_prototypes(
    sets: Mapping[str, Knowledge],
    groups: Mapping[str, Sequence[str]],
    *,
    path: str | Path,
    seed: int = 0,
    dpi: int = 160,
) -> Path:
    """Writes one PNG: a panel for each set, its words as points in the colour of their group.

    All panels have the same words, those in every set. A panel is turned and mirrored so that its
    groups lie as in the first, which t-SNE leaves open. A dashed line surrounds each group. A word
    whose label finds no room beside the others is a marker alone; the panel says how many.

    Args:
        sets: title -> knowledge, such as MACK's raw prototypes and MASK's; at least one.
        groups: name -> its words, at least one; a word is in one group alone.
        path: the file to write; missing folders are made.
        seed: see `embed`.
        dpi: pixels per inch.

    Returns:
        `path`.

    Raises:
        UserError: no set, no group, a word in two groups, no word that all sets have, a damaged
            set, or scikit-learn is not installed.
    """
    wanted = _wanted(sets, groups)
    places: list[np.ndarray] = []
    vectors = {}
    for title, knowledge in sets.items():
        row = {word: k for k, word in enumerate(knowledge.words)}
        vectors[title] = knowledge.prototypes[[row[word] for word in wanted.words]]
        found = embed(vectors[title], seed=seed)
        places.append(_turned(found, places[0]) if places else found)
    count = len(wanted.words)
    side = float(np.clip(0.62 * np.sqrt(count), _SMALLEST, _LARGEST))
    with matplotlib.rc_context(_LOOK):
        width = len(sets) * (side + _EDGE) + _EDGE
        entries = _entries(groups, wanted)
        legend = _rows_of(entries, width - 2 * _EDGE)
        notes = _notes(wanted, "every set" if len(sets) > 1 else "the knowledge", width)
        foot = _FOOT + _LINE * (1.35 * len(legend) + len(notes)) + 0.12
        figure = style.new_figure(width, _HEAD + side + foot, layout=None)
        for number, title in enumerate(sets):
            left = _EDGE + number * (side + _EDGE)
            unlabelled = _panel(figure, left, side, places[number], wanted)
            head = inches.fitted(title, side, 10, "bold")
            inches.write(figure, left, 0.12, head, fontsize=10, weight="bold")
            below = _below(vectors[title], wanted, unlabelled)
            inches.write(figure, left, _HEAD + side + 0.06, below, fontsize=7.5, color="0.35")
        _legend(figure, legend, _HEAD + side + _FOOT + 0.04)
        for line, text in enumerate(notes):
            top = _HEAD + side + foot - 0.06 - _LINE * (len(notes) - line)
            inches.write(figure, _EDGE, top, text, fontsize=7.5, color="0.35")
        return style.save(figure, path, dpi)


def _wanted(sets: Mapping[str, Knowledge], groups: Mapping[str, Sequence[str]]) -> _Words:
    """The words of the groups, without repeats, that every set has."""
    if not sets:
        raise UserError("there is no knowledge to draw; give one set at least")
    group_of: dict[str, int] = {}
    names = list(groups)
    for number, words in enumerate(groups.values()):
        for word in words:
            if group_of.setdefault(word, number) != number:
                raise UserError(
                    f"the word '{word}' is in the groups '{names[group_of[word]]}' and "
                    f"'{names[number]}'; keep it in one"
                )
    if not group_of:
        raise UserError("there is no word to draw; give groups as {'animals': ['dog', 'cat'], ..}")
    for title, knowledge in sets.items():
        check(knowledge, f"the knowledge '{title}'")
    known = frozenset.intersection(*(frozenset(k.words) for k in sets.values()))
    words = [word for word in group_of if word in known]
    if not words:
        which = "the knowledge has" if len(sets) == 1 else f"all {len(sets)} sets have"
        raise UserError(
            f"none of the {len(group_of)} words of the groups, '{next(iter(group_of))}' the first, "
            f"is one that {which}; take words that launch/match.py inspect lists"
        )
    group = np.array([group_of[word] for word in words])
    return _Words(words, group, [word for word in group_of if word not in known])


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit norm in double precision; a zero row stays zero."""
    rows = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _principal(unit: np.ndarray) -> np.ndarray:
    """The first two principal components, zero where there are none."""
    centred = unit - unit.mean(axis=0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((len(unit), 2))
    kept = min(2, len(scale))
    places[:, :kept] = left[:, :kept] * scale[:kept]
    return places


def _perplexity(count: int) -> float:
    return min(_PERPLEXITY, (count - 1) / 3)


def _turned(places: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Points turned and mirrored, about their mean, to lie as `like`; distances stay."""
    centred, target = places - places.mean(axis=0), like - like.mean(axis=0)
    return centred @ orthogonal_procrustes(centred, target)[0]


def _panel(figure: Figure, left: float, side: float, places: np.ndarray, wanted: _Words) -> int:
    """Draws the words of a set; returns how many have no label."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (_HEAD + side) / height, side / width, side / height))
    axes.set(xticks=[], yticks=[], xlim=(0, 72 * side), ylim=(0, 72 * side))
    for spine in axes.spines.values():
        spine.set(visible=True, color="0.8", linewidth=0.8)
    size = 7.5 if len(wanted.words) <= 60 else 6.5
    points = _in_points(places, side)
    for number in np.unique(wanted.group).tolist():
        of_group = points[wanted.group == number]
        colour, marker, large = _mark(number)
        axes.plot(*of_group.T, marker, color=colour, markersize=large, zorder=3,
                  markeredgecolor="white", markeredgewidth=0.4)  # fmt: skip
        _surround(axes, of_group, colour)
    labels = _placed(points, wanted.words, size, 72 * side)
    for word, number, point, label in zip(
        wanted.words, wanted.group.tolist(), points, labels, strict=True
    ):
        if label is None:
            continue
        ink = tuple(0.72 * channel for channel in to_rgb(_mark(number)[0]))
        if label.far:
            ends = np.clip(point, label[:2], np.add(label[:2], label[2:4]))
            axes.plot(*np.stack([point, ends]).T, color="0.6", linewidth=0.5, zorder=2)
        axes.text(label.left, label.bottom + 0.22 * size, word, fontsize=size, color=ink, zorder=4,
                  va="baseline", parse_math=False,
                  path_effects=inches.outline(1.6, "white"))  # fmt: skip
    return sum(label is None for label in labels)


def _in_points(places: np.ndarray, side: float) -> np.ndarray:
    """Places in a square panel, with a margin for labels, one scale for both directions."""
    low, high = places.min(axis=0), places.max(axis=0)
    extent = max(float((high - low).max()), 1e-12)
    margin = 0.09
    centred = (places - (low + high) / 2) / extent * (1 - 2 * margin)
    return (centred + 0.5) * 72 * side


def _mark(number: int) -> tuple[str, str, float]:
    """Colour, marker and its size in points of a group."""
    return (_GROUP_COLOURS[number % len(_GROUP_COLOURS)], *_MARKERS[number % len(_MARKERS)])


def _surround(axes: Axes, points: np.ndarray, colour: str) -> None:
    """A dashed line around three words or more."""
    if len(points) < 3:
        return
    hull = cv2.convexHull(points.astype(np.float32)).reshape(-1, 2)
    axes.add_patch(
        Polygon(
            hull,
            fill=True,
            facecolor=(*to_rgb(colour), 0.05),
            edgecolor=(*to_rgb(colour), 0.6),
            linestyle=(0, (4, 3)),
            linewidth=0.9,
            zorder=1,
        )  # fmt: skip
    )


def _placed(
    points: np.ndarray, words: Sequence[str], size: float, side: float
) -> list[_Label | None]:
    """A place for each label near its point, free of points and of other labels, or None.

    Points in a crowd choose first: they have the fewest places.
    """
    taken = [(*(point - _MARKER / 2), *(point + _MARKER / 2)) for point in points]
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    crowd = np.argsort(-(distances < 4 * size).sum(axis=1), kind="stable")
    labels: list[_Label | None] = [None] * len(words)
    tall = 1.05 * size
    for number in map(int, crowd):
        wide = 72 * inches.text_width(words[number], size)
        for left, bottom, far in _candidates(points[number], wide, tall):
            box = np.array([left, bottom, left + wide, bottom + tall])
            if box.min() < 1 or box.max() > side - 1:
                continue
            others = np.asarray(taken)
            apart = (box[:2] >= others[:, 2:]) | (box[2:] <= others[:, :2])
            if apart.any(axis=1).all():
                labels[number] = _Label(left, bottom, wide, tall, far)
                taken.append(tuple(box))
                break
    return labels


def _candidates(point: np.ndarray, wide: float, tall: float) -> Iterator[tuple[float, float, bool]]:
    """Lower left corners of a label around a point, from near to far: (left, bottom, far)."""
    x, y = point
    for gap in (_MARKER / 2 + 1, 7.0, 12.0, 18.0, 25.0, 34.0):
        for across, down in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            reach = gap if not (across and down) else 0.75 * gap
            left = {1: x + reach, 0: x - wide / 2, -1: x - reach - wide}[across]
            bottom = {1: y + reach, 0: y - tall / 2, -1: y - reach - tall}[down]
            yield left, bottom, gap > 6


def _below(vectors: np.ndarray, wanted: _Words, unlabelled: int) -> str:
    """Two lines about a panel."""
    count = len(wanted.words)
    how = f"perplexity {_perplexity(count):.2g}" if count >= _TSNE_FROM else "principal components"
    text = f"{count} word{'' if count == 1 else 's'}, {how}"
    text += f", {unlabelled} without a label" if unlabelled else ""
    if count > 1:
        near = own_group_nearest(vectors, wanted.group)
        text += f"\nnearest word by cosine is of the same group: {near} of {count}"
    return text


def _entries(groups: Mapping[str, Sequence[str]], wanted: _Words) -> list[tuple[str, int]]:
    """(text, group) of the legend."""
    found = []
    for number, (name, words) in enumerate(groups.items()):
        total, drawn = len(set(words)), int((wanted.group == number).sum())
        count = f"{drawn}" if drawn == total else f"{drawn} of {total}"
        found.append((f"{name} ({count})", number))
    return found


def _rows_of(entries: list[tuple[str, int]], room: float) -> list[list[tuple[str, int, float]]]:
    """Legend entries in lines: (text, group, left edge)."""
    rows: list[list[tuple[str, int, float]]] = [[]]
    right = 0.0
    for text, number in entries:
        wide = 0.42 + inches.text_width(text, 8.5)
        if rows[-1] and right + wide > room:
            rows.append([])
            right = 0.0
        rows[-1].append((text, number, right))
        right += wide
    return rows


def _legend(figure: Figure, rows: list[list[tuple[str, int, float]]], top: float) -> None:
    width, height = figure.get_size_inches()
    for line, row in enumerate(rows):
        y = top + (line + 0.5) * 1.35 * _LINE
        for text, number, left in row:
            colour, marker, large = _mark(number)
            dot = Line2D([(_EDGE + left + 0.07) / width], [1 - y / height], marker=marker,
                         color=colour, markersize=1.5 * large, linestyle="none")  # fmt: skip
            figure.add_artist(dot)
            inches.write(figure, _EDGE + left + 0.18, y, text, va="center_baseline", fontsize=8.5)


def _notes(wanted: _Words, place: str, width: float) -> list[str]:
    """Lines about the words that are not drawn."""
    missing = wanted.missing
    if not missing:
        return []
    total = len(missing) + len(wanted.words)
    text = f"{len(missing)} of {total} words are not in {place}: {', '.join(missing)}"
    return textwrap.wrap(text, int(16.5 * width), max_lines=3, placeholder=" …")

"""Several sets of image-text pairs as one, in proportions that are exact in every epoch."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from trm_jax.data.sources.base import Source
from trm_jax.data.sources.lazy import JoinedPairs, captioned
from trm_jax.types import UserError

_FIELDS = ("dataset", "root", "options", "weight", "name")
_MAX_EXAMPLES = 2**31 - 1  # positions are int32


@dataclasses.dataclass(frozen=True)
class Part:
    """One set of a mixture: its name in ids, its source, and how often an epoch visits it."""

    name: str
    source: Source
    visits: int


class Mixture(JoinedPairs):
    """The parts one after the other, each repeated until it has its visits; a Source.

    Position i of part k is its example i modulo its size: an epoch visits each example of a part
    equally often but for one. Ids are PART/ID. Images and captions are those of the parts.

    Raises UserError for no part, two parts of one name, and a part with classes or fewer visits
    than examples.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        names = [part.name for part in self.parts]
        if not names or len(set(names)) != len(names):
            raise UserError("a mixture needs parts in data.options.parts, each of another name")
        for part in self.parts:
            if part.source.class_names:
                raise UserError(
                    f"part '{part.name}' of the mixture has classes; parts are image-text pairs: "
                    "convert it with launch/prepare.py --dataset=pairs"
                )
            if not 0 < len(part.source) <= part.visits:
                raise UserError(
                    f"part '{part.name}' of the mixture has {len(part.source):,} examples and "
                    f"{part.visits:,} visits an epoch"
                )
        self._starts = np.cumsum([0, *(part.visits for part in self.parts)])
        if len(self) > _MAX_EXAMPLES:
            raise UserError(
                f"an epoch of the mixture has {len(self):,} visits, more than {_MAX_EXAMPLES:,}; "
                "bring the weights of data.options.parts nearer to the sizes"
            )

    @property
    def captioned(self) -> np.ndarray | range:
        """Positions of the examples with a caption."""
        inside = [captioned(part.source) for part in self.parts]
        if all(
            len(some) == len(part.source) for some, part in zip(inside, self.parts, strict=True)
        ):
            return range(len(self))
        positions = []
        for start, some, part in zip(self._starts, inside, self.parts, strict=False):
            has = np.zeros(len(part.source), np.bool_)
            has[np.asarray(some)] = True
            positions.append(start + np.flatnonzero(np.resize(has, part.visits)))
        return np.concatenate(positions).astype(np.int32)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Part -> its examples and its visits in an epoch."""
        return {p.name: {"examples": len(p.source), "visits": p.visits} for p in self.parts}

    def first_visit(self, positions: np.ndarray) -> np.ndarray:
        """The first position of the example at each of `positions` [n]."""
        part = np.searchsorted(self._starts, positions, side="right") - 1
        sizes = np.asarray([len(part.source) for part in self.parts])
        return self._starts[part] + (positions - self._starts[part]) % sizes[part]

    def fingerprint(self) -> str:
        """Changes with the parts, and with how they are mixed."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(f"{part.name} {part.visits}\n".encode())
            whole = getattr(part.source, "fingerprint", None)
            for line in [whole()] if whole else part.source.ids:
                digest.update(f"{line}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> Mapping[str, np.ndarray]:
        """The inputs of one example."""
        part, row = self._visited(index)
        return part.source.read(row)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one example."""
        part, row = self._visited(index)
        return part.source.captions(row)

    def _visited(self, index: int) -> tuple[Part, int]:
        """(part, example of the part)."""
        number, visit = self._place(index)
        part = self.parts[number]
        return part, visit % len(part.source)

    def _id(self, index: int) -> str:
        part, row = self._visited(index)
        return f"{part.name}/{part.source.ids[row]}"


def visits_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How often the shortest epoch that leaves no example out visits each part.

    Args:
      sizes: K numbers of examples, positive.
      weights: K positive shares of the epoch; they need not add up to 1.

    Returns:
      n_k = round(w_k / W * N) >= size_k, where W = sum w_k and N = ceil(max_k size_k * W / w_k).
    """
    # As they are written: 0.1 is a tenth.
    exact = [Fraction(str(weight)) for weight in weights]
    whole = sum(exact)
    total = math.ceil(max(size * whole / weight for size, weight in zip(sizes, exact, strict=True)))
    return [round(weight / whole * total) for weight in exact]


def open_mixture(
    parts: Any,
    split: str,
    *,
    root: str | Path = "",
    open_part: Callable[..., Source],
) -> Mixture:
    """Opens the parts of a mixture.

    Args:
      parts: a list of mappings, each with `dataset` and, where they are needed, `root`, `options`,
        `weight` and `name` (by default its number). Without weights an epoch is each example once;
        with them it is as `visits_per_epoch` says.
      split: of every part. Weights are for "train"; other splits take each example once.
      root: folder that relative roots of parts start from.
      open_part: sources.open_source.

    Raises:
      UserError: a field is missing, unknown or wrong, or a part cannot be opened.
    """
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, Mapping) for p in parts):
        raise UserError("data.options.parts is not a list of mappings {dataset, root, ...}")
    weights = [_checked(number, part) for number, part in enumerate(parts)]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) != len(weights):
        raise UserError("data.options.parts: either all parts have a weight or none")
    sources = []
    for part in parts:
        place = part.get("root") or ""
        place = os.path.join(os.path.expanduser(root), os.path.expanduser(place)) if place else ""
        options = dict(part.get("options") or {})
        sources.append(open_part(part["dataset"], split, root=place, **options))
    visits = [len(source) for source in sources]
    if given and split == "train":
        visits = visits_per_epoch(visits, given)
    names = [str(part.get("name") or number) for number, part in enumerate(parts)]
    return Mixture([Part(*fields) for fields in zip(names, sources, visits, strict=True)])


def _checked(number: int, part: Mapping[str, Any]) -> float | None:
    """The weight of a part; UserError if a field of it cannot be used."""
    name = f"data.options.parts[{number}]"
    unknown = [field for field in part if field not in _FIELDS]
    if unknown:
        raise UserError(f"{name} has no field '{unknown[0]}'; it has {', '.join(_FIELDS)}")
    if not isinstance(part.get("dataset"), str):
        raise UserError(f"{name} names no dataset")
    weight = part.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise UserError(f"{name}.weight is {weight!r}, not a number")
    if not 0 < weight < math.inf:
        raise UserError(f"{name}.weight is {weight}; it must be above 0")
    return weight

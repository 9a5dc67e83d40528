"""Words of regions: one spelling for all of them, and which regions of which images carry which."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from trm_jax.types import UserError

_APOSTROPHES = re.compile(r"['’`.]")
_SPECIAL = re.compile(r"[^\w\s-]|_")


def clean_word(text: str) -> str:
    """A word, or several, in the spelling of the vocabulary; "" if nothing of it can stay.

    Lower case; `_` and special characters part words, apostrophes and full stops do not; letters
    and digits of any script and hyphens inside a word stay.
    """
    text = _SPECIAL.sub(" ", _APOSTROPHES.sub("", text.lower()))
    return " ".join(word for word in (part.strip("-") for part in text.split()) if word)


class Layout(NamedTuple):
    """Which regions of which images carry which words, once rare words are gone.

    Image g of the layout has the regions region_starts[g] .. region_starts[g + 1] of `regions` and
    the pairs sample_starts[g] .. sample_starts[g + 1] of `samples`.
    """

    words: tuple[str, ...]
    counts: Int[np.ndarray, "K"]
    groups: Int[np.ndarray, "G"]  # numbers of the images, ascending
    regions: Int[np.ndarray, "M"]  # numbers of the regions, ascending in each image
    region_starts: Int[np.ndarray, "G1"]
    samples: Int32[np.ndarray, "S 2"]  # (position of the region in its image, word)
    sample_starts: Int[np.ndarray, "G1"]
    num_dropped_words: int
    num_dropped_samples: int

    def group_regions(self, index: int) -> np.ndarray:
        """int64 [J]: numbers of the regions of one image."""
        return self.regions[self.region_starts[index] : self.region_starts[index + 1]]

    def group_samples(self, index: int) -> np.ndarray:
        """int32 [S, 2] of one image, see `RegionGroup`."""
        return self.samples[self.sample_starts[index] : self.sample_starts[index + 1]]

    def report(self, min_count: int) -> dict[str, int]:
        """What every source of regions reports."""
        return {
            "images": len(self.groups),
            "regions": len(self.regions),
            "samples": len(self.samples),
            "words": len(self.words),
            "min_count": min_count,
            "dropped_words": self.num_dropped_words,
            "dropped_samples": self.num_dropped_samples,
        }


def lay_out(
    group: Int[np.ndarray, "S"],
    region: Int[np.ndarray, "S"],
    word: Int[np.ndarray, "S"],
    names: Sequence[str],
    *,
    min_count: int,
    place: object,
) -> Layout:
    """Sorts samples by image, region and word, each once, and drops words that are rare.

    Args:
      group, region: numbers of the image and, within it, of the region of each sample.
      word: position of its word in `names`, which has each word once.
      min_count: a word of fewer regions is dropped; so are regions and images left without one.
      place: the file or folder, for messages.

    Raises:
      UserError: min_count is below 1, or no word is that frequent.
    """
    if min_count < 1:
        raise UserError(f"min_count is {min_count}; the words of regions have 1 or more")
    alphabet = sorted(range(len(names)), key=names.__getitem__)
    rank = np.zeros(len(names), np.int64)
    rank[alphabet] = np.arange(len(names))
    keys = np.stack([group, region, rank[word]], axis=1).astype(np.int64)
    keys = keys[np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0]))]
    keys = keys[_firsts(keys)]
    counts = np.bincount(keys[:, 2], minlength=len(names))
    kept = counts >= min_count
    if not kept.any():
        most = int(counts.max(initial=0))
        raise UserError(
            f"{place}: no word has {min_count} regions, the most frequent has {most}; lower "
            "min_count"
        )
    number = np.cumsum(kept) - 1
    is_kept = kept[keys[:, 2]]
    num_dropped = int((~is_kept).sum())
    keys = keys[is_kept]
    first = np.flatnonzero(_firsts(keys[:, :2]))  # of each region
    region_number = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(keys))))
    groups, region_starts = np.unique(keys[first, 0], return_index=True)
    sample_starts = np.searchsorted(keys[:, 0], groups)
    local = region_number - np.repeat(region_starts, np.diff(np.append(sample_starts, len(keys))))
    return Layout(
        words=tuple(names[k] for k in alphabet if kept[rank[k]]),
        counts=counts[kept],
        groups=groups,
        regions=keys[first, 1],
        region_starts=np.append(region_starts, len(first)),
        samples=np.stack([local, number[keys[:, 2]]], axis=1).astype(np.int32),
        sample_starts=np.append(sample_starts, len(keys)),
        num_dropped_words=len(names) - int(kept.sum()),
        num_dropped_samples=num_dropped,
    )


def _firsts(rows: np.ndarray) -> np.ndarray:
    """bool [n]: whether a row of sorted keys differs from the one before."""
    return np.append(True, (rows[1:] != rows[:-1]).any(axis=1))[: len(rows)]

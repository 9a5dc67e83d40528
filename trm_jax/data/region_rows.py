"""Rows of regions: part of one image's regions with the words on them, in one fixed shape.

Source: MASK, Sec. 3.2: a region attends to the other regions of its image, so a batch is rows that
each hold regions of one image; attention never crosses them.
"""

from collections.abc import Iterator

import numpy as np

from trm_jax.data.examples import Sample, entered
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.labelled_regions import RegionSource
from trm_jax.types import BadSampleError, UserError

ATTENTION_SETS = ("image", "region")


class RegionRows:
    """The samples (a region with one of its words) of a source, every one in one row.

    An image of more regions or samples than a row holds takes several rows, in the order of the
    file; all samples of a region lie in one. Keys of a sample of at most R regions, Q samples:

        features       float32 [R, D]  zero behind the last region
        region_mask    bool [R]
        sample_region  int32 [Q]       place of the sample's region in the row, -1 for no sample
        sample_word    int32 [Q]       position in source.words, -1 for no sample
        index, valid                   index is the image's position in the source

    Args:
      source: of word-labelled regions.
      regions: R of a row; 1 if attention_set is "region".
      samples: Q of a row.
      attention_set: what a region may attend to: "image" puts the regions of an image together,
        "region" gives each a row of its own, with as many samples as any region has.

    Raises:
      UserError: an argument is out of its range, or a region has more words than a row holds.
    """

    def __init__(
        self,
        source: RegionSource,
        *,
        regions: int = 36,
        samples: int = 64,
        attention_set: str = "image",
    ):
        if attention_set not in ATTENTION_SETS:
            raise UserError(
                f"attention_set is {attention_set!r}; it is {' or '.join(ATTENTION_SETS)}"
            )
        if min(regions, samples) < 1:
            raise UserError(f"a row of {regions} regions and {samples} samples; give 1 or more")
        self.source = source
        self.num_regions, self.num_samples = regions, samples
        if attention_set == "region":
            counts = (np.bincount(source.samples(g)[:, 0]).max() for g in range(len(source)))
            self.num_regions, self.num_samples = 1, min(samples, int(max(counts, default=1)))
        rows = [(g, *row) for g in range(len(source)) for row in self._cut(g)]
        # Of each row: its image, its first and last region, and its first and last sample there.
        self._rows = np.asarray(rows, np.int32).reshape(-1, 5)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, position: int, rng: np.random.Generator) -> Sample:
        """One row; `rng` is not used. Raises BadSampleError as the source does."""
        del rng
        image, first, last, start, end = self._rows[position].tolist()
        group = self.source.group(image)
        features = entered(group.features[first:last])
        if features.shape != (last - first, self.source.width):
            raise BadSampleError(
                f"image {self.source.ids[image]}: features are {list(group.features.shape)}, not "
                f"those of {last} regions or more and width {self.source.width}"
            )
        row = self.blank(position)
        row["features"] = _padded(features, self.num_regions)
        row["region_mask"][: last - first] = True
        row["sample_region"][: end - start] = group.samples[start:end, 0] - first
        row["sample_word"][: end - start] = group.samples[start:end, 1]
        return row | {"valid": np.asarray(True)}

    def blank(self, position: int) -> Sample:
        """No region, no sample, valid=False."""
        return {
            "features": np.zeros((self.num_regions, self.source.width), np.float32),
            "region_mask": np.zeros(self.num_regions, np.bool_),
            "sample_region": np.full(self.num_samples, -1, np.int32),
            "sample_word": np.full(self.num_samples, -1, np.int32),
            "index": np.asarray(self._rows[position, 0] if position >= 0 else -1, np.int32),
            "valid": np.asarray(False),
        }

    def report(self) -> dict[str, int]:
        """Rows with their regions and samples, and the most samples that one row has."""
        first, last, start, end = self._rows[:, 1:].T
        return {
            "rows": len(self),
            "rows_regions": int((last - first).sum()),
            "rows_samples": int((end - start).sum()),
            "rows_most_samples": int((end - start).max(initial=0)),
        }

    def _cut(self, index: int) -> Iterator[tuple[int, int, int, int]]:
        """(first, last) regions and samples of the rows of one image; last ones are excluded."""
        counts = np.bincount(self.source.samples(index)[:, 0])
        if len(counts) <= self.num_regions and counts.sum() <= self.num_samples:
            yield 0, len(counts), 0, int(counts.sum())
            return
        first = start = end = 0
        for region, count in enumerate(counts.tolist()):
            if count > self.num_samples:
                raise UserError(
                    f"image {self.source.ids[index]}: a region has {count} words, a row holds "
                    f"{self.num_samples}; set samples to {count} or more"
                )
            if region - first == self.num_regions or end - start + count > self.num_samples:
                yield first, region, start, end
                first, start = region, end
            end += count
        yield first, len(counts), start, end


class ImageRegions:
    """All regions of each image of a source, padded, for matching and for prediction.

    Keys: features float32 [most, D], zero behind the last region; region_mask bool [most]; index,
    valid. A sample raises UserError for an image of more than `most` regions: none is left out
    silently.

    source: its images have "features" [r, D] of any r, one D.
    """

    def __init__(self, source: Source, most: int):
        if most < 1:
            raise UserError(f"regions is {most}; give 1 or more")
        self.source = source
        self.most = most
        self._width = 0

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, position: int, rng: np.random.Generator) -> Sample:
        """The regions of one image; `rng` is not used."""
        del rng
        features = entered(self.source.read(position)["features"])
        count = len(features)
        if count > self.most:
            raise UserError(
                f"image {self.source.ids[position]} has {count} regions, rows are declared for "
                f"{self.most}; declare {count} or more"
            )
        if features.shape != (count, self.width) or not np.isfinite(features).all():
            raise BadSampleError(
                f"image {self.source.ids[position]}: features {list(features.shape)} are not "
                f"finite numbers [r, {self.width}]"
            )
        return {
            "features": _padded(features, self.most),
            "region_mask": np.arange(self.most) < count,
            "index": np.asarray(position, np.int32),
            "valid": np.asarray(True),
        }

    def blank(self, position: int) -> Sample:
        """No region, valid=False."""
        return {
            "features": np.zeros((self.most, self.width), np.float32),
            "region_mask": np.zeros(self.most, np.bool_),
            "index": np.asarray(position, np.int32),
            "valid": np.asarray(False),
        }

    @property
    def width(self) -> int:
        """D, of the first image that can be read; UserError if none can."""
        if not self._width:
            self._width = self._find_width()
        return self._width

    def _find_width(self) -> int:
        for index in range(len(self.source)):
            try:
                read = self.source.read(index)
            except BadSampleError:
                continue
            if "features" not in read or read["features"].ndim != 2:
                raise UserError("this dataset has no region features; choose another data.dataset")
            return read["features"].shape[1]
        raise UserError("not one example of the data can be read; check data.root")


def _padded(features: np.ndarray, rows: int) -> np.ndarray:
    """[rows, D], zeros behind the last."""
    padded = np.zeros((rows, features.shape[1]), features.dtype)
    padded[: len(features)] = features
    return padded

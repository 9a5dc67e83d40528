"""Rows of regions: every sample once, in its image, in a fixed shape; all regions for matching."""

import numpy as np
import pytest

from trm_jax.data import pipeline
from trm_jax.data.examples import Examples
from trm_jax.data.region_rows import ImageRegions, RegionRows
from trm_jax.data.sources.labelled_regions import LabelledRegions, RegionGroup
from trm_jax.types import BadSampleError, UserError


class _Regions:
    """Images whose regions have so many words; the feature of a region is (image, region)."""

    width = 2
    words = tuple(f"w{k:02}" for k in range(9))
    word_counts = np.ones(9, np.int64)

    def __init__(self, *counts, broken=None):
        self.counts, self.broken = counts, broken
        self.ids = tuple(f"i{k}" for k in range(len(counts)))

    def __len__(self):
        return len(self.counts)

    def samples(self, index):
        pairs = [(r, w) for r, count in enumerate(self.counts[index]) for w in range(count)]
        return np.asarray(pairs, np.int32)

    def group(self, index):
        if index == self.broken:
            raise BadSampleError(f"{self.ids[index]}: broken")
        count = len(self.counts[index])
        features = np.stack([np.full(count, index), np.arange(count)], 1).astype(np.float16)
        return RegionGroup(features, None, self.samples(index))

    def report(self):
        return {}


DRAWS = np.random.default_rng(0)


def _random_counts(images=40):
    rng = np.random.default_rng(3)
    return [rng.integers(1, 6, rng.integers(1, 12)).tolist() for _ in range(images)]


def _pairs(source, image):
    """The (region, word) pairs of one image by their features."""
    features, _, samples = source.group(image)
    return [(*features[r].tolist(), w) for r, w in samples.tolist()]


def _row_pairs(row):
    kept = row["sample_word"] >= 0
    np.testing.assert_array_equal(kept, row["sample_region"] >= 0)
    places = zip(
        row["sample_region"][kept].tolist(), row["sample_word"][kept].tolist(), strict=True
    )
    return [(*row["features"][r].tolist(), w) for r, w in places]


def test_rows_by_hand():
    """Regions with 2, 1, 3, 1 and 1 words, in rows of 3 regions and 4 samples."""
    source = _Regions([1], [2, 1, 3, 1, 1])
    rows = RegionRows(source, regions=3, samples=4)
    assert isinstance(rows, Examples) and len(rows) == 4
    second = rows.sample(2, DRAWS)
    assert {name: (array.dtype.name, array.shape) for name, array in second.items()} == {
        "features": ("float32", (3, 2)),
        "region_mask": ("bool", (3,)),
        "sample_region": ("int32", (4,)),
        "sample_word": ("int32", (4,)),
        "index": ("int32", ()),
        "valid": ("bool", ()),
    }
    # Row 1 holds regions 0 and 1 (a third would make 6 samples), row 2 regions 2 and 3, row 3 the
    # last alone.
    first, third = rows.sample(1, DRAWS), rows.sample(3, DRAWS)
    assert first["features"].tolist() == [[1, 0], [1, 1], [0, 0]]
    assert first["region_mask"].tolist() == [True, True, False]
    assert first["sample_region"].tolist() == [0, 0, 1, -1]
    assert first["sample_word"].tolist() == [0, 1, 0, -1]
    assert second["features"].tolist() == [[1, 2], [1, 3], [0, 0]]
    assert second["sample_region"].tolist() == [0, 0, 0, 1]
    assert second["sample_word"].tolist() == [0, 1, 2, 0]
    assert third["features"].tolist() == [[1, 4], [0, 0], [0, 0]]
    assert third["sample_word"].tolist() == [0, -1, -1, -1]
    assert [int(rows.sample(k, DRAWS)["index"]) for k in range(4)] == [0, 1, 1, 1]
    assert rows.report() == {
        "rows": 4,
        "rows_regions": 6,
        "rows_samples": 9,
        "rows_most_samples": 4,
    }


@pytest.mark.parametrize("attention_set", ["image", "region"])
@pytest.mark.parametrize(("regions", "samples"), [(36, 64), (3, 7), (1, 5), (4, 5), (11, 5)])
def test_every_sample_is_in_one_row_of_its_image(attention_set, regions, samples):
    source = _Regions(*_random_counts())
    rows = RegionRows(source, regions=regions, samples=samples, attention_set=attention_set)
    found = [[] for _ in source.ids]
    places = set()
    for position in range(len(rows)):
        row = rows.sample(position, DRAWS)
        image, mask = int(row["index"]), row["region_mask"]
        # Regions of one image come first, in its order, all with a sample; behind them are zeros.
        own = row["features"][mask]
        assert mask.tolist() == sorted(mask, reverse=True) and not row["features"][~mask].any()
        assert (own[:, 0] == image).all() and (np.diff(own[:, 1]) == 1).all() and mask.any()
        assert {*row["sample_region"].tolist()} - {-1} == set(range(mask.sum()))
        # No region is in two rows, so all samples of a region are in one.
        regions_here = {(image, int(r)) for r in own[:, 1]}
        assert not regions_here & places
        places |= regions_here
        found[image] += _row_pairs(row)
        assert len(mask) == (regions if attention_set == "image" else 1)
    assert found == [_pairs(source, image) for image in range(len(source))]
    if (attention_set, regions) == ("image", 36):
        assert len(rows) == len(source)
    if attention_set == "region":
        assert len(rows) == sum(map(len, source.counts))


def test_a_pass_of_the_pipeline_loses_nothing_and_repeats():
    """Against the source, over batches with padding, one broken image, two processes."""
    source = _Regions(*_random_counts(), broken=5)
    rows = RegionRows(source, regions=4, samples=6)
    wanted = [pair for k in range(len(source)) if k != 5 for pair in _pairs(source, k)]
    seen = []
    for rank in range(2):
        batches = pipeline.eval_batches(rows, batch_size=8, process_index=rank, process_count=2)
        for batch in batches:
            for k in range(4):
                row = {name: array[k] for name, array in batch.items()}
                seen += _row_pairs(row)
                assert row["valid"] == (row["index"] not in (-1, 5)) == row["region_mask"].any()
    assert sorted(seen) == sorted(wanted) and len(seen) > 500
    runs = [list(pipeline.train_batches(rows, batch_size=8, seed=1, num_steps=4)) for _ in "ab"]
    for first, second in zip(*runs, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def test_a_blank_has_the_shapes_of_a_row():
    rows = RegionRows(_Regions([2], [1, 1, 1]), regions=2, samples=3)
    row, blank = rows.sample(2, DRAWS), rows.blank(2)
    shapes = [{k: (v.shape, v.dtype) for k, v in sample.items()} for sample in (row, blank)]
    assert shapes[0] == shapes[1] and blank["index"] == 1 and rows.blank(-1)["index"] == -1
    assert not blank["valid"] and not blank["region_mask"].any() and not blank["features"].any()
    assert {*blank["sample_word"], *blank["sample_region"]} == {-1}


def test_what_no_row_can_hold_is_refused():
    with pytest.raises(UserError, match="image i1: a region has 5 words, a row holds 4; set samp"):
        RegionRows(_Regions([1], [1, 5]), samples=4)
    with pytest.raises(UserError, match="attention_set is 'batch'; it is image or region"):
        RegionRows(_Regions([1]), attention_set="batch")
    for options in ({"regions": 0}, {"samples": 0}):
        with pytest.raises(UserError, match="give 1 or more"):
            RegionRows(_Regions([1]), **options)

    class Wide(_Regions):
        def group(self, index):
            return RegionGroup(np.zeros((1, 3), np.float32), None, self.samples(index))

    with pytest.raises(BadSampleError, match=r"image i0: features are \[1, 3\]"):
        RegionRows(Wide([1])).sample(0, DRAWS)


class _Images:
    """Images with 1, 3 and 0 regions; a fourth cannot be read, a fifth has another width."""

    class_names, ids = (), tuple("abcde")
    labels = np.zeros((5, 0), np.int8)
    features = (np.ones((1, 2), np.float16), np.arange(6.0).reshape(3, 2), np.zeros((0, 2)))

    def __len__(self):
        return 5

    def captions(self, index):
        return ()

    def read(self, index):
        if index == 3:
            raise BadSampleError("d: broken")
        return {"features": self.features[index] if index < 3 else np.zeros((2, 3))}


def test_all_regions_of_an_image_stand_for_it():
    examples = ImageRegions(_Images(), 4)
    assert isinstance(examples, Examples) and examples.width == 2
    batch = next(iter(pipeline.eval_batches(examples, batch_size=6)))
    assert batch["index"].tolist() == [0, 1, 2, 3, 4, -1]
    assert batch["valid"].tolist() == [True, True, True, False, False, False]
    assert batch["region_mask"].sum(1).tolist() == [1, 3, 0, 0, 0, 0]
    assert batch["features"].dtype == np.float32
    for row, features in zip(batch["features"], _Images.features, strict=False):
        padded = np.zeros((4, 2))
        padded[: len(features)] = features
        np.testing.assert_array_equal(row, padded)
    with pytest.raises(BadSampleError, match=r"image e: features \[2, 3\] are not finite .*\[r, 2"):
        examples.sample(4, DRAWS)
    with pytest.raises(UserError, match="image b has 3 regions, rows are declared for 2"):
        ImageRegions(_Images(), 2).sample(1, DRAWS)
    with pytest.raises(UserError, match="regions is 0"):
        ImageRegions(_Images(), 0)


@pytest.mark.realdata
def test_the_regions_of_coco_photos_are_all_there(data_root):
    source = LabelledRegions(data_root / "coco_regions" / "train2017.npz")
    rows = RegionRows(source, regions=8, samples=8)
    counts = np.zeros(len(source.words), np.int64)
    total = 0.0
    for position in range(len(rows)):
        row = rows.sample(position, DRAWS)
        kept = row["sample_word"] >= 0
        np.add.at(counts, row["sample_word"][kept], 1)
        total += row["features"].sum(dtype=np.float64)
    np.testing.assert_array_equal(counts, source.word_counts)
    assert counts.sum() == 1981 and len(rows) > len(source)
    with np.load(data_root / "coco_regions" / "train2017.npz") as arrays:
        np.testing.assert_allclose(total, arrays["features"].sum(dtype=np.float64), rtol=1e-4)

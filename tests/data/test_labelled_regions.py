"""Word-labelled regions of an npz file: words, groups, boxes, captions, and what is refused."""

import pickle

import numpy as np
import pytest

from trm_jax.data.sources.labelled_regions import (
    CaptionedRegions,
    LabelledRegions,
    RegionSource,
    save_arrays,
)
from trm_jax.data.sources.region_words import clean_word, lay_out
from trm_jax.types import BadSampleError, UserError

# Six regions of three images and of none, in no order; row 5 has no word that can stay.
FEATURES = np.arange(12, dtype=np.float16).reshape(6, 2)
WORDS = np.asarray(
    [
        ["Dog", "brown"],
        ["cat", ""],
        ["traffic_light", "Red!"],
        ["dog", "dog"],
        ["", "brown"],
        ["?"] * 2,
    ]
)
IDS = np.asarray([7, 9, 7, 9, -1, 12])
BOXES = np.asarray([[1, 2, 3, 4]] * 6, np.float32) * np.arange(1, 7, dtype=np.float32)[:, None]


def _write(path, **changes):
    arrays = {"features": FEATURES, "words": WORDS, "image_ids": IDS, "boxes": BOXES, **changes}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("traffic_light", "traffic light"),
        ("T-Shirt", "t-shirt"),
        (" -men's_ ", "mens"),
        ("black/white", "black white"),
        ("t.v.", "tv"),
        ("ÉCLAIR", "éclair"),
        ("#1 (one)", "1 one"),
        ("--", ""),
        ("_", ""),
    ],
)
def test_words_have_one_spelling(text, word):
    assert clean_word(text) == word
    assert clean_word(word) == word


def test_a_file_is_read_by_images(tmp_path):
    source = LabelledRegions(_write(tmp_path / "a.npz"))
    assert isinstance(source, RegionSource)
    assert source.words == ("brown", "cat", "dog", "red", "traffic light")
    assert source.word_counts.tolist() == [2, 1, 2, 1, 1]
    assert source.ids == ("7", "9", "region-4") and len(source) == 3 and source.width == 2
    # Image 7 has the rows 0 and 2, image 9 the rows 1 and 3; the word of row 3 counts once.
    expected = [
        ([0, 2], [[0, 0], [0, 2], [1, 3], [1, 4]]),
        ([1, 3], [[0, 1], [1, 2]]),
        ([4], [[0, 0]]),
    ]
    for index, (rows, samples) in enumerate(expected):
        group = source.group(index)
        np.testing.assert_array_equal(group.features, FEATURES[rows])
        assert group.features.dtype == np.float16 and group.samples.dtype == np.int32
        assert group.samples.tolist() == samples == source.samples(index).tolist()
        # x, y, width, height (1, 2, 3, 4) is the box (1, 2, 4, 6); row k has k + 1 times that.
        corners = np.outer(np.asarray(rows) + 1, [1, 2, 4, 6])
        np.testing.assert_array_equal(group.boxes, corners)
    assert source.report() == {
        "images": 3,
        "regions": 5,
        "samples": 7,
        "words": 5,
        "min_count": 1,
        "dropped_words": 0,
        "dropped_samples": 0,
        "regions_without_word": 1,
    }


def test_rare_words_go_with_their_regions_and_images(tmp_path):
    source = LabelledRegions(_write(tmp_path / "a.npz", boxes=None), min_count=2)
    assert source.words == ("brown", "dog") and source.word_counts.tolist() == [2, 2]
    assert source.ids == ("7", "9", "region-4")
    # Row 2 lost both words, row 1 its only one: the regions are numbered anew.
    groups = [source.group(index) for index in range(3)]
    assert [group.samples.tolist() for group in groups] == [[[0, 0], [0, 1]], [[0, 1]], [[0, 0]]]
    np.testing.assert_array_equal(groups[1].features, FEATURES[[3]])
    assert groups[0].boxes is None
    report = source.report()
    assert (report["dropped_words"], report["dropped_samples"], report["regions"]) == (3, 3, 3)
    with pytest.raises(UserError, match=r"a.npz: no word has 3 regions, the most frequent has 2"):
        LabelledRegions(tmp_path / "a.npz", min_count=3)
    with pytest.raises(UserError, match="min_count is 0"):
        LabelledRegions(tmp_path / "a.npz", min_count=0)


def test_regions_without_images_are_alone_and_one_word_needs_no_table(tmp_path):
    words = np.asarray(["b", "a", "b", "a", "a", "a"])
    source = LabelledRegions(_write(tmp_path / "a.npz", words=words, image_ids=None))
    assert source.ids == tuple(f"region-{row}" for row in range(6))
    assert [source.samples(k).tolist() for k in range(3)] == [[[0, 1]], [[0, 0]], [[0, 1]]]
    ids = np.asarray(["x", "", "x", "w", "", "w"])
    source = LabelledRegions(_write(tmp_path / "a.npz", words=words, image_ids=ids))
    assert source.ids == ("x", "region-1", "w", "region-4")
    assert [len(source.group(k).features) for k in range(4)] == [2, 1, 2, 1]


def test_a_copy_for_a_worker_reads_the_file_itself(tmp_path):
    features = np.random.default_rng(0).standard_normal((6, 5000)).astype(np.float32)
    source = LabelledRegions(_write(tmp_path / "a.npz", features=features))
    data = pickle.dumps(source)
    assert len(data) < features.nbytes / 10
    np.testing.assert_array_equal(pickle.loads(data).group(1).features, features[[1, 3]])


def test_a_layout_loses_no_sample():
    """Against a dictionary of sets, with repeated pairs and numbers in no order."""
    rng = np.random.default_rng(1)
    group, region, word = (rng.integers(0, high, 400) for high in (30, 5, 40))
    names = [f"w{k}" for k in rng.permutation(40)]
    pairs = set(zip(group.tolist(), region.tolist(), word.tolist(), strict=True))
    counts = {k: sum(w == k for _, _, w in pairs) for k in range(40)}
    layout = lay_out(group, region, word, names, min_count=9, place="x")
    kept = {k for k in range(40) if counts[k] >= 9}
    assert layout.words == tuple(sorted(names[k] for k in kept)) and 0 < len(kept) < 40
    assert layout.counts.tolist() == [counts[names.index(w)] for w in layout.words]
    found = set()
    for index, number in enumerate(layout.groups.tolist()):
        regions, samples = layout.group_regions(index), layout.group_samples(index)
        assert sorted({*samples[:, 0].tolist()}) == list(range(len(regions)))
        assert samples.tolist() == sorted(samples.tolist())
        found |= {(number, int(regions[r]), names.index(layout.words[w])) for r, w in samples}
    assert found == {pair for pair in pairs if pair[2] in kept}
    assert layout.num_dropped_samples == len(pairs) - len(found)


class _Captions:
    """Images 9, 5 and 7 with captions."""

    class_names = ()
    labels = np.zeros((3, 0), np.int8)
    ids = ("9", "5", "7")

    def __len__(self):
        return 3

    def read(self, index):
        return {} if index else {"image": np.full((2, 3, 3), 9, np.uint8)}  # of image 9 alone

    def captions(self, index):
        return (f"caption of {self.ids[index]}",)


def test_captions_find_the_regions_of_their_images(tmp_path):
    source = CaptionedRegions(_write(tmp_path / "a.npz", words=None), _Captions())
    assert source.ids == ("9", "7") and source.num_without_regions == 1 and len(source) == 2
    for index, rows in enumerate(([1, 3], [0, 2])):
        np.testing.assert_array_equal(source.read(index)["features"], FEATURES[rows])
        np.testing.assert_array_equal(
            source.region_boxes(index), np.outer(np.asarray(rows) + 1, [1, 2, 4, 6])
        )
        assert source.captions(index) == (f"caption of {source.ids[index]}",)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.read(1)["features"], FEATURES[[0, 2]])
    assert source.picture(0).shape == (2, 3, 3) and source.picture(0).max() == 9
    with pytest.raises(BadSampleError, match="image 7: its source has no images"):
        source.picture(1)
    bare = CaptionedRegions(_write(tmp_path / "b.npz", boxes=None), _Captions())
    with pytest.raises(BadSampleError, match="image 9: its file of regions has no boxes"):
        bare.region_boxes(0)
    with pytest.raises(UserError, match=r"has no array 'image_ids'"):
        CaptionedRegions(_write(tmp_path / "c.npz", image_ids=None), _Captions())
    other = _write(tmp_path / "d.npz", image_ids=IDS + 100)
    with pytest.raises(UserError, match=r"d.npz has regions of none of the 3 images; it has 107"):
        CaptionedRegions(other, _Captions())


_NAN = FEATURES.copy()
_NAN[4, 1] = np.nan
_FLAT = BOXES.copy()
_FLAT[3, 2] = 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": None}, r"no array 'words'; .* it has features, image_ids, boxes"),
        ({"features": None}, "no array 'features'"),
        ({"features": _NAN}, "features of row 4 hold a NaN or an infinity"),
        ({"features": FEATURES[0]}, r"features are float16 \[2\], not floats \[N, D\]"),
        ({"features": FEATURES.astype(int)}, r"features are int64 \[6, 2\]"),
        ({"words": WORDS[:4]}, "4 words for 6 rows of features"),
        ({"words": np.zeros(6)}, r"words are float64 \[6\], not strings"),
        ({"words": np.asarray(["a"] * 6, object)}, r"save words as np.asarray\(words, str\)"),
        ({"words": np.asarray(["?"] * 6)}, "not one of its words can be used"),
        ({"image_ids": IDS[:5]}, "5 image_ids for 6 rows"),
        ({"image_ids": IDS.astype(float)}, "image_ids are float64"),
        ({"boxes": BOXES[:, :3]}, r"boxes are float32 \[6, 3\], not numbers \[N, 4\]"),
        ({"boxes": _FLAT}, r"box of row 3 is \[4.0, 8.0, 0.0, 16.0\], .* no extent as xywh"),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_line(tmp_path, changes, message):
    path = _write(tmp_path / "a.npz", **changes)
    with pytest.raises(UserError, match=message) as error:
        LabelledRegions(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_npz_and_boxes_of_another_format(tmp_path):
    whole = _write(tmp_path / "a.npz").read_bytes()
    np.save(tmp_path / "b.npy", FEATURES)
    for name, data in (("c.npz", whole[:300]), ("d.npz", b""), ("e.npz", b"words")):
        (tmp_path / name).write_bytes(data)
    for name in ("b.npy", "c.npz", "d.npz", "e.npz"):
        with pytest.raises(UserError, match=f"{name} cannot be read as an npz of regions"):
            LabelledRegions(tmp_path / name)
    with pytest.raises(UserError, match=r"none.npz does not exist"):
        LabelledRegions(tmp_path / "none.npz")
    with pytest.raises(UserError, match="box_format is 'xyz'"):
        LabelledRegions(tmp_path / "a.npz", box_format="xyz")
    # (1, 2) to (3, 4) has an extent.
    group = LabelledRegions(tmp_path / "a.npz", box_format="xyxy").group(1)
    np.testing.assert_array_equal(group.boxes, BOXES[[1, 3]])
    with pytest.raises(UserError, match=r"cannot be written \(.*\); use another folder"):
        save_arrays(tmp_path / "a.npz" / "x.npz", "use another folder", a=np.zeros(1))


@pytest.mark.realdata
def test_the_boxes_of_coco_photos(data_root):
    source = LabelledRegions(data_root / "coco_regions" / "train2017.npz")
    report = source.report()
    assert report["regions"] == report["samples"] == source.word_counts.sum() == 1981
    assert len(source.words) == 80 and source.width == 96 and "traffic light" in source.words
    with np.load(data_root / "coco_regions" / "train2017.npz") as arrays:
        words, ids, features = (arrays[k] for k in ("words", "image_ids", "features"))
    assert len(source) == len({*ids.tolist()})
    counts = dict(zip(source.words, source.word_counts.tolist(), strict=True))
    assert counts["person"] == (words == "person").sum()
    seen = 0
    for index in range(len(source)):
        group = source.group(index)
        rows = np.flatnonzero(ids == int(source.ids[index]))
        np.testing.assert_array_equal(group.features, features[rows])
        assert [source.words[k] for k in group.samples[:, 1]] == words[rows].tolist()
        assert group.boxes is not None and group.boxes.min() >= 0 and group.boxes.max() <= 641
        seen += len(rows)
    assert seen == 1981

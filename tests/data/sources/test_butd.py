"""Region features in TSV and npz files: what is read, the index, and what is refused."""

import os
import pickle

import numpy as np
import pytest

from tests.data.sources.regions import line, region, write_npz, write_tsv
from trm_jax.data.sources import butd
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.butd import ButdRegions
from trm_jax.types import BadSampleError, UserError

NAMES = ["9", "COCO_val2014_000000000007", "ü"]


def _check(source, number, position, regions):
    """The image of `number` lies at `position`, cut to its first regions."""
    features, boxes = region(number)
    np.testing.assert_array_equal(source.read(position)["features"], features[:regions])
    found, size = source.boxes(position)
    np.testing.assert_array_equal(found, boxes[:regions])
    assert size == (50, 33) and found.dtype == np.float32


@pytest.mark.parametrize("columns", [6, 10])
def test_a_tsv_is_read_at_random(tmp_path, columns):
    path = write_tsv(tmp_path / "a.tsv", NAMES, columns)
    source = ButdRegions(path, regions=3)
    assert isinstance(source, Source)
    assert source.ids == tuple(NAMES) and len(source) == 3 and source.width == 3
    assert source.labels.shape == (3, 0) and source.captions(1) == ()
    for position in (2, 0, 1):
        _check(source, position, position, 3)
    assert source.find(["none", "7", "COCO_val2014_000000000007"]) == 1
    assert source.find(["none"]) is None
    again = pickle.loads(pickle.dumps(source))
    _check(again, 2, 2, 3)


def test_several_files_are_one_and_a_repeated_image_is_its_first(tmp_path):
    write_tsv(tmp_path / "t.tsv.0", ["a", "b"])
    # The second file repeats "b", with other numbers, and ends with a blank line.
    lines = [line(name, *region(number)) for name, number in (("b", 7), ("c", 2))]
    (tmp_path / "t.tsv.1").write_bytes(b"".join(lines) + b"\n")
    (tmp_path / "notes.txt").write_text("no regions")
    source = ButdRegions(tmp_path, regions=4)
    assert source.ids == ("a", "b", "c")
    for position in range(3):
        _check(source, position, position, 4)
    before = source.fingerprint()
    with (tmp_path / "t.tsv.1").open("ab") as file:
        file.write(line("d", *region(3)))
    assert ButdRegions(tmp_path, regions=4).fingerprint() != before


def test_npz_files_of_all_spellings(tmp_path):
    write_npz(tmp_path / "a.npz", 0)
    write_npz(tmp_path / "b.npz", 1, key="features")
    features, boxes = region(2)
    rest = {"bbox": boxes, "image_w": 50, "image_h": 33}
    np.savez(tmp_path / "c.jpg.npz", x=features.T, num_bbox=4, **rest)  # transposed
    padded = np.concatenate([features, np.zeros((2, 3), np.float32)])
    np.savez(tmp_path / "d.npz", feat=padded, num_bbox=4, **rest)
    np.savez(tmp_path / "e.npz", feat=features.astype(np.float16))
    source = ButdRegions(tmp_path, regions=4)
    assert source.ids == ("a", "b", "c.jpg", "d", "e")
    for position, number in enumerate((0, 1, 2, 2)):
        _check(source, number, position, 4)
    assert source.read(4)["features"].dtype == np.float16
    with pytest.raises(BadSampleError, match="e.npz has no boxes"):
        source.boxes(4)


def test_an_image_that_cannot_be_used_is_a_bad_sample(tmp_path):
    write_npz(tmp_path / "a.npz", 0)
    write_npz(tmp_path / "b.npz", 1, count=2)
    write_npz(tmp_path / "c.npz", 2, width=5)
    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    write_npz(tmp_path / "e.npz", 4, key="pixels")
    np.savez(tmp_path / "f.npz", x=np.full((4, 3), np.nan, np.float32))
    np.savez(tmp_path / "g.npz", x=np.zeros((4, 3), np.int64))
    np.savez(tmp_path / "h.npz", x=np.zeros((4, 3)), bbox=np.zeros(4), image_w=1, image_h=1)
    write_npz(tmp_path / "i.npz", 1)
    source = ButdRegions(tmp_path, regions=3)
    (tmp_path / "i.npz").unlink()
    reasons = {
        "b": "2 regions, 3 are needed",
        "c": "features have 5 numbers, not 3 as in the first image",
        "d": "d.npz: ",
        "e": "none of the arrays x, features, feat",
        "f": "a NaN or an infinity",
        "g": r"x is int64 \[4, 3\]",
        "h": r"bbox is \[4\], not \[4, 4\]",
        "i": "No such file",
    }
    for position, reason in enumerate(reasons.values(), start=1):
        with pytest.raises(BadSampleError, match=reason) as error:
            source.read(position)
        assert str(tmp_path / source.ids[position]) in str(error.value)
    with pytest.raises(UserError, match=r"b.npz: 2 regions.*not one of the first images"):
        ButdRegions(tmp_path / "b.npz", regions=3)


def test_damaged_lines_of_a_tsv(tmp_path):
    features, boxes = region(0)
    good = line("a", features, boxes)
    cells = good.split(b"\t")
    short = b"\t".join([*cells[:-1], cells[-1][:-9] + b"\n"])
    rows = [good, short, good.replace(b"\t4\t", b"\tfour\t"), good.replace(b"\t4\t", b"\t5\t")]
    rows += [line("e", features, boxes[:, :3]), good.replace(b"\t50\t", b"\tw\t"), good[:-20]]
    named = [b"%d" % n + row[1:] for n, row in enumerate(rows)]
    (tmp_path / "a.tsv").write_bytes(b"".join(named))
    source = ButdRegions(tmp_path / "a.tsv", regions=4)
    assert len(source) == 7
    for position in range(1, 7):
        with pytest.raises(BadSampleError, match=f"a.tsv, image {position}: "):
            source.read(position)
    _check(source, 0, 0, 4)


def test_a_line_of_other_columns_is_named(tmp_path):
    path = write_tsv(tmp_path / "a.tsv", NAMES)
    whole = path.read_bytes()
    path.write_bytes(whole + b"x\ty\tz\n")
    with pytest.raises(UserError, match=r"a.tsv, line 4: 3 columns; .* 6 or 10$"):
        ButdRegions(path)
    path.write_bytes(whole[: whole.rindex(b"50")])
    with pytest.raises(UserError, match="line 3: 2 columns; .*; the file is cut short"):
        ButdRegions(path)


def test_the_index_is_made_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
    path = write_tsv(tmp_path / "a.tsv", NAMES)
    scans = []
    scan = butd._scan
    monkeypatch.setattr(butd, "_scan", lambda *args: scans.append(args) or scan(*args))
    ButdRegions(path, regions=4)
    source = ButdRegions(path, regions=4)
    assert len(scans) == 1
    _check(source, 1, 1, 4)
    index = tmp_path / "a.tsv.npz"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tsv", index.name]
    write_tsv(path, ["z", *NAMES])
    os.utime(path, ns=(1, 1))
    assert ButdRegions(path, regions=4).ids[0] == "z" and len(scans) == 2
    index.write_bytes(index.read_bytes()[:-30])
    _check(ButdRegions(path, regions=4), 3, 3, 4)
    assert len(scans) == 3
    # Files of one name from two folders share no index.
    other = write_tsv(tmp_path / "more" / "a.tsv", ["q"])
    for file, first in ((path, "z"), (other, "q")):
        assert ButdRegions(file, regions=4, index_dir=tmp_path / "i").ids[0] == first
    assert len(list((tmp_path / "i").iterdir())) == 2
    with pytest.raises(UserError, match="cannot be written .*set data.options.index_dir"):
        ButdRegions(path, index_dir=path)


def test_places_without_regions_are_refused(tmp_path):
    with pytest.raises(UserError, match="missing does not exist"):
        ButdRegions(tmp_path / "missing")
    with pytest.raises(UserError, match=r"neither \*.tsv nor \*.npz"):
        ButdRegions(tmp_path)
    (tmp_path / "a.tsv").write_bytes(b"")
    with pytest.raises(UserError, match="has no image"):
        ButdRegions(tmp_path)
    with pytest.raises(UserError, match="regions is 0"):
        ButdRegions(tmp_path, regions=0)


@pytest.mark.realdata
def test_a_real_file_of_ten_images(data_root, tmp_path):
    source = ButdRegions(data_root / "visual_genome" / "butd_demo", index_dir=tmp_path)
    assert len(source) == 10 and source.width == 2048
    assert source.ids[0] == "COCO_train2014_000000132417"
    for index in range(10):
        features = source.read(index)["features"]
        # A ReLU and a mean over pixels: nothing is negative, and the scale is known.
        assert features.shape == (36, 2048) and features.min() >= 0 and 0.1 < features.mean() < 1
        boxes, (width, height) = source.boxes(index)
        assert np.all(boxes[:, 2:] > boxes[:, :2]) and boxes.min() >= 0
        assert np.all(boxes[:, 2] <= width) and np.all(boxes[:, 3] <= height)
    assert source.boxes(0)[1] == (500, 333)

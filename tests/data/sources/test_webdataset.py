"""WebDataset shards: what is found in them, what damage costs, and that nothing is held open."""

import io
import json
import os
import pickle
import shutil
import tarfile
import threading

import numpy as np
import pytest

from tests.data.sources.shards import caption, image, make_shards, members, write_tar
from trm_jax.data.examples import CaptionExamples
from trm_jax.data.sources import open_source, tar_index, webdataset
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.webdataset import WebDataset, find_shards
from trm_jax.data.tokenizers import WordTokenizer
from trm_jax.types import BadSampleError, UserError


def _red(source, index):
    return int(source.read(index)["image"][0, 0, 0])


def _check(source, numbers):
    """The samples are those of `numbers`, images beside their own captions."""
    assert [_red(source, i) for i in range(len(source))] == list(numbers)
    assert [source.captions(i) for i in range(len(source))] == [(caption(n),) for n in numbers]


def test_samples_in_the_order_of_the_shards(tmp_path, capsys):
    source = open_source("webdataset", "train", root=str(make_shards(tmp_path / "web")))
    assert isinstance(source, Source) and len(source) == 9
    _check(source, range(9))
    picture = source.read(5)["image"]
    assert picture.dtype == np.uint8 and picture.shape == (12, 16, 3)
    np.testing.assert_array_equal(picture[3, :, 1], np.arange(16))
    assert source.ids[4] == "00001/00004" and list(source.ids)[-1] == "00002/00008"
    assert source.ids[2:4] == ("00000/00002", "00000/00003") and len(source.ids) == 9
    assert source.labels.shape == (9, 0) and source.class_names == ()
    assert source.captioned == range(9) and source.encoded(7) == image(7)
    assert capsys.readouterr().out == ""
    with pytest.raises(IndexError):
        source.read(9)


def test_endings_folders_and_captions_of_the_json(tmp_path):
    content = []
    for number, ending in enumerate(("jpg", "JPEG", "webp", "png")):
        pair = members([number], ending.lower())
        content += [
            (f"./sub.dir/{name.replace(ending.lower(), ending)}", data) for name, data in pair
        ]
    write_tar(tmp_path / "a.tar", content)
    source = WebDataset(tmp_path, "train")
    assert source.ids[0] == "a/sub.dir/00000" and len(source) == 4
    for index in range(4):
        assert source.read(index)["image"].shape == (12, 16, 3)
    other = WebDataset(tmp_path, "train", caption_key="caption")
    assert [other.captions(i) for i in range(4)] == [(f"json {i}",) for i in range(4)]
    assert source.captions(2) == (caption(2),)


def test_json_captions_may_be_lists_or_useless(tmp_path):
    content = []
    for number, value in enumerate((["one ", "", "two"], 7, None, "x")):
        body = json.dumps({"texts": value}).encode() if number != 3 else b"[not JSON"
        content += [(f"{number}.png", image(number)), (f"{number}.json", body)]
    write_tar(tmp_path / "a.tar", content)
    source = WebDataset(tmp_path, "train", caption_key="texts")
    assert len(source) == 4 and source.captions(0) == ("one", "two")
    for index in (1, 2, 3):
        assert source.captions(index) == ()


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(tmp_path, format):
    long = "long-" * 60 + "kö"
    content = [(f"{long}{name}", data) for name, data in members([3, 4])] + members([5])
    write_tar(tmp_path / "a.tar", content, format)
    source = WebDataset(tmp_path, "train")
    _check(source, [3, 4, 5])
    assert list(source.ids) == [f"a/{long}00003", f"a/{long}00004", "a/00005"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, format):
    sizes = [0, 1, 511, 512, 513, 5000]
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for number, size in enumerate(sizes * 3):
            deep = f"{'folder/' * 16 * (number % 2)}{number}.jpg"  # beyond 100 letters: a prefix
            info = tarfile.TarInfo(deep)
            info.size, info.mtime = size, 1.5 if number % 3 else 7
            tar.addfile(info, io.BytesIO(bytes(size)))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                info = tarfile.TarInfo(f"{number}{kind!r}.jpg")
                info.type, info.linkname = kind, deep[-90:]
                tar.addfile(info)
    path = tmp_path / "a.tar"
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    with path.open("rb") as file:
        found = list(tar_index._members(file, path.stat().st_size))
    assert [member[:3] for member in found] == expected and len(expected) == 18


def test_incomplete_samples_are_left_out_and_counted(tmp_path, capsys):
    content = members(range(4))
    del content[1 * 3]  # no image
    content = [entry for entry in content if entry[0] != "00002.txt"]
    content += [("00009.json", b"{}"), ("._00001.jpg", b"mac"), ("README", b"x")]
    write_tar(tmp_path / "a.tar", content)
    _check(WebDataset(tmp_path, "train"), [0, 3])
    line = f"{tmp_path}: 4 samples lack an image or KEY.txt beside it and are left out\n"
    assert capsys.readouterr().out == line  # 1, 2, 9 and README
    WebDataset(tmp_path, "train")
    assert capsys.readouterr().out == line  # from the index as well


def test_what_cannot_be_used_is_a_bad_sample(tmp_path):
    content = members(range(4))
    content[0] = (content[0][0], b"")
    content[3] = (content[3][0], image(1, "jpeg")[:-9])
    content[8] = (content[8][0], b" \n")
    content[11] = (content[11][0], b"caf\xe9 \n")
    write_tar(tmp_path / "a.tar", content)
    source = WebDataset(tmp_path, "train")
    for index, wanted in ((0, "sample 0: the file is empty"), (1, "sample 1: .* truncated|not a")):
        with pytest.raises(BadSampleError, match=wanted):
            source.read(index)
    data = CaptionExamples(source, WordTokenizer(["photo"]), 4)
    with pytest.raises(BadSampleError, match="a/00002: the caption is empty"):
        data.sample(2, np.random.default_rng(0))
    assert source.captions(2) == ()
    assert source.captions(3) == ("caf\N{REPLACEMENT CHARACTER}",)


@pytest.mark.parametrize("where", ["data", "header", "before the text", "between", "end mark"])
def test_a_shard_that_was_cut_short(tmp_path, capsys, where):
    make_shards(tmp_path, (4, 2))
    path = tmp_path / "00000.tar"
    starts = write_tar(path, members(range(4)))  # three members a sample
    cut, whole = {
        "data": (starts[6] + 512 + 10, 2),
        "header": (starts[9] + 100, 3),
        "before the text": (starts[8], 2),
        "between": (starts[6], 2),
        "end mark": (starts[11] + 1024, 4),
    }[where]
    os.truncate(path, cut)
    source = WebDataset(tmp_path, "train")
    _check(source, [*range(whole), 4, 5])
    line = f"{path}: cut short at byte {cut:,}; its first {whole} samples are used\n"
    assert capsys.readouterr().out == line


def test_a_shard_with_a_damaged_header(tmp_path, capsys):
    path = tmp_path / "00000.tar"
    starts = write_tar(path, members(range(3)))
    content = bytearray(path.read_bytes())
    content[starts[4] : starts[4] + 512] = np.random.default_rng(0).bytes(512)
    path.write_bytes(content)
    _check(WebDataset(tmp_path, "train"), [0])
    line = f"{path}: damaged at byte {starts[4]:,}; its first 1 samples are used\n"
    assert capsys.readouterr().out == line


def test_shards_without_samples(tmp_path, capsys):
    make_shards(tmp_path, (1,))
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "html.tar").write_bytes(b"<html>" * 500)
    write_tar(tmp_path / "none.tar", [])
    assert len(WebDataset(tmp_path, "train")) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/empty.tar: cut short at byte 0; its first 0 samples are used",
        f"{tmp_path}/html.tar: damaged at byte 0; its first 0 samples are used",
        f"{tmp_path}/none.tar has no sample (an image and KEY.txt)",
    ]
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(UserError, match="not one sample in the 3 shards of"):
        WebDataset(tmp_path, "train")


def test_many_lines_are_cut(tmp_path, capsys):
    make_shards(tmp_path, (1,))
    for number in range(10):
        write_tar(tmp_path / f"x{number}.tar", [])
    WebDataset(tmp_path, "train")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[-1] == "and 2 more shards are damaged or have no sample"


def test_the_index_is_made_once_and_again_for_another_shard(tmp_path, monkeypatch):
    make_shards(tmp_path, (2, 2))
    scanned = []
    scan = tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda path, *a: scanned.append(path) or scan(path, *a))
    first = WebDataset(tmp_path, "train")
    assert sorted(path.name for path in scanned) == ["00000.tar", "00001.tar"]
    assert sorted(os.listdir(tmp_path))[1] == "00000.tar.txt.npz" and len(os.listdir(tmp_path)) == 4
    scanned.clear()
    before = first.fingerprint()
    assert list(WebDataset(tmp_path, "train").ids) == list(first.ids) and not scanned
    write_tar(tmp_path / "00001.tar", members([7, 8, 9]))
    _check(WebDataset(tmp_path, "train"), [0, 1, 7, 8, 9])
    assert [path.name for path in scanned] == ["00001.tar"]
    assert WebDataset(tmp_path, "train").fingerprint() != before
    (tmp_path / "00000.tar.txt.npz").write_bytes(b"PK half")
    _check(WebDataset(tmp_path, "train"), [0, 1, 7, 8, 9])
    with pytest.raises(UserError, match=r"00001.tar.txt.npz was replaced while it was in use"):
        tar_index._read_keys.cache_clear()
        first._id(2)


def test_the_index_may_lie_elsewhere(tmp_path):
    shards = make_shards(tmp_path / "web", (1, 1))
    other = make_shards(tmp_path / "other", (2, 1))  # the same names, in one folder of indexes
    for folder, count in ((shards, 2), (other, 3)):
        source = WebDataset(folder, "train", index_dir=str(tmp_path / "index"))
        _check(source, range(count))
        assert source.ids[0] == "00000/00000"
    assert sorted(os.listdir(shards)) == ["00000.tar", "00001.tar"]
    assert len(os.listdir(tmp_path / "index")) == 4
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written .*; set data.options.index_dir"):
        WebDataset(shards, "train", index_dir=str(tmp_path / "file"))


def test_racing_threads_and_pickles(tmp_path, monkeypatch):
    make_shards(tmp_path, (3, 3, 3, 3))
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(WebDataset(tmp_path, "train")))
        for _ in range(4)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(made) == 4 and len(os.listdir(tmp_path)) == 8  # no stray temporary file
    source = pickle.loads(pickle.dumps(made[0]))
    # Fewer files than shards: they are closed and opened while threads read.
    small = webdataset.functools.lru_cache(maxsize=1)(webdataset._opened.__wrapped__)
    monkeypatch.setattr(webdataset, "_opened", small)
    wrong = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, 12, 200).tolist():
            if _red(source, index) != index or source.captions(index) != (caption(index),):
                wrong.append(index)

    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong and len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_shard_that_vanishes_or_shrinks_later(tmp_path):
    make_shards(tmp_path, (2, 2))
    source = WebDataset(tmp_path, "train")
    (tmp_path / "00000.tar").unlink()
    os.truncate(tmp_path / "00001.tar", 1000)
    with pytest.raises(BadSampleError, match="00000.tar: No such file"):
        source.read(0)
    with pytest.raises(BadSampleError, match="00001.tar was cut short since it was indexed"):
        source.read(3)


def test_patterns(tmp_path, monkeypatch):
    make_shards(tmp_path, (1,) * 12)
    names = [f"{n:05d}.tar" for n in range(12)]

    def found(root, *shards):
        return [path.name for path in find_shards(root, shards)]

    assert found(tmp_path) == names
    assert found(f"{tmp_path}/{{00008..00011}}.tar") == names[8:]
    assert found(f"{tmp_path}/000{{01,0{{3,2}}}}.tar") == [names[n] for n in (1, 3, 2)]
    assert found(f"{tmp_path}/0001*.tar") == names[10:]
    assert found(f"{tmp_path}/00003.tar") == names[3:4]
    assert found(tmp_path, "00005.tar", "0000[45].tar") == [names[5], names[4]]
    with pytest.raises(UserError, match=r"00012.tar does not exist \(2 of 4 shards of"):
        find_shards(f"{tmp_path}/{{00010..00013}}.tar")
    with pytest.raises(UserError, match="x has no shard"):
        (tmp_path / "x").mkdir()
        find_shards(tmp_path / "x")
    with pytest.raises(UserError, match=r"there is no shard .*/\*x.tar"):
        find_shards(tmp_path / "*x.tar")
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_shards(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    assert WebDataset("0000[12].tar", "train").ids[:] == ("00001/00001", "00002/00002")


def test_splits(tmp_path):
    make_shards(tmp_path / "web", (3,))
    with pytest.raises(UserError, match="has no folder 'test'.*test_root.*data.test_dataset"):
        open_source("webdataset", "test", root=str(tmp_path / "web"))
    make_shards(tmp_path / "web/test", (2,))
    shutil.copytree(tmp_path / "web/test", tmp_path / "other")
    make_shards(tmp_path / "other", (1,))
    assert len(open_source("webdataset", "train", root=str(tmp_path / "web"))) == 3
    assert len(open_source("webdataset", "test", root=str(tmp_path / "web"))) == 2
    other = {"root": str(tmp_path / "web"), "test_root": str(tmp_path / "other")}
    assert len(open_source("webdataset", "test", **other)) == 1

"""ArrayRecord pairs: made of captioned sources, read back, damaged, interrupted."""

import hashlib
import json
import os
import pickle
import threading

import cv2
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from tests.data.sources.shards import caption, image, make_shards, members, write_tar
from trm_jax.data import prepare_pairs as module
from trm_jax.data.prepare_pairs import prepare_pairs
from trm_jax.data.sources import open_source
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.pairs import PairRecords, pack, unpack
from trm_jax.types import BadSampleError, UserError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def web(tmp_path):
    """Samples 0 .. 5, of which 1 has no caption, 3 no image and 4 a torn one."""
    content = members(range(6), "jpg")
    content[5] = (content[5][0], b"  ")
    content[9] = (content[9][0], b"")
    content[12] = (content[12][0], content[12][1][:300])
    make_shards(tmp_path / "web/test", (2, 1))
    write_tar(tmp_path / "web/a.tar", content)
    return tmp_path / "web"


def _pairs(out, split="train"):
    return open_source("pairs", split, root=str(out))


def test_pairs_of_a_webdataset(web, out):
    metadata, there = prepare_pairs("webdataset", web, out, splits=("train", "test"))
    assert not there and json.loads((out / "pairs.json").read_text()) == metadata
    train = metadata["splits"]["train"]
    assert (train["images"], train["captions"], train["skipped"]) == (3, 3, 3)
    assert metadata["splits"]["test"]["images"] == 3 and metadata["dataset"] == "pairs"
    pairs, raw = _pairs(out), open_source("webdataset", "train", root=str(web))
    assert isinstance(pairs, Source) and len(pairs) == 3 and pairs.labels.shape == (3, 0)
    assert list(pairs.ids) == ["a/00000", "a/00002", "a/00005"] and pairs.captioned == range(3)
    for index, number in enumerate((0, 2, 5)):
        assert pairs.encoded(index) == image(number, "jpg")  # the very file
        assert pairs.captions(index) == (caption(number),)
        np.testing.assert_array_equal(pairs.read(index)["image"], raw.read(number)["image"])
    lines = (out / "skipped_train.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a/00001", "a/00003", "a/00004"]
    assert "the caption is empty" in lines[0] and "the file is empty" in lines[1]
    assert str(out.parent) not in (out / "ids_train.txt").read_text()
    with pytest.raises(IndexError):
        pairs.read(3)


def test_records_are_as_documented(web, out):
    metadata, _ = prepare_pairs("webdataset", web, out)
    digest = hashlib.sha256()
    reader = ArrayRecordReader(str(out / "train-00000.array_record"))
    records = reader.read_all()
    reader.close()
    for record, number in zip(records, (0, 2, 5), strict=True):
        size = int.from_bytes(record[:4], "little")
        head = {"id": f"a/{number:05d}", "captions": [caption(number)]}
        assert json.loads(record[4 : 4 + size]) == head
        assert record[4 + size :] == image(number, "jpg")
        digest.update(hashlib.sha256(record).digest())
    assert digest.hexdigest() == metadata["splits"]["train"]["sha256"]
    assert unpack(pack("kö", ["a\n", "b"], b"\0x")) == ("kö", ("a\n", "b"), b"\0x")


def test_several_captions_and_images_without_files(tmp_path, out, monkeypatch):
    monkeypatch.setattr(module, "_FILE_BYTES", 2000)
    metadata, _ = prepare_pairs("glyphs", "", out, options={"train_size": 6, "image_size": 32})
    scenes = open_source("glyphs", "train", train_size=6, image_size=32)
    pairs = _pairs(out)
    assert len(metadata["splits"]["train"]["files"]) > 2  # cut into files
    assert metadata["splits"]["train"]["captions"] == sum(len(scenes.captions(i)) for i in range(6))
    assert list(pairs.ids) == list(scenes.ids) and len(scenes.captions(0)) > 1
    for index in (5, 0, 3, 1, 4, 2):
        assert pairs.captions(index) == scenes.captions(index)
        np.testing.assert_array_equal(pairs.read(index)["image"], scenes.read(index)["image"])


def test_captioned_photos(tmp_path, out):
    (tmp_path / "Flicker8k_Dataset").mkdir()
    lines = []
    for number in range(3):
        content = image(number, "png" if number else "jpg")
        (tmp_path / f"Flicker8k_Dataset/{number}.jpg").write_bytes(content)
        lines += [f"{number}.jpg#{k}\tcaption {k} of {number}" for k in range(5)]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(lines))
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("2.jpg\n1.jpg\n")
    metadata, _ = prepare_pairs("flickr8k", tmp_path, out)
    assert metadata["splits"]["train"]["captions"] == 10
    pairs = _pairs(out)
    assert list(pairs.ids) == ["2.jpg", "1.jpg"]
    assert pairs.captions(0) == tuple(f"caption {k} of 2" for k in range(5))
    assert [int(pairs.read(i)["image"][0, 0, 0]) for i in (0, 1)] == [2, 1]
    # Other captions are another source, though the photos are the same.
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(lines).replace("caption 3", "text 3"))
    with pytest.raises(UserError, match="out was prepared from another source"):
        prepare_pairs("flickr8k", tmp_path, out)


def test_a_finished_folder_is_kept(web, out):
    first, _ = prepare_pairs("webdataset", web, out)
    again, there = prepare_pairs("webdataset", web, out)
    assert there and again == first
    with pytest.raises(UserError, match="another source .*; give another --out"):
        prepare_pairs("webdataset", web, out, options={"caption_key": "caption"})
    with pytest.raises(UserError, match="has no split 'test'; it has train. Prepare"):
        _pairs(out, "test")


def test_damage_is_found(web, out):
    prepare_pairs("webdataset", web, out)
    path = out / "train-00000.array_record"
    content = path.read_bytes()
    at = content.index(image(2, "jpg")) + 400
    damaged = bytes((*content[:at], content[at] ^ 255, *content[at + 1 :]))
    path.write_bytes(damaged)
    pairs = _pairs(out)
    assert pairs.captions(0) == (caption(0),) and pairs.captions(2) == (caption(5),)
    for call in (pairs.read, pairs.captions):
        with pytest.raises(BadSampleError, match="train-00000.array_record, record 1: "):
            call(1)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"array_record has .* of .* bytes; copy it again or run"):
        _pairs(out)
    path.unlink()
    with pytest.raises(UserError, match="train-00000.array_record is missing; run launch/prepare"):
        prepare_pairs("webdataset", web, out)
    (out / "pairs.json").write_text('{"layout": 0}')
    with pytest.raises(UserError, match="pairs.json is of another version"):
        _pairs(out)
    (out / "pairs.json").unlink()
    with pytest.raises(UserError, match="out has no pairs.json: it is no folder that launch/pre"):
        _pairs(out)


def test_ids_that_do_not_fit_are_refused(web, out):
    prepare_pairs("webdataset", web, out)
    (out / "ids_train.txt").write_text("a/00000\n")
    with pytest.raises(UserError, match="ids_train.txt has 1 ids for 3 records"):
        PairRecords(out, "train")._id(0)


def test_nothing_usable_leaves_nothing(web, out):
    write_tar(web / "a.tar", [("0.jpg", b""), ("0.txt", b"x"), ("1.jpg", image(1)), ("1.txt", b"")])
    with pytest.raises(UserError, match="not one train sample has an image and a caption"):
        prepare_pairs("webdataset", web, out)
    assert sorted(os.listdir(out.parent)) == ["web"]
    out.write_text("x")
    with pytest.raises(UserError, match="out is not an empty folder"):
        prepare_pairs("webdataset", web, out)


class _StopError(Exception):
    pass


@pytest.mark.parametrize("phase", ["reading", "checking"])
def test_an_interruption_leaves_nothing(web, out, phase):
    def stop(now, split, done, total):
        if (now, done) == (phase, 2):
            raise _StopError

    with pytest.raises(_StopError):
        prepare_pairs("webdataset", web, out, report=stop)
    assert sorted(os.listdir(out.parent)) == ["web"]
    seen = []
    prepare_pairs("webdataset", web, out, report=lambda *step: seen.append(step))
    assert seen == [("reading", "train", i, 6) for i in range(6)] + [
        ("checking", "train", i, 3) for i in range(3)
    ]


def test_records_that_differ_are_found(web, out, monkeypatch):
    monkeypatch.setattr(module.PairRecords, "record", lambda self, index: b"other")
    with pytest.raises(UserError, match="the train records differ from what was written"):
        prepare_pairs("webdataset", web, out)
    assert not out.exists()


def test_threads_and_pickles(tmp_path, out):
    write_tar(tmp_path / "web/a.tar", members(range(40)))
    prepare_pairs("webdataset", tmp_path / "web", out)
    pairs = pickle.loads(pickle.dumps(_pairs(out)))
    wrong = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, 40, 100).tolist():
            texts = pairs.captions(index)
            if int(pairs.read(index)["image"][0, 0, 0]) != index or texts != (caption(index),):
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_the_writer_stores_images_uncompressed(tmp_path, out):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = cv2.imencode(".bmp", noise)[1].tobytes()
    write_tar(tmp_path / "web/a.tar", [("0.png", file), ("0.txt", b"noise")])
    prepare_pairs("webdataset", tmp_path / "web", out)
    assert file in (out / "train-00000.array_record").read_bytes()


@pytest.mark.realdata
def test_pairs_of_real_photos(data_root, out):
    options = {"allow_empty_classes": True, "keep_empty": True}
    coco = data_root / "coco_subset"
    metadata, _ = prepare_pairs("coco", coco, out, options=options, splits=("train", "test"))
    counts = {name: facts["images"] for name, facts in metadata["splits"].items()}
    assert counts == {"train": 109, "test": 153}
    raw, pairs = open_source("coco", "test", root=str(coco), keep_empty=True), _pairs(out, "test")
    rows = [raw.ids.index(name) for name in pairs.ids]
    assert [pairs.captions(i) for i in range(153)] == [raw.captions(row) for row in rows]
    for index in (0, 80, 152):
        assert pairs.encoded(index) == raw.image_path(rows[index]).read_bytes()

"""Preparing: counts and hashes, what is refused, and what an interruption leaves."""

import fcntl
import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from tests.data.sources.layouts import VOC_TRAIN, make_coco, make_voc
from trm_jax.data import prepare as module
from trm_jax.data import prepare_records
from trm_jax.data.prepare import prepare
from trm_jax.data.sources import coco, open_source
from trm_jax.data.sources.coco import CocoImages
from trm_jax.data.sources.records import Records
from trm_jax.types import UserError


@pytest.fixture
def source(tmp_path):
    return make_coco(tmp_path / "COCO")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def _train(source, **options):
    return prepare("coco", source, source.parent / "out", splits=("train",), **options)


def test_counts_of_coco(source, out):
    metadata, there = prepare("coco", source, out)
    assert not there and json.loads((out / "prepared.json").read_text()) == metadata
    assert metadata["dataset"] == "coco" and metadata["year"] == "2017"
    assert metadata["class_names"] == ["cat", "dog"] and metadata["layout"] == 1
    train = metadata["splits"]["train"]
    # 100 to 106 without 103: three odd... cats are odd (101, 105), dogs even (100, 102, 104, 106).
    assert train["images"] == 7 and train["labelled"] == 6
    assert train["positives"] == {"cat": 2, "dog": 4} and train["difficult_only"] == 0
    assert train["captions"] == 4 and train["skipped"] == [] and train["num_file_rows"] == 7
    assert metadata["splits"]["test"]["images"] == 4


def test_counts_of_voc(tmp_path, out):
    metadata, _ = prepare("voc", make_voc(tmp_path / "VOC"), out)
    train = metadata["splits"]["train"]
    positives = {name: count for name, count in train["positives"].items() if count}
    assert positives == {"aeroplane": 1, "car": 1, "chair": 1, "dog": 1, "person": 1}
    assert train["images"] == 5 and train["labelled"] == 4 and train["difficult_only"] == 4
    assert (
        metadata["year"] == "2007"
        and "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt" in (metadata["source_files"])
    )


def test_hashes_are_those_of_the_files(source, out):
    metadata, _ = prepare("coco", source, out)
    raw = CocoImages(source, "train", keep_empty=True)
    digest = hashlib.sha256()
    for index, name in enumerate(raw.ids):
        image = hashlib.sha256(raw.image_path(index).read_bytes()).digest()
        digest.update(name.encode() + b"\0" + raw.labels[index].tobytes() + image)
    assert metadata["splits"]["train"]["sha256"] == digest.hexdigest()
    for name, value in metadata["source_files"].items():
        assert hashlib.sha256((source / name).read_bytes()).hexdigest() == value
    assert len(metadata["source_files"]) == 4


def test_the_xml_files_of_a_folder_have_one_hash(tmp_path, out):
    root = make_voc(tmp_path / "VOC", class_files=False)
    metadata, _ = prepare("voc", root, out, splits=("train",))
    folder = root / "VOCdevkit/VOC2007/Annotations"
    content = b"".join((folder / f"{name}.xml").read_bytes() for name in VOC_TRAIN)
    files = metadata["source_files"]
    key = "VOCdevkit/VOC2007/Annotations/*.xml"
    assert len(files) == 2 and files[key] == hashlib.sha256(content).hexdigest()


def test_large_splits_are_cut_into_files(source, out, monkeypatch):
    one, _ = prepare("coco", source, out)
    monkeypatch.setattr(prepare_records, "_SHARD_BYTES", 1500)
    many, _ = prepare("coco", source, out.with_name("many"))
    assert len(list(out.with_name("many").glob("*-train.array_record*"))) > 2
    assert many["splits"] == one["splits"]
    records = [Records(folder, "train") for folder in (out, out.with_name("many"))]
    assert [records[0][row]["image"] for row in range(7)] == [
        records[1][row]["image"] for row in range(7)
    ]


def test_a_finished_folder_is_kept(source, out):
    first, _ = prepare("coco", source, out)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again, there = prepare("coco", source, out)
    assert there and again == first
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match="was prepared from another source.*give another --out"):
        prepare("coco", source, out, splits=("train",))
    image = next((source / "train2017").iterdir())
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(UserError, match="was prepared from another source"):
        prepare("coco", source, out)


def test_a_damaged_finished_folder_is_not_kept(source, out):
    prepare("coco", source, out)
    next(out.glob("*-test.array_record*")).unlink()
    with pytest.raises(UserError, match="is missing; prepare the dataset again"):
        prepare("coco", source, out)


def test_folders_of_others_are_left_alone(source, out):
    out.mkdir()
    _train(source)  # an empty folder will do
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="out is not an empty folder; give another --out"):
        _train(source)
    shutil.rmtree(out)
    out.write_text("x")
    with pytest.raises(UserError, match="out is not an empty folder"):
        _train(source)


def test_missing_images_are_counted_before_anything_is_written(source, out):
    for number in (100, 101, 104, 106):
        (source / f"train2017/{number:012d}.jpg").unlink()
    with pytest.raises(
        UserError, match=r"train2017 lacks 4 of the 7 train images: 0+100.jpg, .* and 1 more; get"
    ):
        prepare("coco", source, out)
    assert os.listdir(out.parent) == ["COCO"]


def _break(source):
    for number, keep in ((102, 200), (105, 0)):
        path = source / f"train2017/{number:012d}.jpg"
        path.write_bytes(path.read_bytes()[:keep])


def test_broken_images_are_refused_or_left_out(source, out):
    _break(source)
    with pytest.raises(UserError, match="2 of 7 train images cannot be decoded: .*000105.jpg: the"):
        prepare("coco", source, out)
    assert os.listdir(out.parent) == ["COCO"]
    metadata, _ = prepare("coco", source, out, skip_bad=True)
    train = metadata["splits"]["train"]
    assert train["images"] == 5 and train["num_file_rows"] == 7 and len(train["skipped"]) == 2
    assert train["positives"] == {"cat": 1, "dog": 3}
    raw, prepared = (
        open_source("coco", "train", root=str(root), keep_empty=True) for root in (source, out)
    )
    assert set(raw.ids) - set(prepared.ids) == {"102", "105"}
    kept = [raw.ids.index(name) for name in prepared.ids]
    np.testing.assert_array_equal(prepared.file_rows, kept)
    np.testing.assert_array_equal(prepared.labels, raw.labels[kept])


def test_no_image_at_all(source):
    for path in (source / "train2017").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="not one of the train images can be decoded"):
        _train(source, skip_bad=True)
    with pytest.raises(UserError, match="7 of 7 train images cannot be decoded: .* and 4 more"):
        _train(source)


class _StopError(Exception):
    pass


@pytest.mark.parametrize("phase", ["reading", "checking"])
def test_an_interruption_leaves_nothing(source, out, phase):
    def stop(now, split, done, total):
        assert split == "train" and total == 7
        if (now, done) == (phase, 4):
            raise _StopError

    with pytest.raises(_StopError):
        _train(source, report=stop)
    assert os.listdir(out.parent) == ["COCO"]
    seen = []
    metadata, there = _train(source, report=lambda *step: seen.append(step))
    assert not there and metadata["splits"]["train"]["images"] == 7
    assert seen == [(now, "train", i, 7) for now in ("reading", "checking") for i in range(7)]


def test_what_a_killed_process_left_is_removed(source, out):
    stale = out.parent / ".out.incomplete"
    (stale / "prepared_images/incomplete.ABC_1.0.0").mkdir(parents=True)
    (stale / "prepared_images/incomplete.ABC_1.0.0/x.array_record").write_bytes(b"half")
    _train(source)
    assert sorted(os.listdir(out.parent)) == ["COCO", "out"]


def test_two_preparations_do_not_meet(source, out):
    workspace = out.parent / ".out.incomplete"
    workspace.mkdir()
    lock = os.open(workspace, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is preparing"):
        _train(source)
    os.close(lock)
    _train(source)


def test_a_full_disk_is_told(source, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="--out: .*out needs 0.0 GB, its disk has 0.0 GB"):
        _train(source)


def test_records_that_differ_from_the_images_are_found(source, out, monkeypatch):
    def read_back(*arguments):
        for name, labels, image in prepare_records.read_back(*arguments):
            yield name, -labels if name == "104" else labels, image

    monkeypatch.setattr(module, "read_back", read_back)
    with pytest.raises(UserError, match="the train records differ from the images"):
        _train(source)
    assert os.listdir(out.parent) == ["COCO"]


def test_published_counts_of_coco(source, monkeypatch):
    images, annotated = zip(
        *(
            np.sum([coco.OFFICIAL_COUNTS[year, split] for split in ("train", "test")], axis=0)
            for year in ("2014", "2017")
        ),
        strict=True,
    )
    # Both years split the same images in two ways.
    assert images == (123_287, 123_287) and annotated == (122_218, 122_218)
    monkeypatch.setitem(coco.OFFICIAL_COUNTS, ("2017", "train"), (7, 5))
    with pytest.raises(UserError, match="6 of 7 images have an annotation, 5 in the published"):
        _train(source)
    _train(source, check_counts=False)


def test_the_year_is_the_one_that_is_there(source, out, tmp_path):
    metadata, _ = prepare("coco", make_coco(tmp_path / "other", year="2014"), tmp_path / "o")
    assert metadata["year"] == "2014"
    make_coco(source, year="2014")
    with pytest.raises(UserError, match="COCO may be 2014 or 2017; say --year"):
        prepare("coco", source, out)
    assert prepare("coco", source, out, year="2014")[0]["year"] == "2014"
    with pytest.raises(UserError, match="instances_train2015.json does not exist"):
        prepare("coco", source, out, year="2015")


def test_a_folder_that_does_not_say_its_year(tmp_path, out):
    shutil.move(make_voc(tmp_path / "VOC") / "VOCdevkit/VOC2007", tmp_path / "mine")
    with pytest.raises(UserError, match="mine may be 2007 or 2012; say --year"):
        prepare("voc", tmp_path / "mine", out)
    assert prepare("voc", tmp_path / "mine", out, year="2007")[0]["year"] == "2007"


def test_one_dataset_given_as_the_other(source, out, tmp_path):
    with pytest.raises(UserError, match="COCO does not look like voc; is --dataset=coco meant"):
        prepare("voc", source, out)
    with pytest.raises(UserError, match="VOC does not look like coco; is --dataset=voc meant"):
        prepare("coco", make_voc(tmp_path / "VOC"), out)


@pytest.mark.realdata
def test_the_real_subset(data_root, out):
    metadata, _ = prepare("coco", data_root / "coco_subset", out)
    train, test = (metadata["splits"][name] for name in ("train", "test"))
    assert (train["images"], train["labelled"], test["images"]) == (317, 313, 159)
    assert (sum(train["positives"].values()), sum(test["positives"].values())) == (1053, 620)
    assert train["sha256"] == "17b06492c7562b20e40838eadbe50981fe14fdb36e500f0cb94a9330c49c0ea7"
    assert test["sha256"] == "1e708e6814cd99afc10c78a2fa4e4a5c1d860bb322c957bc3eb750af2743c3b8"
    raw, prepared = (
        open_source("coco", "train", root=str(root)) for root in (data_root / "coco_subset", out)
    )
    assert prepared.ids == raw.ids
    for index in range(0, len(raw), 20):
        np.testing.assert_array_equal(prepared.read(index)["image"], raw.read(index)["image"])
        assert prepared.captions(index) == raw.captions(index)

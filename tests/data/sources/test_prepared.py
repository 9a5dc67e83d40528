"""Prepared folders: the same ids, labels, masks and pixels as the raw layout; damage is named."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest

from tests.data.sources.layouts import make_coco, make_voc
from trm_jax.data import partial_labels
from trm_jax.data.prepare import prepare
from trm_jax.data.sources import open_source
from trm_jax.data.sources.prepared import PreparedImages
from trm_jax.data.sources.records import Records
from trm_jax.types import BadSampleError, UserError


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{dataset: (raw folder, prepared folder)}."""
    root = tmp_path_factory.mktemp("prepared")
    raw = {"coco": make_coco(root / "COCO"), "voc": make_voc(root / "VOC")}
    for dataset, folder in raw.items():
        prepare(dataset, folder, root / dataset)
    return {dataset: (folder, root / dataset) for dataset, folder in raw.items()}


@pytest.fixture
def copy(places, tmp_path):
    """A copy of the prepared COCO folder."""
    return shutil.copytree(places["coco"][1], tmp_path / "copy")


def _pair(places, dataset, split, **options):
    return (
        open_source(dataset, split, root=str(root), allow_empty_classes=True, **options)
        for root in places[dataset]
    )


CASES = [
    ("coco", {}),
    ("coco", {"keep_empty": True}),
    ("voc", {}),
    ("voc", {"difficult": "ignore"}),
    ("voc", {"difficult": "positive"}),
]


@pytest.mark.parametrize(("dataset", "options"), CASES, ids=str)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_prepared_folder_is_the_raw_one(places, dataset, options, split):
    raw, prepared = _pair(places, dataset, split, **options)
    assert isinstance(prepared, PreparedImages) and not isinstance(raw, PreparedImages)
    assert prepared.ids == raw.ids and prepared.class_names == raw.class_names
    np.testing.assert_array_equal(prepared.labels, raw.labels)
    assert prepared.labels.dtype == np.int8
    for protocol in ("hash", "hcp", "single_positive_largeloss"):
        masks = [
            partial_labels.mask_sha256(
                partial_labels.observe_source(source, protocol=protocol, known_fraction=0.4)
            )
            for source in (raw, prepared)
        ]
        assert masks[0] == masks[1], protocol
    for index in range(len(raw)):
        image = prepared.read(index)["image"]
        np.testing.assert_array_equal(image, raw.read(index)["image"])
        assert image.shape[2] == 3 and prepared.captions(index) == raw.captions(index)
    assert "tensorflow" not in sys.modules


def test_the_files_of_the_images_are_stored_as_they_are(places):
    raw, prepared = _pair(places, "coco", "train", keep_empty=True)
    records = Records(places["coco"][1], "train")
    for index in range(len(raw)):
        path = raw.image_path(index)
        assert records[index]["image"] == path.read_bytes()
        assert records[index]["image/filename"].decode() == path.name
        np.testing.assert_array_equal(records[index]["labels"], prepared.labels[index])
    assert [text.decode() for text in records[0]["captions"]] == list(raw.captions(0)) != []


def test_pickles_are_small_and_read_on(places):
    _, source = _pair(places, "coco", "train")
    expected = source.read(0)["image"]
    data = pickle.dumps(source)
    assert len(data) < 2500
    np.testing.assert_array_equal(pickle.loads(data).read(0)["image"], expected)


def test_a_copy_opens_elsewhere(places, copy):
    source = PreparedImages(copy, "train", dataset="coco", year="2017")
    assert source.read(5)["image"].ndim == 3
    place = str(places["coco"][1].parent).encode()
    assert not [path.name for path in copy.iterdir() if place in path.read_bytes()]


def _open(folder, split="train", **options):
    return open_source("coco", split, root=str(folder), **options)


def test_the_wrong_dataset_year_or_split_is_refused(places, tmp_path):
    folder = places["coco"][1]
    with pytest.raises(UserError, match="was prepared from coco; set data.dataset=coco"):
        open_source("voc", "train", root=str(folder))
    with pytest.raises(UserError, match="from coco 2017, not 2014; set data.options.year=2017"):
        _open(folder, year="2014")
    prepare("coco", places["coco"][0], tmp_path / "train", splits=("train",))
    assert len(_open(tmp_path / "train")) == 6
    with pytest.raises(
        UserError, match="holds no 'test' split, only train; delete it and prepare it with"
    ):
        _open(tmp_path / "train", "test")
    with pytest.raises(UserError, match="no training image of bicycle"):
        open_source("voc", "train", root=str(places["voc"][1]))


def _records(folder, split="train"):
    return next(folder.glob(f"*-{split}.array_record*"))


@pytest.mark.parametrize("keep", [0, 1000, 70_000, -1])
def test_a_short_record_file_is_named(copy, keep):
    path = _records(copy)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{path.name} is damaged: 0 of 7 records.*prepare") as e:
        _open(copy)
    assert "\n" not in str(e.value)
    assert len(_open(copy, "test")) == 3


def test_a_damaged_record_is_a_bad_sample(copy):
    path = _records(copy)
    data = bytearray(path.read_bytes())
    data[3000] ^= 255
    path.write_bytes(data)
    source = _open(copy, keep_empty=True)
    bad = []
    for index in range(len(source)):
        try:
            assert source.read(index)["image"].ndim == 3
        except BadSampleError as error:
            bad.append(str(error))
    assert len(bad) == 1 and "of train: " in bad[0] and "orrupt" in bad[0] and "\n" not in bad[0]


def test_missing_and_damaged_files_are_named(copy):
    _records(copy, "test").unlink()
    with pytest.raises(UserError, match="array_record-00000-of-00001 is missing; prepare"):
        _open(copy, "test")
    index = copy / "index_train.json"
    index.write_text(index.read_text().replace('"positives": [[1]', '"positives": [[0]'))
    with pytest.raises(UserError, match="index_train.json is not the file that prepared.json"):
        _open(copy)
    index.unlink()
    with pytest.raises(UserError, match="index_train.json: No such file.*launch/prepare.py again"):
        _open(copy)
    (copy / "features.json").write_text("{")
    with pytest.raises(UserError, match="features.json is damaged .*; prepare the dataset again"):
        Records(copy, "train")
    (copy / "dataset_info.json").unlink()
    with pytest.raises(UserError, match="has no dataset_info.json"):
        Records(copy, "train")


def test_other_layouts_are_refused(copy):
    path = copy / "prepared.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"layout": 2}))
    with pytest.raises(UserError, match="has layout 2, this version reads 1; run launch/prepare"):
        _open(copy)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"prepared.json is damaged \(no JSON object\)"):
        _open(copy)
    path.write_text("{")
    with pytest.raises(UserError, match="prepared.json is damaged"):
        _open(copy)

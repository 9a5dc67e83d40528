"""Datasets in the form in which TFDS itself prepares VOC and COCO, read without TensorFlow."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.sources.layouts import VOC_TEST, VOC_TRAIN, make_coco, make_voc
from trm_jax.data import partial_labels
from trm_jax.data.sources import open_source
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.records import Records
from trm_jax.data.sources.voc import VOC_CLASSES
from trm_jax.types import UserError


def _build(data_dir, name, config, features, splits):
    """Prepares {split: {key: example}} as data_dir/name/config/1.0.0 with a TFDS builder."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version="1.0.0", description="")]
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows):
            yield from rows.items()

    Builder.name = name
    Builder(data_dir=data_dir, config=config, file_format="array_record").download_and_prepare()
    return data_dir / name / config / "1.0.0"


def _voc(data_dir, raw):
    """voc/2007 with the features of TFDS; the training images are cut into train and validation."""
    import tensorflow_datasets as tfds

    f = tfds.features
    label = f.ClassLabel(names=VOC_CLASSES)
    features = f.FeaturesDict(
        {
            "image": f.Image(),
            "image/filename": f.Text(),
            "objects": f.Sequence({"label": label, "is_difficult": np.bool_}),
            "labels": f.Sequence(label),
            "labels_no_difficult": f.Sequence(label),
        }
    )

    def example(name, instances):
        return {
            "image": str(raw / f"VOCdevkit/VOC2007/JPEGImages/{name}.jpg"),
            "image/filename": f"{name}.jpg",
            "objects": [{"label": c, "is_difficult": bool(d)} for c, d in instances],
            "labels": sorted({c for c, _ in instances}),
            "labels_no_difficult": sorted({c for c, d in instances if not d}),
        }

    train = [(name, example(name, instances)) for name, instances in VOC_TRAIN.items()]
    test = {name: example(name, instances) for name, instances in VOC_TEST.items()}
    splits = {"train": dict(train[::2]), "validation": dict(train[1::2]), "test": test}
    return _build(data_dir, "voc", "2007", features, splits)


def _coco(data_dir, raw, names=("cat", "dog")):
    """coco/2014 with the features of TFDS."""
    import tensorflow_datasets as tfds

    f = tfds.features
    label = f.ClassLabel(names=names) if names else f.ClassLabel(num_classes=2)
    features = f.FeaturesDict(
        {
            "image": f.Image(encoding_format="jpeg"),
            "image/filename": f.Text(),
            "image/id": np.int64,
            "objects": f.Sequence({"id": np.int64, "label": label, "is_crowd": np.bool_}),
        }
    )
    splits = {}
    for split, part in (("train", "train2014"), ("validation", "val2014")):
        table = json.loads((raw / f"annotations/instances_{part}.json").read_text())
        splits[split] = {
            image["id"]: {
                "image": str(raw / part / image["file_name"]),
                "image/filename": image["file_name"],
                "image/id": image["id"],
                "objects": [
                    {"id": a["id"], "label": {3: 0, 7: 1}[a["category_id"]], "is_crowd": False}
                    for a in table["annotations"]
                    if a["image_id"] == image["id"]
                ],
            }
            for image in table["images"]
        }
    return _build(data_dir, "coco", "2014", features, splits)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(raw VOC, raw COCO, TFDS's data_dir with both)."""
    root = tmp_path_factory.mktemp("tfds")
    voc, coco = make_voc(root / "VOC"), make_coco(root / "COCO", year="2014")
    _voc(root / "data", voc)
    _coco(root / "data", coco)
    return voc, coco, root / "data"


def _open(data_dir, name, split="train", **options):
    options = {"allow_empty_classes": True, **options}
    return open_source("tfds", split, root=str(data_dir), name=name, **options)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("difficult", ["negative", "ignore"])
def test_voc_is_the_raw_one(places, split, difficult):
    options = {"allow_empty_classes": True, "difficult": difficult}
    raw = open_source("voc", split, root=str(places[0]), **options)
    source = _open(places[2], "voc/2007", split, difficult=difficult)
    assert isinstance(source, Source)
    assert source.ids == raw.ids and source.class_names == raw.class_names
    np.testing.assert_array_equal(source.labels, raw.labels)
    for protocol in ("hash", "hcp"):
        masks = [
            partial_labels.mask_sha256(
                partial_labels.observe_source(s, protocol=protocol, known_fraction=0.4)
            )
            for s in (raw, source)
        ]
        assert masks[0] == masks[1]
    for index in range(len(raw)):
        np.testing.assert_array_equal(source.read(index)["image"], raw.read(index)["image"])
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("keep_empty", [False, True])
def test_coco_is_the_raw_one_in_the_order_of_ids(places, keep_empty):
    raw = open_source("coco", "test", root=str(places[1]), year="2014", keep_empty=keep_empty)
    source = _open(places[2], "coco/2014", "test", keep_empty=keep_empty)
    assert list(source.ids) == sorted(raw.ids) and len(source) == (4 if keep_empty else 3)
    rows = [raw.ids.index(name) for name in source.ids]
    np.testing.assert_array_equal(source.labels, raw.labels[rows])
    hidden = [
        partial_labels.observe_source(s, protocol="hash", known_fraction=0.5) for s in (raw, source)
    ]
    np.testing.assert_array_equal(hidden[0][rows], hidden[1])
    for index, row in enumerate(rows):
        np.testing.assert_array_equal(source.read(index)["image"], raw.read(row)["image"])


def test_ids_are_sorted_by_their_numbers(tmp_path):
    import tensorflow_datasets as tfds

    f = tfds.features
    label = f.ClassLabel(names=["a", "b"])
    features = f.FeaturesDict({"image": f.Image(), "image/id": np.int64, "label": label})
    rows = {n: {"image": b"", "image/id": n, "label": n % 2} for n in (9, 100, 25)}
    _build(tmp_path, "mine", "small", features, {"train": rows, "dev": rows})
    source = _open(tmp_path, "mine/small", test_split="dev")
    assert source.ids == ("9", "25", "100") and source.labels.tolist() == [[-1, 1]] * 2 + [[1, -1]]
    assert _open(tmp_path, "mine/small", "test", test_split="train+dev").ids[:2] == ("9", "9")
    with pytest.raises(UserError, match="1.0.0 has no split 'test'; it has train, dev"):
        _open(tmp_path, "mine/small", "test")


def test_labels_are_read_once(tmp_path, places, monkeypatch):
    folder = _voc(tmp_path, places[0])
    first = _open(tmp_path, "voc/2007")
    remembered = folder / "trm_jax_index_train+validation.json"
    content = remembered.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Records, "__getitem__", lambda *_: pytest.fail("an image was read"))
        again = _open(tmp_path, "voc/2007")
    np.testing.assert_array_equal(again.labels, first.labels)
    assert again.ids == first.ids and again.fingerprint() == first.fingerprint()
    for damage in ("{", json.dumps(json.loads(content) | {"made_of": "other data"})):
        remembered.write_text(damage)
        assert _open(tmp_path, "voc/2007").ids == first.ids
        assert remembered.read_text() == content


def test_a_folder_that_cannot_be_written_is_read(tmp_path, places, monkeypatch):
    folder = _voc(tmp_path, places[0])

    def refuse(*_, **__):
        raise PermissionError("read only")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert _open(tmp_path, "voc/2007").ids == tuple(VOC_TRAIN)
    assert not list(folder.glob("trm_jax*"))


def test_pickles_read_on(places):
    source = _open(places[2], "voc/2007")
    expected = source.read(1)["image"]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(1)["image"], expected)


def test_versions(tmp_path, places):
    folder = _voc(tmp_path, places[0])
    for version in ("9.0.0", "10.0.0"):
        (folder.parent / version).symlink_to(folder)
    newest, named = (_open(tmp_path, name) for name in ("voc/2007", "voc/2007/9.0.0"))
    assert newest._records.folder.name == "10.0.0" and named._records.folder.name == "9.0.0"


def test_refusals(places, tmp_path):
    data_dir = places[2]
    with pytest.raises(UserError, match="data.options.name is empty; say which.* voc/2007"):
        _open(data_dir, "")
    with pytest.raises(UserError, match="voc/2012 holds no dataset .*`tfds build voc/2012 --file"):
        _open(data_dir, "voc/2012")
    with pytest.raises(UserError, match="no training image of bicycle"):
        _open(data_dir, "voc/2007", allow_empty_classes=False)
    _coco(tmp_path / "nameless", places[1], names=())
    with pytest.raises(UserError, match="its labels have no class names; prompts need them"):
        _open(tmp_path / "nameless", "coco/2014")
    info = tmp_path / "nameless/coco/2014/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="is in tfrecord files.*file_format=array_record"):
        _open(tmp_path / "nameless", "coco/2014")


def test_damaged_records_are_named_before_training(tmp_path, places):
    folder = _voc(tmp_path, places[0])
    path = next(folder.glob("*-test.array_record*"))
    data = bytearray(path.read_bytes())
    data[2500] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match="record . of test: .*orrupt.*; prepare the dataset again"):
        _open(tmp_path, "voc/2007", "test")
    path.write_bytes(data[:-100])
    with pytest.raises(UserError, match="damaged: 0 of 3 records"):
        _open(tmp_path, "voc/2007", "test")


def test_datasets_without_images_or_labels(tmp_path):
    import tensorflow_datasets as tfds

    f = tfds.features
    _build(
        tmp_path, "mine", "texts", f.FeaturesDict({"text": f.Text()}), {"train": {0: {"text": "a"}}}
    )
    with pytest.raises(UserError, match="has no image; it has text"):
        _open(tmp_path, "mine/texts")
    _build(
        tmp_path,
        "mine",
        "images",
        f.FeaturesDict({"image": f.Image()}),
        {"train": {0: {"image": b""}}},
    )
    with pytest.raises(UserError, match="has no labels, objects or label; it has image"):
        _open(tmp_path, "mine/images")

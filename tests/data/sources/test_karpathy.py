"""Karpathy's JSON files: splits, captions, photos and region features beside them."""

import json
import pickle

import numpy as np
import pytest

from tests.data.sources.layouts import write_photo
from tests.data.sources.regions import region, write_npz, write_tsv
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.karpathy import open_karpathy, read_karpathy
from trm_jax.types import BadSampleError, UserError

SPLITS = ("train", "val", "restval", "test", "train", "restval")


def _image(number, split, captions=2):
    """An entry of dataset_coco.json; its photo is of another folder than its split."""
    part = "train2014" if split == "train" else "val2014"
    return {
        "filepath": part,
        "filename": f"COCO_{part}_{number:012d}.jpg",
        "cocoid": number,
        "imgid": 1000 - number,
        "sentids": [],
        "split": split,
        "sentences": [
            {"raw": f" image {number} caption {k} ", "tokens": ["other"]} for k in range(captions)
        ],
    }


def _write(root, images, name="dataset_coco.json"):
    (root / name).write_text(json.dumps({"images": images, "dataset": "coco"}))


@pytest.fixture
def coco(tmp_path):
    """Images 0..5 with the splits above; photos of height 10 + number."""
    images = [_image(number, split) for number, split in enumerate(SPLITS)]
    _write(tmp_path, images)
    for number, image in enumerate(images):
        write_photo(tmp_path / image["filepath"] / image["filename"], 10 + number, 8)
    return tmp_path


def _numbers(source):
    return [int(name[-16:-4]) for name in source.ids]


def test_splits_captions_and_photos(coco):
    train = open_karpathy(coco, "train")
    assert isinstance(train, Source)
    assert _numbers(train) == [0, 2, 4, 5] and len(train) == 4 and train.labels.shape == (4, 0)
    assert train.captions(1) == ("image 2 caption 0", "image 2 caption 1")
    assert [train.read(k)["image"].shape[0] for k in range(4)] == [10, 12, 14, 15]
    assert train.image_path(1).parent.name == "val2014"
    assert _numbers(open_karpathy(coco, "train", restval=False)) == [0, 4]
    assert _numbers(open_karpathy(coco, "dev")) == [1]
    assert _numbers(open_karpathy(coco, "test")) == [3]
    assert train.nouns_file == coco / "dataset_coco_train_nouns.npz"
    before = train.fingerprint()
    train.image_path(2).unlink()
    assert train.fingerprint() != before
    with pytest.raises(BadSampleError, match="COCO_train2014_000000000004.jpg"):
        train.read(2)


def test_photos_in_one_folder(tmp_path):
    images = [_image(number, "train") for number in range(2)]
    for image in images:
        del image["filepath"], image["cocoid"]
        write_photo(tmp_path / "flickr30k-images" / image["filename"], 9, 8)
        write_photo(tmp_path / "elsewhere" / image["filename"], 11, 8)
    _write(tmp_path, images, "dataset_flickr30k.json")
    assert open_karpathy(tmp_path, "train").read(1)["image"].shape[0] == 9
    options = {"annotations": "dataset_flickr30k.json", "images": "elsewhere"}
    assert open_karpathy(tmp_path, "train", **options).read(1)["image"].shape[0] == 11
    with pytest.raises(UserError, match="nowhere is not a folder"):
        open_karpathy(tmp_path, "train", images="nowhere")
    # COCO's photos in one folder, whatever the file says.
    _write(tmp_path, [_image(0, "train")], "dataset_coco.json")
    options = {"annotations": "dataset_coco.json", "images": "elsewhere"}
    assert open_karpathy(tmp_path, "train", **options).read(0)["image"].shape[0] == 11


def test_regions_are_found_by_name_or_coco_id(coco):
    # The TSV lies in another order than the JSON file, and knows more images.
    write_tsv(coco / "butd" / "all.tsv", ["77", "5", "4", "2", "0"])
    for number in range(6):
        name = _image(number, SPLITS[number])["filename"].removesuffix(".jpg")
        write_npz(coco / "npz" / f"{name}.npz", number)
    by_id = open_karpathy(coco, "train", regions="butd/all.tsv", num_regions=3)
    by_name = open_karpathy(coco, "train", regions=str(coco / "npz"), num_regions=3)
    assert isinstance(by_id, Source) and _numbers(by_id) == [0, 2, 4, 5]
    assert by_id.captions(3) == ("image 5 caption 0", "image 5 caption 1")
    for source, numbers in ((by_id, (4, 3, 2, 1)), (by_name, (0, 2, 4, 5))):
        source = pickle.loads(pickle.dumps(source))
        for position, number in enumerate(numbers):
            features, boxes = region(number)
            np.testing.assert_array_equal(source.read(position)["features"], features[:3])
            found, size = source.boxes(position)
            np.testing.assert_array_equal(found, boxes[:3])
            assert size == (50, 33)
    assert by_id.fingerprint() != by_name.fingerprint()
    with pytest.raises(UserError) as error:
        open_karpathy(coco, "test", regions="butd/all.tsv", num_regions=3)
    assert "1 of 1 images have no region features, the first COCO_val2014_000000000003.jpg" in str(
        error.value
    )
    assert "looked for COCO_val2014_000000000003, 3;" in str(error.value)


def test_empty_captions_are_left_out_and_counted(coco):
    image, other = _image(0, "train", captions=3), _image(1, "test")
    image["sentences"][1]["raw"] = "  "
    other["sentences"] = []
    _write(coco, [image, other])
    source = open_karpathy(coco, "train")
    assert source.captions(0) == ("image 0 caption 0", "image 0 caption 2")
    assert source.num_empty_captions == 1
    assert open_karpathy(coco, "train").num_empty_captions == 1
    images, num_empty = read_karpathy(coco / "dataset_coco.json", ["test"])
    assert images[0].captions == () and num_empty == 0


def test_what_is_no_karpathy_file_is_refused(coco):
    path = coco / "dataset_coco.json"
    with pytest.raises(UserError, match="no split 'val'; it is train, dev, test"):
        open_karpathy(coco, "val")
    twice = [_image(0, "train"), _image(0, "train")]
    foreign = [_image(0, "train"), {"split": "train", "sentences": [{"text": "a"}]}]
    for images, reason in (
        (twice, "lists the image COCO_train2014_000000000000.jpg 2 times"),
        (foreign, r"images\[1\] is not as Karpathy's files have it \(KeyError\('raw'\)\)"),
        ([{"split": "train", "sentences": None}], r"images\[0\] is not as"),
        ([_image(0, "val")], "no image of the split train or restval; it has 1 of val"),
        ([], "no image of the split train or restval; it has none"),
        (["a"], "has no list 'images'"),
        (None, "has no list 'images'"),
    ):
        _write(coco, images)
        with pytest.raises(UserError, match=reason) as error:
            open_karpathy(coco, "train")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_text("{")
    with pytest.raises(UserError, match="not a readable JSON file"):
        open_karpathy(coco, "train")
    with pytest.raises(UserError, match=r"x.json does not exist; check data.options.annotations"):
        open_karpathy(coco, "train", annotations="x.json")
    _write(coco, [], "dataset_flickr8k.json")
    with pytest.raises(UserError, match=r"has 2 files dataset_\*.json"):
        open_karpathy(coco, "train")
    for file in coco.glob("*.json"):
        file.unlink()
    with pytest.raises(UserError, match=r"has no file dataset_\*.json"):
        open_karpathy(coco, "train")


def test_missing_photos_are_one_line(coco):
    (coco / "train2014" / _image(0, "train")["filename"]).unlink()
    with pytest.raises(
        UserError, match="no photo COCO_train2014_0.*0.jpg; set data.options.images"
    ):
        open_karpathy(coco, "train")

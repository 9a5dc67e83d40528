"""Masks: hand-made pixels, palettes, ignored pixels, and one clear line for each bad input."""

import pickle

import numpy as np
import pytest
from PIL import Image

from tests.data.sources.layouts import make_masked_voc, write_mask, write_photo
from trm_jax.data.sources.base import MaskedSource
from trm_jax.data.sources.segmentation import (
    CONTEXT_CLASSES,
    MaskImages,
    mask_values,
    open_mask_folder,
    open_pascal_context,
    open_voc_segmentation,
    read_index_mask,
)
from trm_jax.data.sources.subset import Subset, has_masks
from trm_jax.data.sources.voc import VOC_CLASSES
from trm_jax.types import BadSampleError, UserError

_TRAIN = {"2007_01": [[0, 1], [255, 1]]}
_MASKS = "VOCdevkit/VOC2012/SegmentationClass"
_VAL = {"2008_02": [[0, 20, 20], [255, 11, 0]], "2008_01": [[0, 0, 255]]}


@pytest.fixture
def voc(tmp_path):
    make_masked_voc(tmp_path, {"train": _TRAIN, "val": _VAL})
    return tmp_path


def _folder(root, masks, classes="cat\nhot dog\n", part=""):
    for name, values in masks.items():
        write_photo(root / "images" / part / f"{name}.jpg", *np.shape(values))
        write_mask(root / "masks" / part / f"{name}.png", values)
    (root / "classes.txt").write_text(classes)
    return root


def test_voc_masks_are_read_as_indices(voc):
    source = open_voc_segmentation(voc, "test")
    assert source.ids == ("2008_02", "2008_01")  # in the order of the list
    mask = source.semantic_mask(0)
    assert mask.dtype == np.int16 and mask.tolist() == [[-1, 19, 19], [-2, 10, -1]]
    assert source.semantic_mask(1).tolist() == [[-1, -1, -2]]
    assert source.read(0)["image"].shape == (2, 3, 3) and source.captions(0) == ()
    assert open_voc_segmentation(voc, "train").semantic_mask(0).tolist() == [[-1, 0], [-2, 0]]


def test_voc_labels_are_the_classes_of_the_mask(voc):
    source = open_voc_segmentation(voc, "test")
    positive = [np.flatnonzero(row > 0).tolist() for row in source.labels]
    assert positive == [[10, 19], []] and source.labels.dtype == np.int8
    assert set(np.unique(source.labels)) == {-1, 1} and source.labels is source.labels


def test_voc_class_names(voc):
    groupvit = open_voc_segmentation(voc, "test").class_names
    named = open_voc_segmentation(voc, "test", names="voc").class_names
    assert named == VOC_CLASSES
    changed = {(a, b) for a, b in zip(named, groupvit, strict=True) if a != b}
    expected = {("diningtable", "table"), ("pottedplant", "plant"), ("tvmonitor", "monitor")}
    assert changed == expected
    with pytest.raises(UserError, match="names is 'clip'; it is groupvit or voc"):
        open_voc_segmentation(voc, "test", names="clip")


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_is_found_at_each_level(voc, below):
    assert len(open_voc_segmentation(voc / below, "test")) == 2


def test_context_has_59_classes(tmp_path):
    lists = {"year": "2010", "lists": "SegmentationContext", "folder": "SegmentationClassContext"}
    make_masked_voc(tmp_path, {"val": {"a": [[0, 1, 59], [36, 37, 255]]}}, **lists)
    source = open_pascal_context(tmp_path, "test")
    assert len(source.class_names) == len(set(CONTEXT_CLASSES)) == 59
    assert source.semantic_mask(0).tolist() == [[-1, 0, 58], [35, 36, -2]]
    names = source.class_names
    assert (names[0], names[35], names[36], names[58]) == ("airplane", "mouse", "person", "wood")
    voc_names = open_pascal_context(tmp_path, "test", names="voc").class_names
    assert (voc_names[0], voc_names[39], voc_names[54]) == ("aeroplane", "pottedplant", "tvmonitor")
    assert (names[39], names[54]) == ("plant", "monitor")
    write_mask(tmp_path / "VOCdevkit/VOC2010/SegmentationClassContext/a.png", [[0, 60, 1]] * 2)
    with pytest.raises(UserError, match=r"a\.png has the value 60, which is none of the 59 clas"):
        open_pascal_context(tmp_path, "test").semantic_mask(0)


def test_a_folder_with_and_without_background(tmp_path):
    _folder(tmp_path, {"b": [[0, 1, 2]], "a": [[255], [1]]})
    source = open_mask_folder(tmp_path, "test")
    assert source.ids == ("a", "b") and source.class_names == ("cat", "hot dog")
    assert source.semantic_mask(1).tolist() == [[-1, 0, 1]]
    assert source.semantic_mask(0).tolist() == [[-2], [0]]
    assert source.labels.tolist() == [[1, -1], [1, 1]]
    (tmp_path / "classes.txt").write_text("cat\nhot dog\nbird\n")
    whole = open_mask_folder(tmp_path, "train", background=False)
    assert whole.semantic_mask(1).tolist() == [[0, 1, 2]]
    assert whole.semantic_mask(0).tolist() == [[-2], [1]]


def test_a_folder_with_splits(tmp_path):
    _folder(tmp_path, {"x": [[1]]}, part="train")
    _folder(tmp_path, {"y": [[2]]}, part="val")
    assert open_mask_folder(tmp_path, "train").ids == ("x",)
    assert open_mask_folder(tmp_path, "test").semantic_mask(0).tolist() == [[1]]
    _folder(tmp_path, {"z": [[0]]}, part="test")
    assert open_mask_folder(tmp_path, "test").ids == ("z",)


def test_all_values_have_one_meaning():
    values = mask_values(254)
    assert values[0] == -1 and values[1:255].tolist() == list(range(254)) and values[255] == -2
    values = mask_values(3, background=False)
    assert values[:4].tolist() == [0, 1, 2, -3] and values[255] == -2
    with pytest.raises(UserError, match="255 classes do not fit"):
        mask_values(255)


def test_kinds_of_mask_files(tmp_path):
    values = np.array([[0, 3], [255, 7]])
    write_mask(tmp_path / "p.png", values)
    write_mask(tmp_path / "l.png", values, palette=False)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("p", "l", "deep"):
        mask = read_index_mask(tmp_path / f"{name}.png")
        assert mask.dtype == np.uint8 and mask.tolist() == values.tolist()
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert read_index_mask(tmp_path / "bits.png").tolist() == [[1, 0]]
    Image.fromarray((values + 1).astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="has the value 256; class indices lie in"):
        read_index_mask(tmp_path / "deep.png")
    write_photo(tmp_path / "rgb.png", 2, 2)
    with pytest.raises(UserError, match="picture of mode RGB, not a mask"):
        read_index_mask(tmp_path / "rgb.png")


def test_unreadable_files_are_bad_samples(voc):
    source = open_voc_segmentation(voc, "test")
    mask, photo = voc / _MASKS / "2008_02.png", source.image_path(0)
    whole = mask.read_bytes()
    # The last two are cut in the header and among the pixels.
    for broken in (b"", b"no picture", whole[:20], whole[:-30]):
        mask.write_bytes(broken)
        with pytest.raises(BadSampleError, match="2008_02.png"):
            source.semantic_mask(0)
    with pytest.raises(UserError, match="2008_02.png: .*labels need every mask"):
        _ = source.labels
    mask.write_bytes(whole)
    photo.write_bytes(b"no picture")
    with pytest.raises(BadSampleError, match="2008_02.jpg: not a readable image"):
        source.semantic_mask(0)
    photo.unlink()
    for unusable in (source.semantic_mask, source.read):
        with pytest.raises(BadSampleError, match=r"2008_02.jpg: No such file"):
            unusable(0)


def test_a_mask_has_the_size_of_the_upright_image(tmp_path):
    _folder(tmp_path, {"a": [[0, 1, 2], [2, 1, 0]]})
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn: 3 x 2 stored pixels are shown as 2 x 3
    path = tmp_path / "images" / "a.jpg"
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=turned)
    source = open_mask_folder(tmp_path, "test")
    assert source.read(0)["image"].shape[:2] == source.semantic_mask(0).shape == (2, 3)
    write_mask(tmp_path / "masks" / "a.png", [[0, 1]] * 3)
    with pytest.raises(UserError, match=r"a\.png: the mask has 2 x 3 pixels, .* a\.jpg 3 x 2;"):
        source.semantic_mask(0)


@pytest.mark.parametrize(
    "classes, message",
    [
        ("\n\n", "classes.txt names no class"),
        ("cat\n\ndog\n", "classes.txt, line 2: empty"),
        ("Background\ncat\n", "line 1: the background is the value 0 without a line; remove it"),
        ("cat\ndog\ncat\n", "classes.txt, line 3: class 'cat' is listed twice"),
    ],
)
def test_class_lists_are_checked(tmp_path, classes, message):
    _folder(tmp_path, {"a": [[1]]}, classes)
    with pytest.raises(UserError, match=message):
        open_mask_folder(tmp_path, "test")


def test_what_a_folder_lacks(tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message):
            open_mask_folder(tmp_path, "test")

    refused("images is not a folder; expected images/, masks/ and classes.txt")
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "masks").mkdir()
    refused("classes.txt: No such file")
    (tmp_path / "classes.txt").write_text("cat\n")
    refused("images has train, but no folder test")
    (tmp_path / "images" / "train").rmdir()
    refused("images holds no image")
    write_photo(tmp_path / "images" / "a.jpg", 2, 2)
    write_photo(tmp_path / "images" / "b.jpg", 2, 2)
    refused(r"masks/a\.png and 1 more files of images in .* do not exist")
    write_photo(tmp_path / "images" / "a.png", 2, 2)
    refused("two images named a; remove one")


def test_what_a_devkit_lacks(voc):
    def refused(message):
        with pytest.raises(UserError, match=message):
            open_voc_segmentation(voc, "test")

    folder = voc / "VOCdevkit" / "VOC2012"
    (folder / "SegmentationClass" / "2008_01.png").unlink()
    refused(r"SegmentationClass/2008_01\.png of .*val\.txt do not exist")
    (folder / "JPEGImages" / "2008_02.jpg").unlink()
    refused(r"JPEGImages/2008_02\.jpg of ")
    listed = folder / "ImageSets" / "Segmentation" / "val.txt"
    listed.write_text("a\na\n")
    refused("val.txt lists an image twice")
    listed.write_text("\n")
    refused("val.txt lists no image")
    listed.unlink()
    refused("val.txt: No such file")
    (folder / "SegmentationClass").rename(folder / "Masks")
    refused("SegmentationClass is not a folder")
    with pytest.raises(UserError, match="holds no VOCdevkit/VOC2010 with ImageSets/Segmentation"):
        open_pascal_context(voc, "test")


def test_masks_survive_pickling_and_show_in_the_fingerprint(voc):
    source = open_voc_segmentation(voc, "test")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.semantic_mask(0), source.semantic_mask(0))
    before = source.fingerprint()
    assert copy.fingerprint() == before
    write_mask(voc / _MASKS / "2008_01.png", np.eye(30))
    assert source.fingerprint() != before


def test_a_part_forwards_masks_and_labels(voc):
    source = open_voc_segmentation(voc, "test")
    part = Subset(source, [1])
    assert isinstance(source, MaskImages) and isinstance(source, MaskedSource) and has_masks(part)
    assert part.semantic_mask(0).tolist() == [[-1, -1, -2]]
    assert part.labels.shape == (1, 20) and (part.labels == -1).all()

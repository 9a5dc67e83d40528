"""VOC: labels from lists and from XML, roots, published counts, refusals."""

import pickle
import shutil

import numpy as np
import pytest

from tests.data.sources.layouts import VOC_TEST, VOC_TRAIN, make_voc, voc_flags
from trm_jax.data import partial_labels
from trm_jax.data.sources import open_source, voc
from trm_jax.data.sources.voc import VOC_CLASSES, VocImages
from trm_jax.types import BadSampleError, UserError


@pytest.fixture
def root(tmp_path):
    return make_voc(tmp_path)


def _open(root, split="train", **options):
    return VocImages(root, split, allow_empty_classes=True, **options)


def _positives(source):
    return [{VOC_CLASSES[c] for c in np.flatnonzero(row == 1)} for row in source.labels]


def test_positive_means_a_non_difficult_instance(root):
    source = _open(root)
    assert source.ids == tuple(VOC_TRAIN) and source.labels.shape == (5, 20)
    assert source.labels.dtype == np.int8 and set(np.unique(source.labels)) == {-1, 1}
    assert _positives(source) == [{"chair", "dog"}, {"car"}, set(), {"person"}, {"aeroplane"}]
    assert _open(root, "test").ids == tuple(VOC_TEST)
    assert sorted(VOC_CLASSES) == list(VOC_CLASSES) and len(VOC_CLASSES) == 20


@pytest.mark.parametrize(("difficult", "value"), [("negative", -1), ("ignore", 0), ("positive", 1)])
def test_classes_with_difficult_instances_only(root, difficult, value):
    labels = _open(root, difficult=difficult).labels
    flags = np.asarray([voc_flags(instances) for instances in VOC_TRAIN.values()])
    assert (flags == 0).sum() == 4
    np.testing.assert_array_equal(labels[flags == 0], value)
    np.testing.assert_array_equal(labels[flags != 0], flags[flags != 0])


def test_lists_and_annotations_give_the_same_labels(tmp_path):
    lists, xml = (make_voc(tmp_path / str(flag), class_files=flag) for flag in (True, False))
    for split in ("train", "test"):
        sources = [_open(root, split, difficult="ignore") for root in (lists, xml)]
        np.testing.assert_array_equal(sources[0].labels, sources[1].labels)
        assert sources[0].ids == sources[1].ids
    assert {path.suffix for path in sources[0].annotation_files} == {".txt"}
    assert {path.suffix for path in sources[1].annotation_files[1:]} == {".xml"}
    # With one list missing all labels come from the annotations.
    (lists / "VOCdevkit/VOC2007/ImageSets/Main/dog_test.txt").unlink()
    np.testing.assert_array_equal(_open(lists, "test").labels, _open(xml, "test").labels)


def test_the_root_may_be_any_of_three_folders(root):
    for folder in (root, root / "VOCdevkit", root / "VOCdevkit/VOC2007"):
        assert _open(folder).ids == tuple(VOC_TRAIN)
    shutil.move(root / "VOCdevkit/VOC2007", root / "mine")
    assert _open(root / "mine").ids == tuple(VOC_TRAIN)


def test_2012_trains_on_train_and_is_tested_on_val(tmp_path):
    train = {f"2008_{name}": instances for name, instances in VOC_TRAIN.items()}
    test = {f"2009_{name}": instances for name, instances in VOC_TEST.items()}
    root = make_voc(tmp_path, year="2012", train=train, test=test)
    assert _open(root, year="2012").ids == tuple(train)
    assert open_source("voc", "test", root=str(root), year="2012").ids == tuple(test)
    with pytest.raises(UserError, match="holds no VOC2007; expected VOCdevkit/VOC2007"):
        _open(root)
    with pytest.raises(UserError, match="holds no VOC2007"):
        _open(root / "VOCdevkit/VOC2012")
    with pytest.raises(UserError, match="year is '2010'; VOC has 2007 and 2012"):
        _open(root, year="2010")


def test_published_counts(root, monkeypatch):
    totals = {key: sum(counts) for key, (_, counts) in voc.OFFICIAL_COUNTS.items()}
    assert totals == {
        ("2007", "train"): 7306,
        ("2007", "test"): 7013,
        ("2012", "train"): 0,
        ("2012", "test"): 0,
    }
    counts = tuple(np.sum(_open(root).labels == 1, axis=0).tolist())
    monkeypatch.setitem(voc.OFFICIAL_COUNTS, ("2007", "train"), (5, counts))
    _open(root)
    wrong = (*counts[:11], 3, *counts[12:])
    monkeypatch.setitem(voc.OFFICIAL_COUNTS, ("2007", "train"), (5, wrong))
    with pytest.raises(UserError, match="1 train images are positive for dog, 3 in the published"):
        _open(root)
    _open(root, check_counts=False)
    monkeypatch.setitem(voc.OFFICIAL_COUNTS, ("2007", "train"), (6, wrong))
    _open(root)  # a part of the split


def test_the_hcp_mask_is_drawn_over_all_images_in_file_order(root):
    observed = partial_labels.observe_source(_open(root), protocol="hcp", known_fraction=0.3)
    known = np.random.RandomState(0).rand(5, 20) < 0.3
    np.testing.assert_array_equal(observed != 0, known)


def test_images(root):
    source = pickle.loads(pickle.dumps(_open(root)))
    assert source.fingerprint() == _open(root).fingerprint()
    assert source.read(0)["image"].shape == (18, 29, 3) and source.captions(0) == ()
    before = source.fingerprint()
    path = source.image_path(1)
    path.write_bytes(path.read_bytes() + b"\0")
    assert source.fingerprint() != before
    path.unlink()
    with pytest.raises(BadSampleError, match="000007.jpg"):
        source.read(1)


def test_a_class_without_a_training_image_is_refused(root):
    with pytest.raises(UserError, match="no training image of bicycle, bird.* and 10 more"):
        VocImages(root, "train")
    assert len(VocImages(root, "test")) == 3


def _main(root):
    return root / "VOCdevkit/VOC2007/ImageSets/Main"


def test_broken_files_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="data.root .*nowhere' is not a folder; expected VOCdevkit"):
        _open(tmp_path / "nowhere")
    flags = _main(root) / "dog_trainval.txt"
    text = flags.read_text()
    flags.write_text(text.replace("000007 -1", "000007 2"))
    with pytest.raises(UserError, match="dog_trainval.txt, line 2: not 'image -1'"):
        _open(root)
    flags.write_text(text.replace("000007 -1\n", ""))
    with pytest.raises(UserError, match="dog_trainval.txt has no line for image 000007"):
        _open(root)
    flags.unlink()
    xml = root / "VOCdevkit/VOC2007/Annotations/000009.xml"
    xml.write_text(xml.read_text().replace("horse", "unicorn"))
    with pytest.raises(UserError, match="000009.xml: 'unicorn' is none of VOC's 20 classes"):
        _open(root)
    xml.write_text("<annotation>")
    with pytest.raises(UserError, match="000009.xml is not readable XML"):
        _open(root)
    xml.unlink()
    with pytest.raises(UserError, match="000009.xml: No such file"):
        _open(root)
    listed = _main(root) / "trainval.txt"
    listed.write_text("000005\n000005\n")
    with pytest.raises(UserError, match="trainval.txt lists an image twice"):
        _open(root)
    listed.write_text("\n")
    with pytest.raises(UserError, match="trainval.txt lists no image"):
        _open(root)
    listed.unlink()
    with pytest.raises(UserError, match="trainval.txt: No such file"):
        _open(root)
    with pytest.raises(UserError, match="difficult is 'no'; it is one of negative, ignore"):
        _open(root, "test", difficult="no")

"""Class folders: labels, names for prompts, splits, and what is refused."""

import pickle

import numpy as np
import pytest

from tests.data.sources.layouts import write_image
from trm_jax.data.sources.image_folder import ImageFolder
from trm_jax.types import BadSampleError, UserError


@pytest.fixture
def root(tmp_path):
    files = ("hot_dog/b.jpg", "hot_dog/a.PNG", "cat/z.JPEG")
    for part, names in (("train", files), ("val", files[1:])):
        for seed, name in enumerate(names):
            write_image(tmp_path / part / name, seed)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def test_folders_are_classes(root):
    source = ImageFolder(root, "train")
    assert source.class_names == ("cat", "hot dog") and source.folders == ("cat", "hot_dog")
    assert source.ids == ("cat/z.JPEG", "hot_dog/a.PNG", "hot_dog/b.jpg")
    assert source.labels.tolist() == [[1, -1], [-1, 1], [-1, 1]]
    assert source.labels.dtype == np.int8 and source.captions(0) == ()
    assert source.read(2)["image"].shape == (18, 24, 3)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.labels, source.labels)
    before = copy.fingerprint()
    source.image_path(1).write_bytes(b"")
    assert before != source.fingerprint()
    with pytest.raises(BadSampleError, match=r"a\.PNG: the file is empty"):
        source.read(1)


def test_test_is_val_unless_test_has_classes(root):
    assert len(ImageFolder(root, "test")) == 2
    write_image(root / "test" / "0001.jpg", 0)  # ImageNet's test images have no classes
    assert len(ImageFolder(root, "test")) == 2
    for name in ("cat", "hot_dog"):
        write_image(root / "test" / name / "0.jpg", 0)
    assert ImageFolder(root, "test").ids == ("cat/0.jpg", "hot_dog/0.jpg")


def test_columns_agree_across_splits(root):
    write_image(root / "train" / "ape" / "0.jpg", 0)
    with pytest.raises(UserError, match="val/ape holds no image; remove the class or set"):
        ImageFolder(root, "test")
    test = ImageFolder(root, "test", allow_empty_classes=True)
    assert test.class_names == ImageFolder(root, "train").class_names == ("ape", "cat", "hot dog")
    assert test.labels.tolist() == [[-1, 1, -1], [-1, -1, 1]]


@pytest.mark.parametrize(
    "file, text",
    [
        ("classes.json", '{"hot_dog": "a sausage", "cat": "cat, tabby"}'),
        ("classes.txt", "\ufeffhot_dog a sausage\n\ncat  cat, tabby\n"),
        ("classes.txt", "hot_dog\ta sausage\ncat\tcat, tabby\n"),
    ],
)
def test_a_file_gives_names_and_order(root, file, text):
    (root / file).write_text(text, encoding="utf-8")
    source = ImageFolder(root, "test")
    assert source.class_names == ("a sausage", "cat, tabby")
    assert source.ids == ("hot_dog/a.PNG", "cat/z.JPEG")
    assert source.labels.tolist() == [[1, -1], [-1, 1]]


def test_another_file_of_names(root):
    (root / "classes.txt").write_text("cat tiger\nhot_dog food\n")
    (root / "other.txt").write_text("cat puma\nhot_dog bun\nunseen thing\n")
    with pytest.raises(UserError, match="unseen holds no image"):
        ImageFolder(root, "test", names=str(root / "other.txt"))
    source = ImageFolder(root, "test", names=str(root / "other.txt"), allow_empty_classes=True)
    assert source.class_names == ("puma", "bun", "thing") and source.labels.shape == (2, 3)
    with pytest.raises(UserError, match="no.txt: No such file or directory; check data.options"):
        ImageFolder(root, "test", names=str(root / "no.txt"))


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("classes.txt", "cat tiger\nhot_dog\n", "line 2: not 'folder name'"),
        ("classes.txt", "cat a\nhot_dog b\ncat c\n", "line 3: folder 'cat' is listed twice"),
        ("classes.txt", "cat tiger\n", "has no name for the class folder 'hot_dog'"),
        ("classes.txt", "\n", "is no table of class folders and names"),
        ("classes.json", "{", "classes.json is not readable"),
        ("classes.json", '["cat"]', "is no table of class folders and names"),
        ("classes.json", '{"cat": 1, "hot_dog": "b"}', "is no table of class folders and names"),
    ],
)
def test_bad_files_of_names(root, file, text, message):
    (root / file).write_text(text)
    with pytest.raises(UserError, match=message):
        ImageFolder(root, "train")


def test_what_is_missing(root):
    with pytest.raises(UserError, match="data.root '.*nowhere' is not a folder; expected"):
        ImageFolder(root / "nowhere", "train")
    with pytest.raises(UserError, match="cat has no train/ with class folders"):
        ImageFolder(root / "val" / "cat", "train")
    with pytest.raises(UserError, match="cat has no test/ or val/ with class folders"):
        ImageFolder(root / "val" / "cat", "test")
    for name in ("cat", "hot_dog"):
        for file in (root / "val" / name).iterdir():
            file.unlink()
    for accepted in (False, True):  # a split without any image is no split
        with pytest.raises(UserError, match="cat holds no image, nor do 1 more class folders"):
            ImageFolder(root, "test", allow_empty_classes=accepted)

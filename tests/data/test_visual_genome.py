"""Visual Genome: what is read of its JSON, which detection a box gets, and what is refused."""

import json
import os
import pickle

import numpy as np
import pytest

from tests.data.sources.regions import line
from trm_jax.data.sources import visual_genome, visual_genome_index
from trm_jax.data.sources.butd import ButdRegions
from trm_jax.data.sources.labelled_regions import RegionSource
from trm_jax.data.sources.visual_genome import DetectedRegions, VisualGenome, best_overlaps
from trm_jax.types import BadSampleError, UserError


def _object(number, box, words, **more):
    """An object of version 1.4; `words` are its synsets' lemmas."""
    synsets = [f"{word}.n.01" for word in words]
    return dict(zip("xywh", box, strict=True)) | {"object_id": number, "synsets": synsets} | more


# Image 1 is twice as large as the detector saw it; 2 has its own features; 3 has none; 4 is broken.
IMAGES = [
    {"image_id": 1, "width": 200, "height": 100, "coco_id": 5, "url": "x"},
    {"image_id": 2, "width": 60, "height": 60, "coco_id": None},
    {"image_id": 3, "width": 50, "height": 50, "coco_id": 6},
    {"image_id": 4, "width": 50, "height": 50, "coco_id": 7},
    {"image_id": 5, "width": 50, "height": 50},
]
OBJECTS = [
    {
        "image_id": 1,
        "objects": [
            _object(11, (0, 0, 100, 100), ["traffic_light"], merged_object_ids=[19]),
            _object(12, (0, 10, 100, 80), [], names=["Stop-Light", "???"]),
            _object(13, (150, 0, 50, 100), ["man", "man"]),
            _object(14, (60, 0, 80, 100), ["tree"]),
            _object(15, (0, 0, 0, 100), ["nothing"]),
        ],
    },
    {
        "image_id": 2,
        "objects": [_object(21, (5, 5, 5, 5), ["man"]), _object(22, (1, 1, 9, 9), ["dog"])],
    },
    {"image_id": 3, "objects": [_object(31, (5, 5, 5, 5), ["man"])]},
    {"image_id": 4, "objects": [_object(41, (5, 5, 5, 5), ["man"])]},
    {"image_id": 5, "objects": [_object(51, (5, 5, 5, 5), ["man"])]},
]
ATTRIBUTES = [
    {
        "image_id": 1,
        "attributes": [
            {"object_id": 19, "attributes": ["Bright Red", "on"]},
            {"object_id": 13, "names": ["man"], "attributes": ["tall", "tall"]},
            {"object_id": 14},
            _object(77, (1, 0, 99, 100), ["lamp"], attributes=["on"]),
        ],
    },
    {"image_id": 2, "attributes": [{"object_id": 22, "attributes": None}]},
]
# In the detector's pixels of image 1, which is 100 x 50 there: IoU with the objects of image 1 by
# hand, in Visual Genome's pixels. Detection 0 is (0, 0)-(100, 100): 1 with 11, 0.8 with 12, 0.99
# with 77; of 14, (60, 0)-(140, 100), it shares 40 x 100 of 140 x 100: 0.286. Detection 2 is
# (140, 0)-(200, 100): 50 / 60 with 13, nothing of 14.
DETECTED = np.asarray([[0, 0, 50, 50], [20, 20, 30, 30], [70, 0, 100, 50]], np.float32)


def _features(number, count):
    return np.arange(3 * count, dtype=np.float32).reshape(count, 3) + 100 * number


@pytest.fixture
def folder(tmp_path):
    """The three files, and npz files of features in `features`."""
    root = tmp_path / "vg"
    root.mkdir()
    for name, content in zip(visual_genome_index.FILES, (IMAGES, OBJECTS, ATTRIBUTES), strict=True):
        (root / name).write_text(json.dumps(content))
    place = tmp_path / "features"
    place.mkdir()
    size = {"image_w": 100, "image_h": 50}
    np.savez(place / "1.npz", x=_features(1, 3), bbox=DETECTED, **size)
    np.savez(place / "2.npz", x=_features(2, 2))
    (place / "4.npz").write_bytes(b"broken")
    np.savez(place / "5.npz", x=_features(5, 3))
    return tmp_path


def _open(folder, **options):
    return VisualGenome(folder / "vg", folder / "features", **{"min_count": 1, **options})


def _read(source):
    """{image id: {row of features: its words}}."""
    found = {}
    for index, name in enumerate(source.ids):
        group = source.group(index)
        rows = (group.features[:, 0].astype(int) % 100 // 3).tolist()
        words = [{source.words[w] for r, w in group.samples if r == k} for k in range(len(rows))]
        found[name] = dict(zip(rows, words, strict=True))
        np.testing.assert_array_equal(group.samples, np.unique(group.samples, axis=0))
    return found


def test_boxes_take_the_detection_they_overlap_most(folder):
    source = _open(folder)
    assert isinstance(source, RegionSource) and source.width == 3
    lights = {"traffic light", "stop-light", "bright red", "on", "lamp"}
    # Objects 11, 12 and 77 share a detection; 14 has none; 15 has no extent.
    expected = {"1": {0: lights, 2: {"man", "tall"}}, "2": {0: {"man"}, 1: {"dog"}}}
    assert _read(source) == expected
    assert source.words == tuple(sorted(lights | {"man", "tall", "dog"}))
    counts = dict(zip(source.words, source.word_counts.tolist(), strict=True))
    assert counts == dict.fromkeys(lights | {"tall", "dog"}, 1) | {"man": 2}
    np.testing.assert_array_equal(source.group(0).boxes, DETECTED[[0, 2]] * 2)
    assert source.group(1).boxes is None
    report = source.report()
    assert report == {
        "images": 2,
        "regions": 4,
        "samples": 9,
        "words": 8,
        "min_count": 1,
        "dropped_words": 2,  # tree and nothing, which have no region
        "dropped_samples": 0,
        "images_in_files": 5,
        "images_without_features": 1,
        "images_unreadable": 1,
        "images_without_boxes": 1,
        "boxes": 11,
        "boxes_without_detection": 2,
        "boxes_sharing_a_detection": 2,
        "objects_without_synset": 1,
    }


def test_the_least_overlap_is_a_number(folder):
    """14 overlaps detection 0 by 40 / 140; 12 by exactly 0.8."""
    assert _read(_open(folder, min_iou=0.28))["1"][0] >= {"tree"}
    assert "stop-light" in _read(_open(folder, min_iou=0.8))["1"][0]
    strict = _open(folder, min_iou=0.81)
    assert _read(strict)["1"] == {
        0: {"traffic light", "bright red", "on", "lamp"},
        2: {"man", "tall"},
    }
    with pytest.raises(UserError, match="min_iou is 0"):
        _open(folder, min_iou=0.0)


def test_overlaps_by_hand():
    boxes = np.asarray([[0, 0, 2, 2], [10, 10, 11, 11], [5, 5, 5, 9]], np.float32)
    detected = np.asarray([[1, 1, 3, 3], [0, 0, 2, 3], [0, 0, 2, 3], [5, 5, 6, 9]], np.float32)
    # The first: 1 / 7 with detection 0, 4 / 6 with 1 and 2. The last has no width.
    assert best_overlaps(boxes, detected, min_iou=0.5).tolist() == [1, -1, -1]
    assert best_overlaps(boxes, detected[:1], min_iou=1 / 7).tolist() == [0, -1, -1]
    assert best_overlaps(boxes, detected[:1], min_iou=0.15).tolist() == [-1, -1, -1]
    assert best_overlaps(boxes, detected[:0], min_iou=0.5).tolist() == [-1, -1, -1]
    assert best_overlaps(boxes[:0], detected, min_iou=0.5).tolist() == []


def test_rare_words_are_dropped_and_counted(folder):
    source = _open(folder, min_count=2)
    assert source.words == ("man",) and _read(source) == {"1": {2: {"man"}}, "2": {0: {"man"}}}
    assert (source.report()["dropped_words"], source.report()["dropped_samples"]) == (9, 7)
    with pytest.raises(UserError, match="no word has 5 regions, the most frequent has 2"):
        VisualGenome(folder / "vg", folder / "features")


def test_files_of_version_1_0_say_the_same(folder):
    expected = _read(_open(folder))
    objects, attributes = json.loads(json.dumps([OBJECTS, ATTRIBUTES]))
    for entry in (*objects, *attributes):
        entry["id"] = entry.pop("image_id")
        for item in entry.get("objects", []) + entry.get("attributes", []):
            item["id"] = 11 if item["object_id"] == 19 else item["object_id"]  # nothing was merged
            del item["object_id"]
            item["synsets"] = [{"synset_name": s} for s in item.get("synsets", [])]
            if "names" in item:
                item["object_names"] = item.pop("names")
            item.pop("merged_object_ids", None)
    (folder / "vg" / "objects.json").write_text(json.dumps(objects, indent=1))
    (folder / "vg" / "attributes.json").write_text("\ufeff" + json.dumps(attributes))
    assert _read(_open(folder)) == expected


def test_what_was_read_is_kept_until_a_file_changes(folder, monkeypatch):
    reads, matches = [], []
    read, overlaps = visual_genome_index.read_annotations, visual_genome.best_overlaps
    monkeypatch.setattr(
        visual_genome_index, "read_annotations", lambda root: reads.append(root) or read(root)
    )
    monkeypatch.setattr(
        visual_genome, "best_overlaps", lambda *a, **k: matches.append(a) or overlaps(*a, **k)
    )
    first, second = _read(_open(folder)), _read(_open(folder))
    assert first == second and len(reads) == 1 and len(matches) == 1
    report = _open(folder).report()
    _open(folder, min_iou=0.6)
    assert len(reads) == 1 and len(matches) == 2
    # Another feature file: matched anew, the JSON is not read.
    np.savez(folder / "features" / "4.npz", x=_features(4, 1))
    assert _read(_open(folder))["4"] == {0: {"man"}} and len(reads) == 1
    objects = folder / "vg" / "objects.json"
    objects.write_text(objects.read_text().replace("tree.n", "bush.n"))
    os.utime(objects, ns=(1, 1))
    assert "bush" in _open(folder, min_iou=0.28).words and len(reads) == 2
    (folder / "vg" / "visual_genome.npz").write_bytes(b"broken")
    assert _open(folder).report()["boxes"] == report["boxes"] and len(reads) == 3
    names = {path.name for path in (folder / "vg").iterdir()} - {*visual_genome_index.FILES}
    assert len(names) == 2 and "visual_genome.npz" in names
    _open(folder, index_dir=folder / "index")
    assert len(list((folder / "index").iterdir())) == 2
    with pytest.raises(UserError, match="cannot be written .*set data.options.index_dir"):
        _open(folder, index_dir=objects)


def test_files_may_go_by_coco_ids(folder):
    place = folder / "features"
    (place / "1.npz").rename(place / "COCO_val2014_000000000005.npz")
    (place / "2.npz").rename(place / "000000000006.npz")
    (place / "5.npz").unlink()  # its name is a COCO id too
    source = _open(folder, naming="coco", min_iou=0.9)
    # Image 3 takes what was image 2's: two features, one object, no boxes.
    assert source.ids == ("1",) and source.report()["images_without_boxes"] == 1
    with pytest.raises(UserError, match="naming is 'flickr'; it is visual_genome or coco"):
        _open(folder, naming="flickr")
    for path in place.iterdir():
        if path.name != "000000000006.npz":
            path.unlink()
    with pytest.raises(UserError, match=r"features of none of the 5 images .* 000000000006 and 0"):
        _open(folder)


def test_a_group_that_cannot_be_read_is_a_bad_sample(folder):
    source = pickle.loads(pickle.dumps(_open(folder)))
    assert source.fingerprint() == _open(folder).fingerprint()
    place = folder / "features" / "1.npz"
    size = {"image_w": 100, "image_h": 50}
    broken = _features(1, 3)
    broken[1, 1] = np.nan
    cases = {
        "NaN or an infinity": {"x": broken, "bbox": DETECTED, **size},
        "have 2 numbers, not 3": {"x": broken[:, :2], "bbox": DETECTED, **size},
        "image 1: its features were changed": {"x": _features(1, 2), "bbox": DETECTED[:2], **size},
        "boxes or the image's size": {"x": _features(1, 3), "bbox": DETECTED + np.inf, **size},
    }
    for message, arrays in cases.items():
        np.savez(place, **arrays)
        with pytest.raises(BadSampleError, match=message):
            source.group(0)
    place.unlink()
    with pytest.raises(BadSampleError, match="No such file"):
        source.group(0)


def test_detected_regions_are_as_many_as_there_are(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.random((count, 3), np.float32) for count in (1, 5, 2)]
    boxes = [rng.random((len(image), 4), np.float32) for image in images]
    rows = (line(f"{k}", *pair) for k, pair in enumerate(zip(images, boxes, strict=True)))
    (tmp_path / "a.tsv").write_bytes(b"".join(rows))
    source, some = (DetectedRegions(tmp_path / "a.tsv", most=most) for most in (0, 2))
    assert isinstance(source, ButdRegions) and source.find(["2"]) == 2
    for k in range(3):
        np.testing.assert_array_equal(source.read(k)["features"], images[k])
        np.testing.assert_array_equal(source.boxes(k)[0], boxes[k])
        np.testing.assert_array_equal(some.read(k)["features"], images[k][:2])
        np.testing.assert_array_equal(some.boxes(k)[0], boxes[k][:2])
    assert source.boxes(0)[1] == (50, 33)
    with pytest.raises(UserError, match="regions is -1"):
        DetectedRegions(tmp_path / "a.tsv", most=-1)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_a_list_is_read_in_parts_of_any_size(tmp_path, chunk):
    path = tmp_path / "a.json"
    content = [{"a": 'é]}"' * k, "b": [{}, {"c": -1.5e3}]} for k in range(5)]
    for text in (json.dumps(content), json.dumps(content, indent=2, ensure_ascii=False)):
        path.write_text(text)
        assert list(visual_genome_index.elements(path, chunk)) == content
        path.write_text(text[:-30])
        with pytest.raises(UserError, match=r"element 4: .*cut short or damaged"):
            list(visual_genome_index.elements(path, chunk))
    path.write_text("[ ] ")
    assert list(visual_genome_index.elements(path, chunk)) == []


@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (0, "{}", "it is no JSON list"),
        (0, "[1]", "element 0 is no JSON object"),
        (0, '[{"image_id": 1, "width": 5}]', "element 0 lacks image_id, width or height"),
        (0, json.dumps(IMAGES[:1] * 2), "lists the image 1 twice"),
        (0, json.dumps(IMAGES[1:]), "objects.json, image 1: image_data.json does not know it"),
        (0, '[{"image_id": 1,, }]', "element 0: .*damaged"),
        (1, '[{"image_id": 1}]', "element 0 lacks image_id or objects"),
        (1, json.dumps(OBJECTS[1:2] * 2), "image 2 is listed twice"),
        (1, '[{"image_id": 1, "objects": [3]}]', "image 1: objects are no JSON objects"),
        (1, '[{"image_id": 1, "objects": [{"object_id": 8, "x": 1, "y": 2, "w": 3}]}]',
         r"image 1, object 8: its box x, y, w, h is \[1, 2, 3, None\]"),
        (1, '[{"image_id": 1, "objects": [{"x": 1, "y": 2, "w": NaN, "h": 1}]}]',
         "not four numbers"),
        (1, '[{"image_id": 1, "objects": [{"x": 1, "y": 2, "w": 1, "h": 1, "synsets": "a.n.01"}]}]',
         "synsets is 'a.n.01', not a list of strings"),
        (2, '[{"image_id": 1, "attributes": [{"object_id": 11, "attributes": [1]}]}]',
         r"attributes is \[1\], not a list"),
        (2, '[{"image_id": 9, "attributes": []}]', "attributes.json, image 9: image_data.json"),
        (2, None, "attributes.json: No such file.*a folder of Visual Genome has image_data.json"),
    ],
)  # fmt: skip
def test_files_that_are_not_visual_genome_s(folder, number, text, message):
    path = folder / "vg" / visual_genome_index.FILES[number]
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        _open(folder)
    assert "\n" not in str(error.value)


def test_text_of_another_encoding_is_refused(folder):
    (folder / "vg" / "objects.json").write_bytes(
        '[{"image_id": 1, "objects": "é"}]'.encode("latin-1")
    )
    with pytest.raises(UserError, match="objects.json, after element 0: not UTF-8"):
        _open(folder)


@pytest.mark.realdata
def test_real_detections_are_found_again(data_root, tmp_path):
    """Objects are real detected boxes of ten photos, in another size and a little moved."""
    place = data_root / "visual_genome" / "butd_demo"
    detected = DetectedRegions(place, index_dir=tmp_path)
    images, objects, truth = [], [], {}
    rng = np.random.default_rng(0)
    for index, name in enumerate(detected.ids):
        boxes, (width, height) = detected.boxes(index)
        coco = int(name[-12:])
        images.append(
            {"image_id": index + 1, "width": 2 * width, "height": 3 * height, "coco_id": coco}
        )
        # Less than 4% of a side: the IoU with the box itself stays above 0.8.
        sides = boxes[:, 2:] - boxes[:, :2]
        moved = boxes[:, :2] + sides * rng.uniform(0, 0.04, sides.shape)
        rows = np.concatenate([moved, sides], 1) * [2, 3, 2, 3]
        items = [_object(k, row, [f"w{k}"]) for k, row in enumerate(rows.tolist())]
        objects.append({"image_id": index + 1, "objects": items})
        truth[str(index + 1)] = detected.read(index)["features"]
    for name, content in zip(visual_genome_index.FILES, (images, objects, []), strict=True):
        (tmp_path / name).write_text(json.dumps(content))
    source = VisualGenome(tmp_path, place, min_count=1, naming="coco", index_dir=tmp_path)
    report = source.report()
    assert report["images"] == 10 and report["boxes"] == 360 and source.width == 2048
    assert report["boxes_without_detection"] == 0 and report["samples"] == 360
    right = 0
    for index, name in enumerate(source.ids):
        group = source.group(index)
        for region, word in group.samples.tolist():
            own = truth[name][int(source.words[word][1:])]
            right += np.array_equal(group.features[region], own)
    assert right >= 0.95 * 360  # some detections nearly coincide

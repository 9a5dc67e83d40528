"""COCO and VOC in their official layouts, with a few small images of noise."""

import json

import cv2
import numpy as np
from PIL import Image

from trm_jax.data.sources.voc import VOC_CLASSES

# (class, difficult) of the instances of each image. Train covers: a class once and once more
# difficult, a class that is only difficult, and an image with difficult instances only.
VOC_TRAIN = {
    "000005": [("chair", 0), ("chair", 1), ("dog", 0)],
    "000007": [("car", 0), ("person", 1)],
    "000009": [("horse", 1), ("person", 1)],
    "000012": [("person", 0), ("person", 0)],
    "000016": [("tvmonitor", 1), ("aeroplane", 0)],
}
VOC_TEST = {
    "000001": [("dog", 0), ("person", 0)],
    "000002": [("train", 0)],
    "000003": [("chair", 1)],
}


def write_image(path, seed):
    """A JPEG of noise; every third is grey."""
    rng = np.random.default_rng(seed)
    shape = (18 + seed % 5, 24 + seed % 7)
    image = rng.integers(0, 256, shape if seed % 3 == 0 else (*shape, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def _xml(name, instances):
    objects = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult>"
        "<part><name>head</name></part></object>"
        for label, difficult in instances
    )
    return f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>"


def voc_flags(instances):
    """The 20 flags of one image: 1, 0 (only difficult) or -1."""
    kinds = {label: [d for name, d in instances if name == label] for label, _ in instances}
    return [-1 if name not in kinds else int(min(kinds[name]) == 0) for name in VOC_CLASSES]


def make_voc(root, *, year="2007", train=VOC_TRAIN, test=VOC_TEST, class_files=True):
    """root/VOCdevkit/VOC{year}; returns `root`."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (folder / "Annotations").mkdir()
    parts = ("trainval", "test") if year == "2007" else ("train", "val")
    for part, images in zip(parts, (train, test), strict=True):
        (main / f"{part}.txt").write_text("".join(f"{name}\n" for name in images))
        flags = {name: voc_flags(instances) for name, instances in images.items()}
        for column, label in enumerate(VOC_CLASSES if class_files else ()):
            lines = "".join(f"{name} {row[column]:2d}\n" for name, row in flags.items())
            (main / f"{label}_{part}.txt").write_text(lines)
        for name, instances in images.items():
            (folder / "Annotations" / f"{name}.xml").write_text(_xml(name, instances))
            write_image(folder / "JPEGImages" / f"{name}.jpg", int(name[-6:]))
    return root


def make_coco(root, *, year="2017", num_train=7, num_test=4):
    """root/annotations and root/{train,val}{year}; image 3 of each split has no annotation."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part, first, count in (("train", 100, num_train), ("val", 900, num_test)):
        numbers = [first + (5 * i) % count for i in range(count)]  # in no order
        content = {
            "images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in numbers],
            "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
            "annotations": [
                {"id": n, "image_id": n, "category_id": 3 if n % 2 else 7}
                for n in numbers
                if n != first + 3
            ],
        }
        texts = [
            {"id": k, "image_id": n, "caption": f"naïve text {n} {k}"}
            for n in numbers[:2]
            for k in range(2)
        ]
        files = {"instances": content, "captions": {"images": [], "annotations": texts}}
        for kind, table in files.items():
            path = root / "annotations" / f"{kind}_{part}{year}.json"
            path.write_text(json.dumps(table))
        for n in numbers:
            write_image(root / f"{part}{year}" / f"{n:012d}.jpg", n)
    return root


def write_mask(path, values, *, palette=True):
    """A PNG of the integers `values` [h, w]; with a palette of random colours, else grey."""
    values = np.asarray(values, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette:
        # Colours that say nothing about the index: a reader of colours cannot pass.
        colors = np.random.default_rng(0).integers(0, 256, 768, np.uint8)
        image.putpalette(colors.tolist())
    image.save(path)


def write_photo(path, height, width, seed=0):
    """A picture of noise, [height, width]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    assert cv2.imwrite(str(path), image)


def make_masked_voc(root, masks, *, year="2012", lists="Segmentation", folder="SegmentationClass"):
    """root/VOCdevkit/VOC{year} with {"train": {name: values}, "val": ...}; returns that folder."""
    devkit = root / "VOCdevkit" / f"VOC{year}"
    (devkit / "ImageSets" / lists).mkdir(parents=True)
    for part, items in masks.items():
        (devkit / "ImageSets" / lists / f"{part}.txt").write_text("".join(f"{n}\n" for n in items))
        for name, values in items.items():
            write_photo(devkit / "JPEGImages" / f"{name}.jpg", *np.shape(values))
            write_mask(devkit / folder / f"{name}.png", values)
    return devkit


def make_coco_objects(root, annotations, *, size=(8, 10)):
    """root/annotations/instances_val2017.json and one photo of `size`, id 7, of three classes.

    annotations: (category id, segmentation, iscrowd) each; ids of categories 1, 3 and 90.
    """
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    names = {90: "toothbrush", 1: "person", 3: "car"}
    content = {
        "images": [{"id": 7, "file_name": "007.jpg", "height": size[0], "width": size[1]}],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
        "annotations": [
            {"id": k, "image_id": 7, "category_id": c, "segmentation": s, "iscrowd": crowd}
            for k, (c, s, crowd) in enumerate(annotations)
        ],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    write_photo(root / "val2017" / "007.jpg", *size)
    return root

"""The benchmark of the input pipeline: its plan, its figures, and one measurement."""

import json
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks import input_pipeline_report as report
from benchmarks import pil_recipes
from trm_jax.data import transforms
from trm_jax.types import UserError


def test_every_method_meets_its_peer_under_the_same_condition():
    tasks = report.plan([448, 224], ["none", "tai"], [0, 2])
    names = [task.pop("name") for task in tasks]
    assert names[:4] == ["cv2", "cv2, antialiased", "trm_jax", "torch DataLoader"]
    assert len(tasks) == 2 * (2 + 2 * 2 * 2)
    for number in range(0, len(tasks), 2):
        assert tasks[number] == tasks[number + 1]


def _measured():
    """Two rounds on a machine that is half as fast in the second."""
    tasks = report.plan([448], ["none"], [0])
    images = {"cv2": 1000, "cv2, antialiased": 800, "trm_jax": 600, "torch DataLoader": 200}
    return tasks, [
        {**task, "round": number, "images": images[task["name"]], "cpu_seconds": 1.0 + number}
        | {"wall_seconds": 2.0 + 2 * number}
        for number in (0, 1)
        for task in tasks
    ]


def test_rows_hold_medians_and_ratios_within_a_round():
    rows = report.rows(*_measured())
    core = [row for row in rows if row["metric"] == "images_per_s_per_core"]
    ratios = {row["against"]: row["ratio"] for row in core if "against" in row}
    assert ratios == {"torch DataLoader": 3.0, "cv2": 0.6, "cv2, antialiased": 0.75}
    ours = next(row for row in core if row["name"] == "trm_jax")
    assert ours["values"] == {"0": 600.0, "1": 300.0} and ours["median"] == 450.0
    assert ours["rounds"] == 2 and "seeds" not in ours
    assert ours["condition"] == {
        "source": "coco",
        "image_size": 448,
        "augment": "none",
        "workers": 0,
    }
    clock = [row for row in rows if row["metric"] == "images_per_s" and row["name"] == "cv2"]
    assert clock[0]["values"] == {"0": 500.0, "1": 250.0} and "ratio" not in clock[0]
    page = report.page(rows)
    assert "| 448 | none | 0 | trm_jax | 450 (300 to 600) | 3.00 x torch DataLoader |" in page
    assert page.count("\n| 448 |") == 6


@pytest.fixture
def photos(tmp_path):
    """A folder in COCO's layout with 40 images, one batch and a bit."""
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(40):
        name = f"{number}.jpg"
        pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (80, 60))
        cv2.imwrite(str(tmp_path / "train2017" / name), pixels)
        images.append({"id": number, "file_name": name})
        annotations.append({"id": number, "image_id": number, "category_id": 1})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}],
    }
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(content))
    return tmp_path


def test_one_measurement_counts_images_and_cpu_time_of_workers(photos):
    task = {"name": "trm_jax", "augment": "tai", "image_size": 32, "workers": 1, "seconds": 0.5}
    task |= {"data": str(photos), "year": "2017", "packages": ["grain"]}
    result = report.measure({**task, "cores": sorted(os.sched_getaffinity(0))})
    assert result["images"] > 0 and result["images"] % 32 == 0
    assert 0.5 <= result["wall_seconds"] < 5.0
    assert 0.1 < result["cpu_seconds"] < 2.5 * result["wall_seconds"]
    assert set(result["versions"]) == {"grain"}


def test_a_failed_measurement_says_why(tmp_path):
    task = {"name": "cv2", "augment": "none", "image_size": 32, "workers": 0, "seconds": 0.1}
    task |= {"data": str(tmp_path / "gone"), "year": "2017", "cores": [0], "packages": []}
    with pytest.raises(UserError, match="cv2, 32 px, none, workers 0: .*gone' is not a folder"):
        report.measure(task)


@pytest.mark.parametrize("name", pil_recipes.RECIPES)
def test_peers_transform_as_the_package_does(name):
    assert set(pil_recipes._OPERATIONS) == set(transforms._OPERATIONS)
    rng = np.random.default_rng(0)
    pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (80, 60))
    transform = transforms.image_transform(name, 48)
    ours, theirs = [], []
    for seed in range(200):
        ours.append(transform(pixels, np.random.default_rng(seed)))
        image = pil_recipes.RECIPES[name](
            Image.fromarray(pixels), 48, np.random.default_rng(seed + 1000)
        )
        theirs.append(np.asarray(image))
        assert theirs[-1].shape == (48, 48, 3)
    # Other draws of the same distribution: means and spreads over many images agree.
    ours, theirs = np.stack(ours).astype(float), np.stack(theirs).astype(float)
    assert abs(ours.mean() - theirs.mean()) < 6
    assert abs(ours.std(axis=0).mean() - theirs.std(axis=0).mean()) < 6


@pytest.mark.parametrize("name", transforms._OPERATIONS)
def test_operations_of_peers_are_those_of_the_package(name):
    rng = np.random.default_rng(1)
    pixels = cv2.resize(rng.integers(0, 256, (5, 5, 3), np.uint8), (60, 60))
    for sign in (-1, 1):
        ours = transforms._OPERATIONS[name](pixels, 0.7, sign).astype(int)
        theirs = np.asarray(pil_recipes._OPERATIONS[name](Image.fromarray(pixels), 0.7, sign))
        assert abs(ours - theirs)[5:-5, 5:-5].mean() < 2.0

"""What benchmarks/input_pipeline.py measures: one method, for some seconds, in its own process.

python benchmarks/input_pipeline_methods.py '{"name": "trm_jax", "data": "FOLDER", ...}'

prints {"images", "wall_seconds", "cpu_seconds"} of a window behind a warm-up, and versions. CPU
seconds are those of the process and of all its children (Linux).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from trm_jax.data import examples, image_ops, pipeline, transforms  # noqa: E402
from trm_jax.data.sources.coco import CocoImages  # noqa: E402
from trm_jax.models.clip.config import CLIP_MEAN, CLIP_STD  # noqa: E402

BATCH = 32
WARM_UP = 8 * BATCH  # more than any method reads ahead


def trm_jax(task: dict[str, Any]) -> Iterator[int]:
    """The package's training batches: uint8 images with labels."""
    transform = transforms.image_transform(task["augment"], task["image_size"])
    batches = pipeline.train_batches(
        examples.MultiLabelExamples(_source(task), None, transform),
        batch_size=BATCH,
        seed=0,
        num_steps=10**6,
        workers=task["workers"],
    )
    for batch in batches:
        yield len(batch["image"])


def cv2_plain(task: dict[str, Any]) -> Iterator[int]:
    """Decoding and one bicubic resize, which does not antialias; one thread, nothing else."""
    size = (task["image_size"],) * 2
    yield from _loop(task, lambda image: cv2.resize(image, size, interpolation=cv2.INTER_CUBIC))


def cv2_antialiased(task: dict[str, Any]) -> Iterator[int]:
    """The same with the package's antialiased resize."""
    yield from _loop(task, lambda image: image_ops.resize(image, task["image_size"]))


def torch_dataloader(task: dict[str, Any]) -> Iterator[int]:
    """torch's DataLoader; PIL decodes and transforms, then floats are normalised."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        _PilDataset(task),  # pyright: ignore[reportArgumentType] (torch needs no base class)
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=task["workers"],
        persistent_workers=task["workers"] > 0,
    )
    while True:
        for images, _ in loader:
            yield len(images)


METHODS: dict[str, Callable[[dict[str, Any]], Iterator[int]]] = {
    "trm_jax": trm_jax,
    "cv2": cv2_plain,
    "cv2, antialiased": cv2_antialiased,
    "torch DataLoader": torch_dataloader,
}


class _PilDataset:
    """(normalised float32 [3, size, size], labels) of each photo."""

    def __init__(self, task: dict[str, Any]):
        self._source, self._task = _source(task), task

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        import torch
        from PIL import Image

        from benchmarks import pil_recipes

        with Image.open(self._source.image_path(index)) as file:
            image = file.convert("RGB")
        recipe = pil_recipes.RECIPES[self._task["augment"]]
        image = recipe(image, self._task["image_size"], np.random.default_rng())
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        pixels = pixels.to(torch.float32).div_(255).sub_(mean).div_(std)
        return pixels, torch.from_numpy(self._source.labels[index])


def _loop(task: dict[str, Any], resize: Callable[[np.ndarray], np.ndarray]) -> Iterator[int]:
    source = _source(task)
    while True:
        for index in range(len(source)):
            data = np.fromfile(source.image_path(index), np.uint8)
            resize(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB))
            yield 1


def _source(task: dict[str, Any]) -> CocoImages:
    return CocoImages(task["data"], "train", year=task["year"], allow_empty_classes=True)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Runs task["name"] on task["cores"] for task["seconds"]."""
    os.sched_setaffinity(0, task["cores"])
    if len(task["cores"]) == 1:
        cv2.setNumThreads(0)
    stream = METHODS[task["name"]](task)
    warm = 0
    while warm < WARM_UP:
        warm += next(stream)
    started, cpu, images = time.perf_counter(), _cpu_seconds(), 0
    while time.perf_counter() - started < task["seconds"]:
        images += next(stream)
    result = {
        "images": images,
        "wall_seconds": time.perf_counter() - started,
        "cpu_seconds": _cpu_seconds() - cpu,
        "versions": {name: metadata.version(name) for name in task["packages"]},
    }
    stream.close()  # pyright: ignore[reportAttributeAccessIssue] (a generator)
    return result


def _cpu_seconds() -> float:
    """User and system time of this process, its living descendants and their dead children."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        number = int(path.parent.name)
        parents[number], ticks[number] = int(fields[1]), sum(map(int, fields[11:15]))
    own, grown = {os.getpid()}, True
    while grown:
        children = {number for number, parent in parents.items() if parent in own} - own
        own, grown = own | children, bool(children)
    return sum(ticks[number] for number in own) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))

"""The measurements of benchmarks/matching.py, each run in a process of its own.

python benchmarks/matching_workers.py '{"part": "memory", "sides": ["ours"], ...}'

prints the rows as JSON.
"""

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import harness, scoring_workers  # noqa: E402
from benchmarks import matching_sides as sides_of  # noqa: E402
from benchmarks.matching_sides import SIDES, Task  # noqa: E402
from benchmarks.measurements import short, timed_row  # noqa: E402
from trm_jax.data import caption_words  # noqa: E402
from trm_jax.evaluate import caption_prototypes, knowledge_matching  # noqa: E402
from trm_jax.models import knowledge  # noqa: E402

NETWORKS = {"features": 2048, "word_width": 300}  # the paper's
TOP, QUERIES = 10, 20  # answers of a query, and queries of a round
_ALL_IMAGES_MB = 4096.0  # a caption meets all images at once


def speed_rows(task: Task) -> list[dict[str, Any]]:
    """Seconds of all sides, in turns, and how far their scores are apart."""
    inputs = sides_of.draw(task)
    results = {name: np.zeros((task.images, task.captions), np.float32) for name in task.sides}
    runs = {name: SIDES[name](task, inputs, results[name]) for name in task.sides}
    done = {name: run() for name, run in runs.items()}  # compiles
    rows = []
    for name in task.sides[1:]:
        apart = np.abs(results["ours"][: done[name]] - results[name][: done[name]]).max()
        rows.append(timed_row(task, name, "max_difference", [float(apart)], ""))
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in task.sides}
    for number in range(task.rounds):
        for name in task.sides if number % 2 else task.sides[::-1]:
            spent[name].append(_spent(runs[name]))
    scaled = {
        name: [(wall * task.images / done[name], cpu * task.images / done[name]) for wall, cpu in x]
        for name, x in spent.items()
    }
    pairs, own = task.images * task.captions, [wall for wall, _ in scaled["ours"]]
    more = {"distinct_words": len(inputs.prototypes)}
    for name, found in scaled.items():
        walls, timed = [wall for wall, _ in found], {"timed_images": done[name]}
        speed = timed_row(
            task, name, "pairs_per_s", [pairs / x for x in walls], "pairs/s", more | timed
        )
        if name != "ours":
            times = statistics.median(x / y for x, y in zip(walls, own, strict=True))
            speed |= {"ratio": short(times)}
        rows += [speed, timed_row(task, name, "seconds", walls, "s", more | timed)]
        rows.append(
            timed_row(task, name, "cpu_seconds", [cpu for _, cpu in found], "s", more | timed)
        )
    return rows


def memory_rows(task: Task) -> list[dict[str, Any]]:
    """The peak of one side above inputs and result, in its first run: compiling is part of it."""
    (name,) = task.sides
    inputs = sides_of.draw(task)
    out = np.ones((task.images, task.captions), np.float32)  # all of it is there before the run
    run = SIDES[name](task, inputs, out)
    peak = _device_peak_mb(name, run) if jax.default_backend() == "gpu" else peak_mb(run)
    held = {"inputs_mb": round(sum(x.nbytes for x in (inputs.regions, inputs.prototypes)) / 1e6)}
    more = {"result_mb": round(out.nbytes / 1e6), **held}
    return [timed_row(task, name, "peak_mb", [peak], "MB", more)]


def query_rows(task: Task) -> list[dict[str, Any]]:
    """Seconds of a single query, from features or text to the best answers, its parts and both
    directions; "first" compiles."""
    model = knowledge.build({**NETWORKS, "width": task.width})
    variables, rng = knowledge.init(model, jax.random.key(0)), np.random.default_rng(1)
    shape = (task.images, task.regions, NETWORKS["features"])
    mask = np.ones((1, task.regions), bool)
    encode = jax.jit(functools.partial(model.apply, variables, method="encode"))
    inputs = sides_of.draw(task)
    vocabulary = tuple(f"word{k}" for k in range(task.knowledge))
    known, vectors = frozenset(vocabulary), np.zeros((task.knowledge, 1), np.float32)
    prototypes = rng.standard_normal((task.knowledge, task.width), np.float32)
    encoded = jax.block_until_ready(jax.device_put((inputs.regions, inputs.mask)))
    features = rng.standard_normal((1, *shape[1:]), np.float32)
    text = " ".join(vocabulary[k] for k in rng.choice(task.knowledge, task.words, replace=False))

    def encode_image() -> Any:
        return jax.block_until_ready(encode(features, mask))

    def captions_of_image() -> np.ndarray:
        mu = encode_image()
        scores = knowledge_matching.score_all([(mu, mask)], inputs.prototypes, inputs.captions)
        return np.argsort(-scores[0], kind="stable")[:TOP]

    def words_of_caption() -> tuple[caption_words.CaptionWords, np.ndarray]:
        words = caption_words.usable([text], known, lambda word: False)
        found = caption_prototypes.estimate(
            words, vocabulary, vectors, prototypes, lambda _: vectors[:0], unknown="drop"
        )
        return words, found.vectors

    def images_of_caption() -> np.ndarray:
        words, own = words_of_caption()
        scores = knowledge_matching.score_all([encoded], own, words, memory_mb=_ALL_IMAGES_MB)
        return np.argsort(-scores[:, 0], kind="stable")[:TOP]

    rows, repeats = [], range(task.rounds)
    for name, run in (
        ("image query", captions_of_image),
        ("image query: encoder", encode_image),
        ("caption query", images_of_caption),
        ("caption query: words", words_of_caption),
    ):
        first = _spent(run)[0]
        found = [statistics.median(_spent(run)[0] for _ in range(QUERIES)) for _ in repeats]
        rows.append(timed_row(task, name, "seconds", found, "s"))
        if ":" not in name:  # parts have been compiled with the whole
            rows.append(timed_row(task, name, "first", [first], "s"))
    return rows


def size_rows(task: Task) -> list[dict[str, Any]]:
    """Millions of parameters of the networks, and of numbers of a knowledge."""
    counts = knowledge.parameter_counts({**NETWORKS, "width": task.width})
    numbers = {
        "PAE (all that matching reads)": counts["PAE"],
        "PAE, FRM and MTM": sum(counts[name] for name in ("PAE", "FRM", "MTM")),
        "head of sigma": counts["sigma"],
        "prototypes": task.knowledge * task.width,
        "word vectors": task.knowledge * NETWORKS["word_width"],
    }
    return [
        timed_row(task, name, "millions", [x / 1e6], "M", NETWORKS) for name, x in numbers.items()
    ]


PARTS: dict[str, Callable[[Task], list[dict[str, Any]]]] = {
    "size": size_rows,
    "memory": memory_rows,
    "query": query_rows,
    "speed": speed_rows,
}


def peak_mb(run: Callable[[], Any]) -> float:
    """How far the resident memory of this process rises during `run`, in MB; Linux alone."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status_mb("VmRSS")
    run()
    return _status_mb("VmHWM") - before


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def _device_peak_mb(name: str, run: Callable[[], Any]) -> float:
    """The peak of the device above what lay there, by JAX's or PyTorch's own count."""
    if name == "ours":
        run()
        return float(jax.devices()[0].memory_stats()["peak_bytes_in_use"]) / 1e6
    if name == "PyTorch":
        import torch

        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return peak_mb(run)


def _spent(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and those that cores worked for the process."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main(text: str) -> None:
    """Measures a task."""
    task = sides_of.read_task(json.loads(text))
    scoring_workers.limit_threads(task.threads)
    load, device = os.getloadavg()[0], harness.device_name(jax.devices()[0].device_kind)
    rows = PARTS[task.part](task)
    print(json.dumps([row | {"device": device, "load": round(load, 2)} for row in rows]))


if __name__ == "__main__":
    main(sys.argv[1])

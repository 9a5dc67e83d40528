"""TRM-ML's training step: its speed and memory beside PyTorch, and where its time goes.

python benchmarks/step_trm_ml.py --data=FOLDER --jobs=RN50:224:8,RN50:448:8

Writes benchmarks/results/step_trm_ml.{json,md} after every job (ARCHITECTURE:IMAGE_SIZE:BATCH), a
job replaces its rows. --data is a folder of coco_subset/ (default: the environment variable
TRM_DATA); without it the rows on decoding, augmentation and cached features are left out. On a GPU
the towers run in bfloat16, the peer under torch.compile and autocast.

The peer is a plain DualCoOp step written in PyTorch (torch_dualcoop.py) with the same weights and
batch: at 77 tokens a prompt, as its authors' program pads them, and at as many as ours. Sides are
timed in turn, each in a process of its own and behind a call that does not count, in another order
in every round; ratios are medians over the rounds.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# The sides share a GPU: none may take it all.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import flags  # noqa: E402

from benchmarks import harness  # noqa: E402
from benchmarks import step_trm_ml_workers as workers  # noqa: E402
from launch import cli  # noqa: E402
from trm_jax.data import pipeline  # noqa: E402
from trm_jax.data.examples import ImageExamples  # noqa: E402
from trm_jax.data.feature_cache import CachedFeatures, write_cache  # noqa: E402
from trm_jax.data.sources import open_source  # noqa: E402
from trm_jax.data.transforms import image_transform  # noqa: E402
from trm_jax.pretrained import registry  # noqa: E402
from trm_jax.train import workdirs  # noqa: E402
from trm_jax.types import UserError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "step_trm_ml.json"
OURS, PLAIN, TRIMMED = "TRM-ML", "DualCoOp, PyTorch, 77 tokens", "DualCoOp, PyTorch"

_JOBS = flags.DEFINE_string("jobs", "RN50:224:8,RN50:448:8", "ARCHITECTURE:IMAGE_SIZE:BATCH,..")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds in which the sides take turns", lower_bound=1)
_DATA = flags.DEFINE_string("data", os.environ.get("TRM_DATA", ""), "Folder of coco_subset/")
_RESULTS = flags.DEFINE_string("results", str(RESULTS), "The results file")


def main(arguments: list[str]) -> None:
    """Measures the jobs one after the other."""
    cli.no_arguments(arguments)
    for arch, size, batch in [parse(job) for job in _JOBS.value.split(",")]:
        with tempfile.TemporaryDirectory() as folder:
            weights = workers.random_weights(arch, Path(folder) / "weights.safetensors")
            setting = workers.Setting(arch, size, batch, str(weights), workers.COCO_NAMES)
            started = time.time()
            rows, facts = measure(setting, _ROUNDS.value, _DATA.value, Path(folder))
        write(Path(_RESULTS.value), rows, facts, time.time() - started)


def parse(job: str) -> tuple[str, int, int]:
    """ARCHITECTURE:IMAGE_SIZE:BATCH; the peer has a ResNet only."""
    arch, _, rest = job.partition(":")
    size, _, batch = rest.partition(":")
    known = [n for n, c in registry.ARCHITECTURES.items() if c["image"]["kind"] == "resnet"]
    if arch not in known or not (size.isdigit() and batch.isdigit()):
        raise UserError(
            f"--jobs: {job!r} is not ARCHITECTURE:IMAGE_SIZE:BATCH with one of {', '.join(known)}"
        )
    if int(size) % 32 or not int(size) or not int(batch):
        raise UserError(f"--jobs: {job!r}: the image size must be a multiple of 32")
    return arch, int(size), int(batch)


def measure(
    setting: workers.Setting, rounds: int, data: str, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rows of one setting, and what is to know about their programs."""
    condition = {"arch": setting.arch, "image_size": setting.image_size, "batch": setting.batch}
    sides = {
        OURS: (workers.trm_ml_step, setting, "step"),
        f"{OURS}, prompts.remat": (workers.trm_ml_step, setting._replace(remat=True), "step"),
        f"{OURS}, cached features": (workers.trm_ml_cached, setting, "cached"),
        PLAIN: (workers.dualcoop_step, setting._replace(total=77), "step"),
        TRIMMED: (workers.dualcoop_step, setting, "step"),
    }
    opened = {name: workers.Worker(build, argument) for name, (build, argument, _) in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            opened[name].seconds(sides[name][2])  # caches and pages are another side's by now
            seconds[name].append(opened[name].seconds(sides[name][2]))
    facts = {name: worker.facts | worker.close() for name, worker in opened.items()}
    rows = []
    for name, values in seconds.items():
        speed = [setting.batch / value for value in values]
        row = _row(name, condition, "images_per_s", speed, "images/s")
        if name == OURS:
            for peer in (PLAIN, TRIMMED):
                rows.append({**row, **_ratio(seconds[peer], values, peer)})
        elif name not in (PLAIN, TRIMMED):
            rows.append({**row, **_ratio(seconds[OURS], values, OURS)})
        else:
            rows.append(row)
        rows.append(_row(name, condition, "peak_mb", [facts[name]["peak_mb"]], "MB"))
        if "program_mb" in facts[name]:
            rows.append(_row(name, condition, "program_mb", [facts[name]["program_mb"]], "MB"))
    parts, more = _parts(setting, condition, seconds, rounds)
    facts["parts"] = more
    rows += parts
    if data:
        rows += _input_rows(setting, condition, data, folder, parts)
    return rows, facts


def _parts(setting, condition: Mapping[str, Any], seconds, rounds: int):
    """Seconds of the parts of a step, and their rate beside that of a large matrix product."""
    worker = workers.Worker(workers.trm_ml_parts, setting)
    measured: dict[str, list[float]] = {"visual": [], "text": [], "matmul": []}
    for _ in range(rounds):
        for name, values in measured.items():
            values.append(worker.seconds(name))
    facts = worker.facts | worker.close()
    # What is left of a step that needs no image tower: regions, memory, losses, the update.
    cached = statistics.median(seconds[f"{OURS}, cached features"])
    head = [max(0.0, cached - statistics.median(measured["text"]))]
    titles = {"visual": "visual tower", "text": "text tower, forward and backward"}
    rows = [
        _row(title, condition, "seconds", measured[name], "s") for name, title in titles.items()
    ]
    rows.append(_row("head, losses, memory, update", condition, "seconds", head, "s"))
    rate = {name: facts[f"{name}_gflop"] / statistics.median(v) for name, v in measured.items()}
    for name, title in titles.items():
        share = 100 * rate[name] / rate["matmul"]
        row = _row(title, condition, "gflop_per_s", [rate[name]], "GFLOP/s")
        rows.append({**row, "ratio": round(share / 100, 3), "against": "large matrix product"})
    rows.append(_row("large matrix product", condition, "gflop_per_s", [rate["matmul"]], "GFLOP/s"))
    return rows, facts


def _input_rows(setting, condition, data: str, folder: Path, parts) -> list[dict[str, Any]]:
    """Seconds a batch takes to be decoded and augmented (one thread), and to be read from a feature
    cache by the pipeline (from memory: the files have just been written)."""
    photos = open_source("coco", "test", root=str(Path(data) / "coco_subset"), keep_empty=True)
    count, rng = len(photos), np.random.default_rng(0)
    started = time.perf_counter()
    images = [photos.read(index)["image"] for index in range(count)]
    decode = (time.perf_counter() - started) / count * setting.batch
    times = {}
    for name in ("none", "tai"):
        transform = image_transform(name, setting.image_size)
        started = time.perf_counter()
        for image in images:
            transform(image, rng)
        times[name] = (time.perf_counter() - started) / count * setting.batch
    clip = registry.architecture(setting.arch)
    shape = ((setting.image_size // 32) ** 2, clip["embed_dim"])
    dense = rng.normal(size=(setting.batch, *shape)).astype(np.float32)

    def batches():
        for start in range(0, count, setting.batch):
            index = np.arange(start, start + setting.batch)
            yield {"index": np.where(index < count, index, -1), "valid": index < count}

    features = {"dense": dense, "global_embedding": dense[:, 0]}
    write_cache(folder / "cache", batches(), lambda batch: features, size=count, made_of={})
    cached = ImageExamples(CachedFeatures(photos, folder / "cache", {}))
    read = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in pipeline.eval_batches(cached, batch_size=setting.batch):
            pass
        read.append((time.perf_counter() - started) / count * setting.batch)
    visual = next(row["mean"] for row in parts if row["name"] == "visual tower")
    rows = [
        _row("decode", condition, "seconds", [decode], "s"),
        _row("resize", condition, "seconds", [times["none"]], "s"),
        _row("augment (tai)", condition, "seconds", [times["tai"]], "s"),
    ]
    row = _row("read cached features", condition, "seconds", read, "s")
    ratio = (decode + times["none"] + visual) / statistics.median(read)
    return [*rows, {**row, "ratio": round(ratio, 1), "against": "decode, resize and visual tower"}]


def _row(name: str, condition, metric: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    return harness.make_row(name, condition, metric, dict(enumerate(values)), unit, None)


def _ratio(theirs: Sequence[float], ours: Sequence[float], against: str) -> dict[str, Any]:
    """How many times as fast, round by round."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"ratio": round(statistics.median(ratios), 3), "against": against}


def write(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any], seconds: float) -> None:
    """Replaces the job's rows in the results file, and writes the table beside it."""
    import jax

    words = [word for word in sys.argv[1:] if not word.startswith(("--data", "--results"))]
    before = workdirs.read_json(path)
    job = json.dumps(rows[0]["condition"])
    kept = [r for r in before.get("rows", []) if json.dumps(r["condition"]) != job]
    programs = {**before.get("programs", {}), job: facts}
    body = {
        "name": "step_trm_ml",
        "command": " ".join(["python benchmarks/step_trm_ml.py --data=FOLDER", *words]),
        "device": harness.device_name(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "seconds": round(seconds + (before.get("seconds", 0) if kept else 0), 1),
        "rows": kept + rows,
        "programs": programs,
    }
    harness.write_results(path, body | {"torch": _torch_version()})
    path.with_suffix(".md").write_text(table(body["rows"]))


def _torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as one Markdown table a job."""
    jobs: dict[str, list[str]] = {}
    for row in rows:
        c = row["condition"]
        title = f"## {c['arch']} at {c['image_size']} pixels, batch {c['batch']}"
        lines = jobs.setdefault(
            title, ["| | measure | value | times | against |", "|---|---|---|---|---|"]
        )
        spread = f" ± {row['std']:.3g}" if row["std"] is not None else ""
        value = f"{row['mean']:.4g}{spread} {row['unit']}"
        lines.append(
            f"| {row['name']} | {row['metric']} | {value} | {row.get('ratio', '')} "
            f"| {row.get('against', '')} |"
        )
    return "\n".join(f"{title}\n\n" + "\n".join(lines) + "\n" for title, lines in jobs.items())


if __name__ == "__main__":
    cli.run(main)

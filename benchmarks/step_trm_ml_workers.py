"""Processes that run one training step again and again, for benchmarks/step_trm_ml.py.

Each side lives in a process of its own, so that its peak memory is its own; the benchmark asks them
in turn, so that a noisy machine is noisy for both.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# COCO's categories, in the order of their ids.
COCO_NAMES = tuple(
    (  # noqa: SIM905
        "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire "
        "hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
        "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, "
        "snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis "
        "racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, "
        "orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
        "dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, "
        "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, "
        "toothbrush"
    ).split(", ")
)


class Setting(NamedTuple):
    """One comparison.

    arch: of the registry. weights: OpenCLIP safetensors. total: tokens of the peer's prompts, 0 for
    as many as ours have. remat: of our prompts.
    """

    arch: str
    image_size: int
    batch: int
    weights: str
    class_names: tuple[str, ...]
    total: int = 0
    remat: bool = False


class Worker:
    """A process that answers with seconds.

    Args:
      build: module-level function of a Setting; returns {name: function that runs once and waits}
        and a function that gives the peak of the device memory in MB or None.
      setting: its argument.
    """

    def __init__(self, build: Callable, setting: Setting):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, setting, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that a worker that dies ends the pipe
        self.facts = self._receive()

    def seconds(self, name: str, count: int = 1) -> float:
        """Mean seconds of `count` calls."""
        self._pipe.send((name, count))
        return self._receive()

    def close(self) -> dict[str, float]:
        """Ends the process; {"peak_mb"}."""
        self._pipe.send(None)
        facts = self._receive()
        self._process.join()
        return facts

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a worker died; see its message above") from None
        return answer


def _serve(build: Callable, setting: Setting, pipe) -> None:
    started = time.perf_counter()
    functions, device_peak, facts = build(setting)
    for function in functions.values():
        function()
    pipe.send({**facts, "start_seconds": time.perf_counter() - started})
    while (request := pipe.recv()) is not None:
        name, count = request
        before = time.perf_counter()
        for _ in range(count):
            functions[name]()
        pipe.send((time.perf_counter() - before) / count)
    peak = device_peak()
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    pipe.send({"peak_mb": peak})


def trm_ml_step(setting: Setting):
    """TRM-ML's training step as configs/coco.py runs it, from uint8 images."""
    return _ours(setting, ("step",))


def trm_ml_cached(setting: Setting):
    """The same from cached features."""
    return _ours(setting, ("cached",))


def trm_ml_parts(setting: Setting):
    """Parts of that step, each compiled alone: "visual", "text" (forward and backward), and the
    rate of a large matrix product, "matmul"."""
    return _ours(setting, ("visual", "text", "matmul"))


def dualcoop_step(setting: Setting):
    """The peer's step, from normalised images."""
    from benchmarks import torch_dualcoop
    from trm_jax.data.tokenizers import ClipTokenizer
    from trm_jax.models import prompts
    from trm_jax.models.clip.config import CLIP_MEAN, CLIP_STD
    from trm_jax.pretrained import registry

    clip = registry.architecture(setting.arch)
    names = [*setting.class_names, *setting.class_names]
    ids, lengths = prompts.class_token_ids(names, ClipTokenizer())
    total = setting.total or prompts.prompt_length(names, lengths, context=16, context_length=77)
    model = torch_dualcoop.DualCoOp(clip, ids, 16 + lengths, total=total)
    model.load(setting.weights)
    batch = _batch(setting)
    pixels = (batch["image"] / np.float32(255) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    step = torch_dualcoop.Step(model, pixels, batch["labels"])
    return {"step": step}, step.peak_mb, {"tokens": total, "loss": step()}


def _batch(setting: Setting) -> dict[str, np.ndarray]:
    """Random images and labels, a tenth of them known."""
    rng = np.random.default_rng(0)
    count, classes = setting.batch, len(setting.class_names)
    shape = (count, setting.image_size, setting.image_size, 3)
    truth = np.where(rng.random((count, classes)) < 0.04, 1, -1).astype(np.int8)
    return {
        "image": rng.integers(0, 256, shape, dtype=np.uint8),
        "labels": np.where(rng.random((count, classes)) < 0.1, truth, 0).astype(np.int8),
        "truth": truth,
        "index": np.arange(count, dtype=np.int32),
        "valid": np.ones(count, bool),
    }


def _ours(setting: Setting, wanted: tuple[str, ...]):
    import jax
    import jax.numpy as jnp

    from configs import coco
    from trm_jax.data.tokenizers import ClipTokenizer
    from trm_jax.methods import frozen_clip
    from trm_jax.pretrained import registry
    from trm_jax.train import architecture, datasets, experiment
    from trm_jax.types import DataInfo

    config = coco.get_config("0.1")
    config.prompts.remat = setting.remat
    clip = registry.architecture(setting.arch)
    inputs, grid = datasets.image_spec(clip, setting.image_size)
    info = DataInfo(class_names=setting.class_names, steps_per_epoch=641, total_steps=25640)
    tokenizer, dtype = ClipTokenizer(), architecture.compute_dtype("auto")
    pretrained = registry.load(setting.weights, clip)
    batch = jax.device_put(_batch(setting))
    shared = frozen_clip.make(info, tokenizer, clip, inputs, grid, frozen_clip.Prompts(), dtype)
    facts: dict[str, Any] = {"tokens": shared.prompt_length, "dtype": jnp.dtype(dtype).name}
    functions: dict[str, Callable] = {}
    if "cached" in wanted:
        width, positions = clip["embed_dim"], grid[0] * grid[1]
        rng = np.random.default_rng(1)
        dense = rng.normal(size=(setting.batch, positions, width)).astype(np.float32)
        features = {"dense": dense, "global_embedding": dense[:, 0]}
        inputs = {
            k: datasets.ArraySpec((None, *v.shape[1:]), np.float32) for k, v in features.items()
        }
        batch = jax.device_put({k: v for k, v in batch.items() if k != "image"} | features)
    if {"step", "cached"} & set(wanted):
        method = experiment.make_method(config, info, tokenizer, clip, inputs, grid)
        functions[wanted[0]], extra = _step(config, method, pretrained, batch)
        facts |= extra
    else:
        parts, extra = _parts(shared, pretrained, batch, dtype)
        functions |= parts
        facts |= extra

    def device_peak() -> float | None:
        stats = jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] / 1e6 if stats else None

    return functions, device_peak, facts


def _step(config, method, pretrained, batch):
    """The jitted, donating step of the training loop, and its program's temporary memory."""
    import jax

    from trm_jax.train import optimizers, paths, state, step

    settings, key = config.optimizer, jax.random.key(0)
    params, extras = jax.jit(lambda k, w: method.init(k, pretrained=w))(key, pretrained)
    trained, frozen = paths.split(params, tuple(settings.freeze), field="optimizer.freeze")
    schedule = optimizers.make_schedule(
        settings.schedule, learning_rate=settings.learning_rate, total_steps=25640
    )
    optimizer = optimizers.make_optimizer(
        settings.name, schedule, trained, weight_decay=settings.weight_decay,
        decay=tuple(settings.decay), clip=settings.clip, b2=settings.b2,
    )  # fmt: skip
    sums = state.zero_sums(method, params, extras, batch, key)
    current = state.create(trained, frozen, extras, optimizer, ema=False, sums=sums)
    frozen, current = current.frozen, current.replace(frozen=None)
    function = step.make_train_step(method, optimizer, key=key)
    compiled = jax.jit(function, donate_argnums=0).lower(current, frozen, batch).compile()
    holder = [current]

    def run() -> None:
        holder[0] = jax.block_until_ready(compiled(holder[0], frozen, batch))

    run()
    loss = holder[0].sums["loss"]
    return run, {
        "loss": float(loss.value()),
        "program_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "gflop": compiled.cost_analysis()["flops"] / 1e9,
    }


def _parts(shared, pretrained, batch, dtype):
    import jax
    import jax.numpy as jnp

    params = jax.jit(lambda k, w: shared.init(k, pretrained=w))(jax.random.key(0), pretrained)
    frozen = {"clip": params["clip"]}
    visual = jax.jit(lambda p, b: shared.image_features(p, b)[0])
    visual = visual.lower(params, {"image": batch["image"]}).compile()

    def total(prompts, clip):
        negative, positive = shared.text_features(clip | {"prompts": prompts})
        return jnp.sum(jnp.sin(positive)) - jnp.sum(jnp.sin(negative))

    text = jax.jit(jax.value_and_grad(total)).lower(params["prompts"], frozen).compile()
    side = 8192 if jax.default_backend() == "gpu" else 4096
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    functions = {
        "visual": lambda: jax.block_until_ready(visual(params, {"image": batch["image"]})),
        "text": lambda: jax.block_until_ready(text(params["prompts"], frozen)),
        "matmul": lambda: jax.block_until_ready(product(matrix)),
    }
    facts = {
        "visual_gflop": visual.cost_analysis()["flops"] / 1e9,
        "text_gflop": text.cost_analysis()["flops"] / 1e9,
        "matmul_gflop": 2 * side**3 / 1e9,
    }
    return functions, facts


def random_weights(arch: str, path: Path) -> Path:
    """An OpenCLIP file of `arch` with random numbers that keep activations near one."""
    import jax

    from trm_jax.models.clip import towers
    from trm_jax.pretrained import convert, registry

    rng = np.random.default_rng(0)

    def draw(key, spec):
        name = str(key[-1].key)
        if name in ("scale", "var"):
            return np.ones(spec.shape, np.float32)
        if name in ("bias", "mean"):
            return np.zeros(spec.shape, np.float32)
        fan_in = max(1, int(np.prod(spec.shape[:-1]))) if name == "kernel" else 1000
        return (rng.standard_normal(spec.shape) * fan_in**-0.5).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(
        draw, towers.abstract_variables(registry.architecture(arch))
    )
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(convert.to_openclip(variables), path)
    return path

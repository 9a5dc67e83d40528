"""From a config to a run: the only file of the package that reads config fields.

Everything below it takes plain keyword arguments, so that a mistyped field is an error here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from trm_jax.data import partial_labels, pipeline, sources, tokenizers
from trm_jax.data.examples import CaptionExamples, Examples, MultiLabelExamples
from trm_jax.data.feature_cache import CachedFeatures, cache_key, write_cache
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.subset import Subset, hold_out
from trm_jax.data.transforms import image_transform
from trm_jax.methods import MAKERS, dualcoop, frozen_clip, trm_ml
from trm_jax.models.clip.config import validate
from trm_jax.pretrained import registry
from trm_jax.train import checkpoints, optimizers, paths
from trm_jax.train.evaluation import make_evaluator
from trm_jax.train.loop import Job
from trm_jax.types import ArraySpec, BadSampleError, BatchSpec, DataInfo, Method, PyTree, UserError

_SECTIONS = {"trm_ml": trm_ml, "dualcoop": dualcoop}


class Experiment(NamedTuple):
    """A job with what launchers and notebooks want to know about it."""

    job: Job
    method: Method
    info: DataInfo
    tokenizer: tokenizers.Tokenizer
    clip: dict[str, Any]
    train: Source
    test: Source
    observed: np.ndarray | None  # label mask applied: int8 [N, C]
    eval_split: str  # "test", or "val" when a share of the training images is held out
    inputs: BatchSpec  # the image entry of a batch, before any feature cache


def build(config: ConfigDict, *, cache_dir: Path) -> Experiment:
    """Opens the data, loads the towers, builds method and job.

    Args:
      config: the resolved config tree.
      cache_dir: where cached features go if `data.cache_features`.

    Raises:
      UserError: whatever of the config or the data cannot be used, by field or file name.
    """
    train, test, eval_split = open_data(config.data)
    tokenizer = _tokenizer(config.model, train)
    clip = resolve_clip(config.model.clip, tokenizer)
    weights = registry.load(config.model.pretrained, clip)
    observed = None
    if train.class_names and config.method != "contrastive":
        observed = observed_labels(config.data, train)
    inputs, grid = input_spec(train, clip, config.data.image_size)
    info = _info(config, train, test)
    key = jax.random.key(config.seed)
    method = make_method(config, info, tokenizer, clip, inputs, grid)
    init = jax.jit(
        lambda k, w: method.init(k, pretrained=w),
        compiler_options={"xla_backend_optimization_level": 0},  # runs once: compile it fast
    )
    params, extras = init(key, weights)
    raw_inputs = inputs
    if config.data.cache_features:
        train, test = _cache(config, cache_dir, method, params, train, test)
        inputs, _ = input_spec(train, clip, config.data.image_size)
        method = make_method(config, info, tokenizer, clip, inputs, grid)
    params = _warm_start(params, config.model.initial_params, config.model.initial_from)
    job = _job(config, method, info, tokenizer, train, test, observed, (params, extras))
    return Experiment(
        job, method, info, tokenizer, clip, train, test, observed, eval_split, raw_inputs
    )


def open_data(data: ConfigDict) -> tuple[Source, Source, str]:
    """(training source, evaluation source, "test" or "val") of a config's data section."""
    options = dict(data.options)
    if data.dataset == "glyphs":
        if data.train_size < 1:
            raise UserError("data.train_size must be at least 1: glyph scenes are endless")
        options |= {"train_size": data.train_size, "image_size": data.image_size}
        options |= {"test_size": data.test_size} if data.test_size else {}
    train = sources.open_source(data.dataset, "train", root=data.root, **options)
    if data.dataset != "glyphs" and 0 < data.train_size < len(train):
        train = Subset(train, range(data.train_size))
    if data.holdout:
        if not 0.0 < data.holdout < 1.0:
            raise UserError(f"data.holdout={data.holdout} must be in (0, 1), or 0 for the test set")
        kept, held = hold_out(train, data.holdout)
        return kept, held, "val"
    test = sources.open_source(data.dataset, "test", root=data.root, **options)
    if data.dataset != "glyphs" and 0 < data.test_size < len(test):
        test = Subset(test, range(data.test_size))
    return train, test, "test"


def observed_labels(data: ConfigDict, train: Source) -> np.ndarray:
    """int8 [N, C] in {-1, 0, +1}: what the config's label protocol shows of the training labels."""
    return partial_labels.observe_source(
        train,
        protocol=data.label_protocol,
        known_fraction=data.known_fraction,
        seed=data.label_seed,
        mask_file=data.mask_file,
    )


def resolve_clip(
    clip: ConfigDict | dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> dict[str, Any]:
    """The towers' config with the vocabulary of the tokenizer where it says 0."""
    resolved = clip.to_dict() if isinstance(clip, ConfigDict) else dict(clip)
    text = dict(resolved["text"])
    text["vocab_size"] = text["vocab_size"] or tokenizer.vocab_size
    text["eos_id"] = text["eos_id"] or tokenizer.eos_id
    return validate({**resolved, "text": text})


def input_spec(
    source: Source, clip: dict[str, Any], image_size: int
) -> tuple[BatchSpec, tuple[int, int]]:
    """(the image entry of a batch, (h, w) of its dense map), from the first readable example."""
    for index in range(len(source)):
        try:
            sample = source.read(index)
            break
        except BadSampleError:
            continue
    else:
        raise UserError("not one example of the data can be read; check data.root")
    if "dense" in sample:
        names = ("dense", "global_embedding")
        spec = {n: ArraySpec((None, *np.shape(sample[n])), np.float32) for n in names}
        return spec, _square(len(sample["dense"]))
    if "features" in sample:
        return feature_spec(np.shape(sample["features"]), clip)
    return image_spec(clip, image_size)


def feature_spec(shape: tuple[int, ...], clip: dict[str, Any]) -> tuple[BatchSpec, tuple[int, int]]:
    """The batch entry for precomputed features [r, D], checked against the towers."""
    image = clip["image"]
    if image["kind"] != "features" or image["width"] != shape[-1]:
        raise UserError(
            f"the data has precomputed features of width {shape[-1]}: set model.clip.image to "
            f"kind 'features' and width {shape[-1]}"
        )
    return {"features": ArraySpec((None, *shape), np.float32)}, _square(shape[0])


def image_spec(clip: dict[str, Any], image_size: int) -> tuple[BatchSpec, tuple[int, int]]:
    """The batch entry for images of `image_size` pixels, checked against the towers' stride."""
    image = clip["image"]
    if image["kind"] == "features":
        raise UserError("model.clip.image.kind is 'features', but the data gives images")
    name, cell = "patch size", image.get("patch_size")
    if image["kind"] == "resnet":
        name, cell = "stride", 4 * 2 ** (len(image["layers"]) - 1)
    if image_size % cell or image_size < cell:
        raise UserError(
            f"data.image_size={image_size} is no multiple of {cell}, the {name} of the encoder; "
            f"try {max(1, image_size // cell) * cell}"
        )
    spec = {"image": ArraySpec((None, image_size, image_size, 3), np.uint8)}
    return spec, (image_size // cell, image_size // cell)


def make_method(config, info, tokenizer, clip, inputs, grid) -> Method:
    """The config's method on given data and towers."""
    if config.method not in MAKERS:
        raise UserError(f"method={config.method!r} is none of {', '.join(MAKERS)}")
    shared = {"clip": clip, "inputs": inputs, "dtype": _dtype(config.precision.compute)}
    options = config.model.options.to_dict()
    if config.method == "contrastive":
        return _call(
            MAKERS["contrastive"],
            "model.options",
            text_length=config.data.text_length,
            **shared,
            **options,
        )
    module = _SECTIONS[config.method]
    options["prompts"] = _call(frozen_clip.Prompts, "prompts", **config.prompts.to_dict())
    options["loss"] = _call(module.Loss, "loss", **config.loss.to_dict())
    if config.method == "trm_ml":
        options["memory"] = _call(trm_ml.Memory, "memory", **config.memory.to_dict())
    return _call(
        MAKERS[config.method],
        "model.options",
        info=info,
        tokenizer=tokenizer,
        grid=grid,
        **shared,
        **options,
    )


def _call(function: Callable, section: str, **arguments):
    try:
        return function(**arguments)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise UserError(f"{section}: {str(error).split('() ')[-1]}") from None


def _dtype(name: str):
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if name not in ("float32", "bfloat16"):
        raise UserError(f"precision.compute={name!r} is none of auto, float32, bfloat16")
    return jnp.dtype(name)


def _tokenizer(model: ConfigDict, train: Source) -> tokenizers.Tokenizer:
    saved = registry.tokenizer_config(model.pretrained)
    if saved is not None:
        return tokenizers.from_config(saved)
    kind = model.tokenizer
    if kind == "clip":
        return tokenizers.ClipTokenizer()
    if kind != "words":
        raise UserError(f"model.tokenizer={kind!r} is none of clip, words")
    vocabulary = getattr(train, "vocabulary", None)
    if vocabulary is not None:
        return tokenizers.WordTokenizer(vocabulary())
    texts = [text for index in range(len(train)) for text in train.captions(index)]
    if not texts:
        raise UserError("model.tokenizer='words' needs captions; this data has none, use 'clip'")
    return tokenizers.WordTokenizer.from_captions(texts)


def _square(count: int) -> tuple[int, int]:
    side = int(count**0.5)
    return (side, side) if side * side == count else (1, count)


def _info(config: ConfigDict, train: Source, test: Source) -> DataInfo:
    per_epoch = pipeline.steps_per_epoch(len(train), config.data.batch_size)
    steps = config.train.steps
    return DataInfo(
        class_names=train.class_names,
        num_train=len(train),
        num_eval=len(test),
        steps_per_epoch=per_epoch,
        total_steps=steps if steps else config.train.epochs * per_epoch,
        single_positive=partial_labels.is_single_positive(config.data.label_protocol),
    )


def _cache(config, cache_dir: Path, method: Method, params, train: Source, test: Source):
    """Both sources with their features read from `cache_dir`, computed first where missing."""
    if config.data.augment != "none":
        raise UserError(
            f"data.cache_features needs data.augment='none', not {config.data.augment!r}: cached "
            "features cannot be augmented"
        )
    encode = jax.jit(lambda p, batch: method.predict["dense"](p, {}, batch))
    clip_hash = checkpoints.weights_hash(jax.device_get(params["clip"]))
    names = list(method.specs["dense"])
    cached = []
    for source in (train, test):
        key = cache_key(
            source,
            weights=clip_hash,
            dataset=config.data.dataset,
            root=config.data.root,
            options=config.data.options.to_dict(),
            image_size=config.data.image_size,
            clip=config.model.clip.to_dict(),
        )
        folder = cache_dir / key
        if not folder.is_dir():
            examples = MultiLabelExamples(source, None, _transform(config.data, train=False))
            batches = pipeline.eval_batches(
                examples, batch_size=config.evaluate.batch_size, workers=config.data.workers
            )
            write_cache(
                folder, batches, lambda b: encode(params, {n: b[n] for n in names}), len(source)
            )
        cached.append(CachedFeatures(source, folder))
    return cached


def _transform(data: ConfigDict, *, train: bool):
    return image_transform(data.augment if train else "none", data.image_size)


def _warm_start(params: PyTree, patterns, path: str) -> PyTree:
    """Params matching `patterns` replaced by those of an exported model."""
    if not path:
        return params
    given = load_file(path)
    flat = paths.flatten(params)
    hits = paths.matches(params, patterns, field="model.initial_params")
    for name in (n for n, hit in hits.items() if hit):
        if name not in given or given[name].shape != flat[name].shape:
            raise UserError(f"model.initial_from={path}: '{name}' is missing or of another shape")
        flat[name] = jnp.asarray(given[name], flat[name].dtype)
    return jax.tree.unflatten(jax.tree.structure(params), list(flat.values()))


def _examples(data: ConfigDict, method: Method, tokenizer, train, observed) -> Examples:
    transform = _transform(data, train=True)
    if "tokens" in method.specs["train"]:
        return CaptionExamples(train, tokenizer, data.text_length, transform)
    return MultiLabelExamples(train, observed, transform)


def _schedule(settings: ConfigDict, info: DataInfo) -> optax.Schedule:
    return optimizers.make_schedule(
        settings.schedule,
        learning_rate=settings.learning_rate,
        total_steps=info.total_steps,
        warmup_rate=settings.warmup_rate,
        warmup_steps=round(settings.warmup_epochs * info.steps_per_epoch),
    )


def _job(config, method, info, tokenizer, train, test, observed, initial) -> Job:
    data, run = config.data, config.train
    if run.nan_policy not in ("skip", "stop"):
        raise UserError(f"train.nan_policy={run.nan_policy!r} is none of skip, stop")
    examples = _examples(data, method, tokenizer, train, observed)
    host = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def batches(start: int) -> Iterator:
        return pipeline.train_batches(
            examples,
            batch_size=data.batch_size,
            seed=config.seed,
            start_step=start,
            num_steps=info.total_steps - start,
            workers=data.workers,
            **host,
        )

    settings, schedule = config.optimizer, _schedule(config.optimizer, info)
    return Job(
        method=method,
        init=lambda: initial,
        make_optimizer=lambda params: optimizers.make_optimizer(
            settings.name,
            schedule,
            params,
            weight_decay=settings.weight_decay,
            decay=tuple(settings.decay),
            clip=settings.clip,
            b2=settings.b2,
        ),
        schedule=schedule,
        batches=batches,
        refresh_batches=lambda: pipeline.eval_batches(
            examples, batch_size=data.batch_size, workers=data.workers, **host
        ),
        evaluate=make_evaluator(
            config.evaluate.kinds,
            method,
            test,
            tokenizer,
            _transform(data, train=False),
            batch_size=config.evaluate.batch_size,
            text_length=data.text_length,
            workers=data.workers,
            pool=config.evaluate.pool,
            templates=config.evaluate.templates,
        ),
        eval_split="val" if data.holdout else "test",
        num_train=len(train),
        name_of=lambda index: str(train.ids[index]),
        freeze=tuple(settings.freeze),
        shard=tuple(config.mesh.shard),
        seed=config.seed,
        total_steps=info.total_steps,
        steps_per_epoch=info.steps_per_epoch,
        batch_size=data.batch_size,
        microbatch=run.microbatch,
        log_every=run.log_every,
        eval_every=run.eval_every or info.total_steps,
        checkpoint_every=run.checkpoint_every or info.total_steps,
        keep=run.keep,
        nan_policy=run.nan_policy,
        ema=settings.ema,
        max_bad_fraction=data.max_bad_fraction,
    )

"""From a config to a run: data, towers, method, job.

This file, datasets.py and runner.py alone read config fields. Everything below them takes plain
keyword arguments, so that a mistyped field is an error here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from trm_jax.data import partial_labels, phases, pipeline, tokenizers
from trm_jax.data.examples import CaptionExamples, Examples, MultiLabelExamples
from trm_jax.data.sources.base import Source
from trm_jax.evaluate.pair_scores import Scores
from trm_jax.evaluate.segmentation_windows import Protocol
from trm_jax.methods import MAKERS, dualcoop, frozen_clip, mask, napreg, simcon, trm_ml
from trm_jax.pretrained import registry
from trm_jax.train import architecture, datasets, knowledge, matching, optimizers
from trm_jax.train.evaluation import make_evaluator, make_pair_scorer
from trm_jax.train.loop import Job
from trm_jax.types import BatchSpec, DataInfo, Method, PyTree, UserError

_SECTIONS = {"trm_ml": trm_ml, "dualcoop": dualcoop, "simcon": simcon, "napreg": napreg}
_ON_CAPTIONS = ("contrastive", "simcon", "napreg")


class Experiment(NamedTuple):
    """A job with what launchers and notebooks want to know about it."""

    job: Job
    method: Method
    info: DataInfo
    tokenizer: tokenizers.Tokenizer
    clip: dict[str, Any]  # of the towers, or of the matching model
    train: Source  # of MASK: a RegionSource
    test: Source
    observed: np.ndarray | None  # label mask applied: int8 [N, C]
    eval_split: str  # "test", or "val" when a share of the training images is held out
    inputs: BatchSpec  # the image entry of a batch, before any feature cache
    pretrained: registry.Located  # the weights that were loaded
    initial: registry.Located  # those that some parameters start from
    nouns: matching.Nouns | None  # that have proxies
    counts: dict[str, int]  # of the data, beside examples and labels, for run.json
    words: knowledge.Words | None = None  # of MASK


def build(config: ConfigDict, *, cache_dir: Path) -> Experiment:
    """Opens the data, loads the towers, builds method and job.

    Args:
      config: the resolved config tree.
      cache_dir: where cached features go if `data.cache_features`.

    Raises:
      UserError: whatever of the config or the data cannot be used, by field or file name.
    """
    if config.method == "mask":
        return _build_knowledge(config, cache_dir)
    if config.data.batch_size_schedule:
        raise UserError("data.batch_size_schedule is for method='mask'; set data.batch_size")
    train, test, eval_split = datasets.open_data(config.data)
    if config.method not in _ON_CAPTIONS and tuple(test.class_names) != tuple(train.class_names):
        raise UserError("data.test_dataset has other classes than data.dataset, which were trained")
    located = registry.locate(config.model.pretrained)
    tokenizer = _tokenizer(config.model, located, train)
    clip = architecture.resolve(config.model, tokenizer)
    weights = None
    if not config.model.matching:
        architecture.check_attention(clip, architecture.compute_dtype(config.precision.compute))
        weights = registry.load(located, clip, say=None if jax.process_index() else print)
    observed = None
    if train.class_names and config.method not in _ON_CAPTIONS:
        observed = datasets.observed_labels(config.data, train)
    inputs, grid = datasets.input_spec(train, clip, config.data.image_size)
    nouns = matching.open_nouns(config, train, tokenizer, cache_dir)
    info = _info(config, train, test, nouns)
    key = jax.random.key(config.seed)
    method = make_method(config, info, tokenizer, clip, inputs, grid)
    init = jax.jit(
        lambda k, w: method.init(k, pretrained=w),
        compiler_options={"xla_backend_optimization_level": 0},  # runs once: compile it fast
    )
    params, extras = init(key, weights)
    raw_inputs = inputs
    if config.data.cache_features:
        dtype = architecture.compute_dtype(config.precision.compute)
        train, test = datasets.cached((train, test), config, clip, method, params, dtype, cache_dir)
        inputs, _ = datasets.input_spec(train, clip, config.data.image_size)
        method = make_method(config, info, tokenizer, clip, inputs, grid)
    initial = architecture.locate_initial(config.model.initial_from)
    params = architecture.warm_start(params, config.model.initial_params, initial, tokenizer)
    if config.model.matching:
        params = matching.start_from(params, config.model, tokenizer)
    examples = _examples(config, method, tokenizer, train, observed, nouns)
    evaluate = _evaluator(config, method, tokenizer, test)
    job = _job(config, method, train, examples, (params, extras), evaluate)
    return Experiment(
        job,
        method,
        info,
        tokenizer,
        clip,
        train,
        test,
        observed,
        eval_split,
        raw_inputs,
        located,
        initial,
        nouns,
        nouns.report() if nouns else {},
    )


def _build_knowledge(config: ConfigDict, cache_dir: Path) -> Experiment:
    """MASK: there are no pairs; regions with words are trained on, other images have captions."""
    data = knowledge.open_data(config, cache_dir)
    source: Any = data.regions
    test = data.captioned
    words = knowledge.open_words(data.vectors, config.words.width, source.words, cache_dir)
    clip = knowledge.resolve(config.model, source.width, words.vectors.shape[1])
    examples = knowledge.rows(config.rows, source)
    method = _call(
        mask.make,
        "model.options",
        model=clip,
        words=words.vectors,
        regions=(examples.num_regions, config.rows.most),
        samples=examples.num_samples,
        attention_set=config.rows.attention_set,
        loss=_call(mask.Loss, "loss", **config.loss.to_dict()),
        memory=_call(mask.Memory, "memory", **config.memory.to_dict()),
        dtype=architecture.compute_dtype(config.precision.compute),
        **config.model.options.to_dict(),
    )
    info = _steps(config, len(examples), num_train=len(source), num_eval=len(test))
    key = jax.random.key(config.seed)
    initial = jax.jit(lambda k: method.init(k, pretrained=None))(key)
    tokenizer = tokenizers.WordTokenizer(source.words)
    evaluate = knowledge.make_evaluator(config, method, words, test)
    job = _job(config, method, source, examples, initial, evaluate)
    return Experiment(
        job,
        method,
        info,
        tokenizer,
        clip,
        source,
        test,
        None,
        "test",
        method.specs["embed_image"],
        registry.locate("random"),
        registry.locate("random"),
        None,
        knowledge.report(source, words, examples),
        words,
    )


def pair_scorer(config: ConfigDict, built: Experiment) -> Callable[[PyTree, PyTree], Scores]:
    """(params, extras) -> the scores of all pairs of the evaluation split."""
    return make_pair_scorer(
        built.method,
        built.test,
        built.tokenizer,
        datasets.transform(config.data, train=False),
        batch_size=config.evaluate.batch_size,
        text_length=config.data.text_length,
        workers=config.data.workers,
        buckets=config.data.length_buckets,
    )


def make_method(config, info, tokenizer, clip, inputs, grid) -> Method:
    """The config's method on given data and towers."""
    if config.method not in MAKERS:
        raise UserError(f"method={config.method!r} is none of {', '.join(MAKERS)}")
    dtype = architecture.compute_dtype(config.precision.compute)
    shared = {"clip": clip, "inputs": inputs, "dtype": dtype}
    options = config.model.options.to_dict()
    module = _SECTIONS.get(config.method)
    if module is not None:
        options["loss"] = _call(module.Loss, "loss", **config.loss.to_dict())
    if config.method == "napreg":
        buckets = config.data.length_buckets
        shared = {"model": clip, "inputs": inputs, "dtype": dtype, "info": info}
        return _call(napreg.make, "model.options", buckets=buckets, **shared, **options)
    if config.method in _ON_CAPTIONS:
        shared["text_length"] = config.data.text_length
        if config.method == "simcon":  # it splits the batch in its towers alone
            shared |= {"info": info, "microbatch": config.train.microbatch}
        return _call(MAKERS[config.method], "model.options", **shared, **options)
    options["prompts"] = _call(frozen_clip.Prompts, "prompts", **config.prompts.to_dict())
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


def _tokenizer(model: ConfigDict, located: registry.Located, train: Source) -> tokenizers.Tokenizer:
    if model.matching:
        return matching.tokenizer(model, train)
    saved = registry.tokenizer_config(located)
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


def _info(
    config: ConfigDict, train: Source, test: Source, nouns: matching.Nouns | None
) -> DataInfo:
    number = len(train)
    if config.method == "napreg":  # every caption is an example
        number = sum(len(train.captions(index)) for index in range(number))
    return _steps(
        config,
        number,
        class_names=train.class_names,
        num_train=len(train),
        num_eval=len(test),
        single_positive=partial_labels.is_single_positive(config.data.label_protocol),
        num_proxies=len(nouns.vocabulary) if nouns else 0,
    )


def _steps(config: ConfigDict, examples: int, **known: Any) -> DataInfo:
    """DataInfo with the steps of so many training examples."""
    run = _phases(config, examples)
    return DataInfo(
        steps_per_epoch=run.phases[0].steps_per_epoch, total_steps=run.total_steps, **known
    )


def _phases(config: ConfigDict, examples: int) -> phases.Phases:
    return phases.plan(
        examples,
        batch_size=config.data.batch_size,
        epochs=config.train.epochs,
        steps=config.train.steps,
        schedule=config.data.batch_size_schedule,
    )


def _examples(config: ConfigDict, method: Method, tokenizer, train, observed, nouns) -> Examples:
    data, transform = config.data, datasets.transform(config.data, train=True)
    spec = method.specs["train"]
    if config.method == "napreg":
        return matching.examples(config, train, tokenizer, nouns, transform)
    if "tokens" in spec:
        views = 2 if "image_2" in spec else 1
        nouns = spec["noun_tokens"].shape[1] if "noun_tokens" in spec else 0
        assert isinstance(nouns, int)
        return CaptionExamples(
            train, tokenizer, data.text_length, transform, views=views, nouns=nouns
        )
    return MultiLabelExamples(train, observed, transform)


def _schedule(settings: ConfigDict, run: phases.Phases) -> optax.Schedule:
    return optimizers.make_schedule(
        settings.schedule,
        learning_rate=settings.learning_rate,
        total_steps=run.total_steps,
        warmup_rate=settings.warmup_rate,
        warmup_steps=run.step_of(settings.warmup_epochs),
        end_rate=settings.end_rate,
        drop_steps=[run.step_of(epoch) for epoch in settings.drop_epochs],
    )


def _evaluator(config: ConfigDict, method: Method, tokenizer, test: Source):
    data = config.data
    return make_evaluator(
        config.evaluate.kinds,
        method,
        test,
        tokenizer,
        datasets.transform(data, train=False),
        batch_size=config.evaluate.batch_size,
        text_length=data.text_length,
        workers=data.workers,
        pool=config.evaluate.pool,
        templates=config.evaluate.templates,
        buckets=data.length_buckets,
        folds=config.evaluate.folds,
        protocol=_call(Protocol, "evaluate.segmentation", **config.evaluate.segmentation.to_dict()),
    )


def _job(config, method, train, examples, initial, evaluate) -> Job:
    data, run = config.data, config.train
    if run.nan_policy not in ("skip", "stop"):
        raise UserError(f"train.nan_policy={run.nan_policy!r} is none of skip, stop")
    steps = _phases(config, len(examples))
    host = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def batches(start: int) -> Iterator:
        return phases.train_batches(
            examples, steps, seed=config.seed, start_step=start, workers=data.workers, **host
        )

    settings, schedule = config.optimizer, _schedule(config.optimizer, steps)
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
            factors=settings.factors,
        ),
        schedule=schedule,
        batches=batches,
        refresh_batches=lambda: pipeline.eval_batches(
            examples, batch_size=data.batch_size, workers=data.workers, **host
        ),
        evaluate=evaluate,
        eval_split="val" if data.holdout else "test",
        num_train=len(train),
        name_of=lambda index: str(train.ids[index]),
        freeze=tuple(settings.freeze),
        shard=tuple(config.mesh.shard),
        seed=config.seed,
        total_steps=steps.total_steps,
        ends_epoch=steps.ends_epoch,
        batch_sizes=steps.batch_sizes,
        microbatch=0 if config.method == "simcon" else run.microbatch,
        log_every=run.log_every,
        eval_every=run.eval_every or steps.total_steps,
        checkpoint_every=run.checkpoint_every or steps.total_steps,
        keep=run.keep,
        nan_policy=run.nan_policy,
        ema=settings.ema,
        clip=settings.clip,
        max_bad_fraction=data.max_bad_fraction,
    )

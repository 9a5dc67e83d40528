"""Evaluators of a run: named kinds joined with the method's predict functions on the mesh."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from trm_jax.data import caption_pairs, pipeline
from trm_jax.data.examples import CaptionTexts, Examples, ImageExamples, MultiLabelExamples
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.subset import has_masks
from trm_jax.data.tokenizers import Tokenizer
from trm_jax.evaluate import (
    classification,
    multilabel,
    pair_scores,
    retrieval,
    segmentation,
    zero_shot,
)
from trm_jax.evaluate.segmentation_windows import Protocol
from trm_jax.train import sharding
from trm_jax.types import Batch, Method, PyTree, UserError

_NEEDS = {
    "multilabel": ("prepare", "scores"),
    "segmentation": ("segments", "embed_text"),
    "pair_scores": ("embed_image", "embed_text", "pair_scores"),
}

Evaluator = Callable[[PyTree, PyTree], dict[str, float]]


def make_evaluator(
    kinds: Sequence[str],
    method: Method,
    source: Source,
    tokenizer: Tokenizer,
    transform,
    *,
    batch_size: int,
    text_length: int,
    workers: int,
    pool: str,
    templates: Sequence[str],
    protocol: Protocol = Protocol(),
    buckets: Sequence[int] = (),
    folds: int = 1,
) -> Evaluator:
    """Joins the evaluators `kinds` into one function.

    Args:
      kinds: any of "multilabel", "retrieval", "pair_scores" (retrieval by a model that scores
        pairs), "zero_shot" (mAP), "classification" and "segmentation"; the metrics of all are
        merged into one dict.
      method: its predict functions are compiled once.
      source: the evaluation split.
      tokenizer, text_length: of captions and templates.
      transform: of images, without randomness.
      batch_size: rounded up to a multiple of the devices.
      workers: decoding processes.
      pool: zero-shot pooling, "global", "max" or "softmax" over positions.
      templates: zero-shot templates with {}.
      protocol: of segmentation.
      buckets: the lengths of texts, of "pair_scores".
      folds: of retrieval, see retrieval.folded_recalls.

    Returns:
      (params, extras) -> metrics.

    Raises:
      UserError: an unknown kind, or one the method or the data cannot serve.
    """
    makers = {
        "multilabel": _multilabel,
        "retrieval": _retrieval,
        "pair_scores": _pair_scores,
        "zero_shot": _zero_shot,
        "classification": _classification,
        "segmentation": _segmentation,
    }
    for kind in kinds:
        if kind not in makers:
            raise UserError(f"evaluate.kinds: {kind!r} is none of {', '.join(makers)}")
        for name in _NEEDS.get(kind, ("embed_image", "embed_text")):
            if name not in method.predict:
                raise UserError(f"evaluate.kinds: {kind!r} is not for this method: no {name!r}")
    context = _context(
        method,
        source,
        tokenizer,
        transform,
        batch_size,
        text_length,
        workers,
        pool,
        tuple(templates),
        protocol,
        tuple(buckets),
        folds,
    )
    evaluators = [makers[kind](context) for kind in kinds]

    def evaluate(params: PyTree, extras: PyTree) -> dict[str, float]:
        merged: dict[str, float] = {}
        for evaluator in evaluators:
            merged |= evaluator(params, extras)
        return merged

    return evaluate


def make_pair_scorer(
    method: Method,
    source: Source,
    tokenizer: Tokenizer,
    transform,
    *,
    batch_size: int,
    text_length: int,
    workers: int,
    buckets: Sequence[int],
) -> Callable[[PyTree, PyTree], pair_scores.Scores]:
    """(params, extras) -> the scores of all images and captions of `source`: those of a method that
    scores pairs, or the cosines of two towers.

    Arguments as those of `make_evaluator`. Raises UserError for a method that embeds no texts.
    """
    if "embed_text" not in method.predict:
        raise UserError("this method matches no images and captions: it has no 'embed_text'")
    given = method, source, tokenizer, transform, batch_size, text_length
    context = _context(*given, workers=workers, buckets=tuple(buckets))
    return _pair_scorer(context) if "pair_scores" in method.predict else _tower_scorer(context)


class _Context(NamedTuple):
    """What the makers below share."""

    method: Method
    predict: dict[str, Callable]
    source: Source
    tokenizer: Tokenizer
    transform: Callable
    batches: Callable[[Any], Iterator[Batch]]
    length: int
    pool: str
    templates: tuple[str, ...]
    protocol: Protocol
    buckets: tuple[int, ...]
    folds: int

    def bind(self, name: str, params: PyTree, extras: PyTree, shared: Batch | None = None):
        """predict[name] as a function of the batch alone, given only the entries it declares."""
        if name not in self.predict:
            raise UserError(f"evaluate.kinds: this method cannot predict {name!r}")
        wanted = self.method.specs[name]

        def function(batch: Batch):
            inputs = {key: batch[key] for key in wanted}
            return self.predict[name](params, extras, {**inputs, **(shared or {})})

        return function

    def classes(self, params: PyTree, extras: PyTree, *, normalize_first: bool = True):
        """[C, d] embeddings of the class names in the templates."""
        embed_text = self.bind("embed_text", params, extras)
        name = "embedding" if normalize_first else "projection"
        return zero_shot.class_embeddings(
            lambda tokens: embed_text({"tokens": tokens})[name],
            self.tokenizer,
            self.source.class_names,
            self.templates,
            length=self.length,
            normalize_first=normalize_first,
        )


def _context(
    method: Method,
    source: Source,
    tokenizer: Tokenizer,
    transform,
    batch_size: int,
    text_length: int = 0,
    workers: int = 0,
    pool: str = "global",
    templates: tuple[str, ...] = (),
    protocol: Protocol = Protocol(),
    buckets: tuple[int, ...] = (),
    folds: int = 1,
) -> _Context:
    """Compiles nothing yet; the batches are rounded up to a multiple of the devices."""
    predict = {name: jax.jit(function) for name, function in method.predict.items()}

    def batches(examples) -> Iterator[Batch]:
        return device_batches(examples, batch_size, workers)

    return _Context(
        method,
        predict,
        source,
        tokenizer,
        transform,
        batches,
        text_length,
        pool,
        templates,
        protocol,
        buckets,
        folds,
    )


def device_batches(examples: Examples, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Every example once, in order, on the devices of the context mesh.

    batch_size: rounded up to a multiple of the devices. workers: decoding processes.
    """
    size = -(-batch_size // jax.device_count()) * jax.device_count()
    mesh = jax.sharding.get_mesh()
    for batch in pipeline.eval_batches(
        examples,
        batch_size=size,
        workers=workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        yield sharding.put_batch(batch, mesh) if mesh.size else batch


def _multilabel(context: _Context) -> Evaluator:
    examples = MultiLabelExamples(context.source, None, context.transform)

    def evaluate(params, extras):
        shared = context.predict["prepare"](params, extras, {})
        scores = context.bind("scores", params, extras, shared)
        return multilabel.evaluate(scores, context.batches(examples), to_host=to_host)

    return evaluate


def _towers(context: _Context) -> Callable[[PyTree, PyTree], tuple]:
    """(params, extras) -> what retrieval embeds and scores."""
    source = context.source
    texts = CaptionTexts(source, context.tokenizer, context.length)
    images = ImageExamples(source, context.transform, np.unique(texts.image_index))

    def sides(params, extras):
        return (
            context.bind("embed_image", params, extras),
            context.bind("embed_text", params, extras),
            context.batches(images),
            context.batches(texts),
        )

    return sides


def _retrieval(context: _Context) -> Evaluator:
    sides = _towers(context)

    def evaluate(params, extras):
        found = sides(params, extras)
        return retrieval.evaluate(*found, folds=context.folds, to_host=to_host)

    return evaluate


def _tower_scorer(context: _Context) -> Callable[[PyTree, PyTree], pair_scores.Scores]:
    sides = _towers(context)

    def score(params, extras):
        found = sides(params, extras)
        return pair_scores.Scores(*retrieval.score_all(*found, to_host=to_host))

    return score


def _pair_scorer(context: _Context) -> Callable[[PyTree, PyTree], pair_scores.Scores]:
    source = context.source
    texts = caption_pairs.CaptionTexts(source, context.tokenizer, context.buckets)
    images = ImageExamples(source, context.transform, np.unique(texts.image_index))

    def score(params, extras):
        return pair_scores.score_all(
            context.bind("embed_image", params, extras),
            context.bind("embed_text", params, extras),
            context.bind("pair_scores", params, extras),
            context.batches(images),
            context.batches(texts),
            to_host=to_host,
        )

    return score


def _pair_scores(context: _Context) -> Evaluator:
    score = _pair_scorer(context)

    def evaluate(params, extras):
        return pair_scores.metrics(score(params, extras), folds=context.folds)

    return evaluate


def _zero_shot(context: _Context) -> Evaluator:
    examples = MultiLabelExamples(context.source, None, context.transform)

    def evaluate(params, extras):
        return zero_shot.evaluate(
            context.bind("embed_image", params, extras),
            context.classes(params, extras),
            context.batches(examples),
            pool=context.pool,
            to_host=to_host,
        )

    return evaluate


def _classification(context: _Context) -> Evaluator:
    examples = MultiLabelExamples(context.source, None, context.transform)

    def evaluate(params, extras):
        return classification.evaluate(
            context.bind("embed_image", params, extras),
            context.classes(params, extras),
            context.batches(examples),
            to_host=to_host,
        )

    return evaluate


def _segmentation(context: _Context) -> Evaluator:
    source, devices = context.source, jax.local_device_count()
    if not has_masks(source):
        raise UserError(
            "evaluate.kinds: 'segmentation' needs masks; set data.test_dataset to one that has "
            "them (voc_segmentation, pascal_context, coco_object, masks, glyphs)"
        )
    size = -(-context.protocol.batch_size // devices) * devices
    protocol = context.protocol._replace(batch_size=size)

    def evaluate(params, extras):
        segments = context.bind("segments", params, extras)
        mesh = jax.sharding.get_mesh()
        return segmentation.evaluate(
            lambda rows: segments(sharding.put_batch(rows, mesh) if mesh.size else rows),
            context.classes(params, extras, normalize_first=False),
            source,
            protocol=protocol,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            sum_over_processes=_sum_over_processes,
            to_host=to_host,
        )

    return evaluate


def _sum_over_processes(counts: np.ndarray) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(counts)
    return np.asarray(multihost_utils.process_allgather(counts)).sum(axis=0)


def to_host(tree: PyTree) -> PyTree:
    """Arrays of the devices as numpy, those that are cut over processes whole."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )

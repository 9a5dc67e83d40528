"""What a worker measures of MASK: trained networks or raw features, and every way to match them.

All ways share one training run and one pass over the images: what a variant changes is read of the
config's `words` and `matching` sections, after the training.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks import claims_simcon_measure, harness
from trm_jax.data.caption_words import CaptionWords
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.subset import Subset
from trm_jax.evaluate import pair_scores, reranking
from trm_jax.memory import knowledge_file
from trm_jax.train import (
    experiment,
    finetune,
    knowledge,
    knowledge_sets,
    loop,
    metrics,
    sharding,
)
from trm_jax.types import UserError

POINTS = 6  # evaluations of a run
WAYS = ("t2i", "i2t")
RECALLS = tuple(f"{way}_R@{k}" for way in WAYS for k in (1, 5, 10))
QUALITY = (*RECALLS, "Rsum")
# Captions without a usable word, in per cent; words of the knowledge, others with a vector, and
# words without one, of a caption; m, and the rank of the map by Procrustes.
COVERAGE = ("uncovered", "known_words", "other_words", "dropped_words")
MADE = ("neighbours", "procrustes_rank")
WATCHED = ("loss_kl", "loss_reconstruction", "loss_words", "loss_structure", "loss_prototypes")


def training(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Trains by the config, evaluates `POINTS` times on `matching.evaluated`, and matches.

    Returns:
      QUALITY and COVERAGE after the last step, "Rsum_best" of the best evaluation; WATCHED over the
      last interval; "steps", and "curve": {"step": [..], metric: [.. after them]}; "variants": the
      values of each of `matching.variants`.
    """
    config = config.copy_and_resolve_references()
    built = experiment.build(config, cache_dir=Path(config.data.cache_dir))
    test = open_part(config, built, "evaluated")
    assert built.words is not None
    every = -(-built.job.total_steps // POINTS)
    job = built.job._replace(
        evaluate=knowledge.make_evaluator(config, built.method, built.words, test),
        eval_split="test" if test is built.test else "val",
        log_every=every,
        eval_every=every,
        checkpoint_every=every,
    )
    params, extras = _train(job, folder, config.mesh)
    found = knowledge_sets.build(built, params, extras, raw=False, seed=config.seed, provenance={})
    of = knowledge_sets.encoder(built, params, extras)
    values = match(config, built, found, of, test, folder)
    lines = metrics.read_lines(folder / "metrics.jsonl")
    curve = claims_simcon_measure.read_curve(lines)
    last = [line for line in lines if line["split"] == "train"][-1]
    values |= {name: last[name] for name in WATCHED if last.get(name) is not None}
    return values | {"Rsum_best": max(curve["Rsum"]), "steps": job.total_steps, "curve": curve}


def raw(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """MACK: means of raw features, matched with raw features; and chance as a variant."""
    config = config.copy_and_resolve_references()
    built = experiment.build(config, cache_dir=Path(config.data.cache_dir))
    test = open_part(config, built, "evaluated")
    found = knowledge_sets.build(
        built, *built.job.init(), raw=True, seed=config.seed, provenance={}
    )
    values = match(config, built, found, knowledge_sets.raw_encoder(), test, folder)
    counts = [len(test.captions(index)) for index in range(len(test))]
    values["variants"]["chance"] = chance(counts)
    return values


def match(
    config: ConfigDict,
    built: experiment.Experiment,
    found: knowledge_file.Knowledge,
    of: knowledge_sets.Encoder,
    test: Source,
    folder: Path,
) -> dict[str, Any]:
    """The values of the config's own way to match, and "variants": those of the others.

    Args:
      config: of the run.
      built: its experiment.
      found: its knowledge.
      of: its encoder, or none.
      test: images with captions.
      folder: gets the scores of the config's own way, if `matching.scores` names a file.
    """
    assert built.words is not None
    vectors = built.words.source
    images = list(_encoded(config, of, test))
    positions = np.concatenate([image.positions for image in images])
    domain = functools.cache(lambda: _domain(config, built, found, of))

    @functools.cache
    def fitted(steps: int) -> knowledge_file.Knowledge:
        settings = config.matching.fine_tuning.to_dict()
        tuned = finetune.fit(*domain(), steps=steps, seed=config.seed, **settings)
        return knowledge_file.transform(found, tuned.matrix)

    def one(varied: ConfigDict) -> tuple[dict[str, Any], pair_scores.Scores]:
        matching = varied.matching
        if matching.neighbours_share:
            of_all = matching.neighbours_share * len(found.words)
            varied.words.neighbours = max(1, round(of_all))
        chosen = fitted(matching.steps) if matching.steps else found
        random = matching.prototypes == "random"
        vectors_of = chosen.random_regions if random else chosen.prototypes
        words = knowledge.Words(chosen.words, chosen.word_vectors, vectors)
        matcher = knowledge.CaptionMatcher(test, words, varied.words)
        batches: Any = ((image.regions, image.mask) for image in images)
        if matching.transform_regions:
            batches = finetune.transformed(batches, chosen.region_map)
        prototypes = matcher.prototypes(vectors_of)
        scores, made = matcher.scores(batches, positions, prototypes), prototypes.report
        values = pair_scores.metrics(scores, folds=varied.evaluate.folds)
        values |= coverage(matcher.captions)
        return values | {name: made[name] for name in MADE if name in made}, scores

    own, scores = one(config.copy_and_resolve_references())
    if config.matching.scores:
        file = folder / config.matching.scores
        np.savez(file, scores=scores.scores, image_of_text=scores.image_of_text)
    variants = {}
    for key, switches in config.matching.variants:
        varied = config.copy_and_resolve_references()
        harness.apply_overrides(varied, dict(switches))
        variants[key], _ = one(varied)
    return {**own, "variants": variants}


def open_part(config: ConfigDict, built: experiment.Experiment, name: str) -> Source:
    """The part `name` of `matching`: the run's own images with captions, or others like them."""
    part = config.matching[name]
    if part.split == "test" and not part.switches:
        return built.test
    varied = config.copy_and_resolve_references()
    harness.apply_overrides(varied, dict(part.switches))
    data = varied.data
    if not data.test_dataset:
        return knowledge.open_data(varied, Path(data.cache_dir) / name).captioned
    source = knowledge_sets.open_captioned(data, dataset="", root="", split=part.split)
    return Subset(source, range(data.test_size)) if 0 < data.test_size < len(source) else source


def coverage(captions: CaptionWords) -> dict[str, float]:
    """COVERAGE of captions."""
    count, known = len(captions.indptr) - 1, int(captions.known[captions.indices].sum())
    return {
        "uncovered": 100.0 * captions.unusable / count,
        "known_words": known / count,
        "other_words": (len(captions.indices) - known) / count,
        "dropped_words": sum(captions.dropped.values()) / count,
    }


def chance(counts: Sequence[int]) -> dict[str, float]:
    """QUALITY, in per cent, of rankings at random of images with so many captions each."""
    texts, images = sum(counts), len(counts)
    values: dict[str, float] = {}
    for k in (1, 5, 10):
        drawn = min(k, texts)
        missed = [math.comb(texts - own, drawn) / math.comb(texts, drawn) for own in counts]
        values[f"t2i_R@{k}"] = 100.0 * min(k, images) / images
        values[f"i2t_R@{k}"] = 100.0 * (1.0 - sum(missed) / images)
    return values | {"Rsum": sum(values.values())}


def reranked(
    base: np.ndarray, scores: Path, alphas: Sequence[float], *, top: int, name: str
) -> dict[str, dict[str, float]]:
    """alpha -> QUALITY of `base` re-ranked by the scores that a run left.

    Raises:
      UserError: `base`, told as `name`, does not fit them.
    """
    with np.load(scores) as file:
        other, owner = file["scores"], file["image_of_text"]
    found = {}
    for alpha in alphas:
        ranking = reranking.rerank(base, other, alpha=alpha, top=top, names=(name, "MASK's"))
        found[f"{alpha:g}"] = reranking.recalls(base, owner, ranking)
    return found


def _train(job: loop.Job, folder: Path, mesh: ConfigDict) -> tuple[Any, Any]:
    """(params, extras) after the last step; goes on from a checkpoint of the folder."""
    run = loop.Run(job, folder, sharding.make_mesh(mesh.data, mesh.fsdp))
    state = run.prepare()
    writer = metrics.MetricsWriter(folder, step=int(state.step), total_steps=job.total_steps)
    try:
        state = run.train(state, writer)
    finally:
        writer.close()
    return run.weights(state), state.extras


def _encoded(config: ConfigDict, of: knowledge_sets.Encoder, source: Source):
    most, size = config.rows.most, config.evaluate.batch_size
    return knowledge.encoded(of.embed, source, most=most, batch_size=size)


def _domain(
    config: ConfigDict,
    built: experiment.Experiment,
    found: knowledge_file.Knowledge,
    of: knowledge_sets.Encoder,
) -> tuple[finetune.RegionLists, np.ndarray, CaptionWords]:
    """Images of the domain, and captions of its other images: none of them is of a pair."""
    domain = open_part(config, built, "domain")
    if len(domain) < 2:
        raise UserError("fine-tuning needs two images of the domain at least")
    shown, told = (Subset(domain, range(start, len(domain), 2)) for start in (0, 1))
    images = finetune.list_regions((x.regions, x.mask) for x in _encoded(config, of, shown))
    assert built.words is not None
    words = knowledge.Words(found.words, found.word_vectors, built.words.source)
    matcher = knowledge.CaptionMatcher(told, words, config.words)
    return images, matcher.prototypes(found.prototypes).vectors, matcher.captions

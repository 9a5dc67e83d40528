"""What a worker measures of MASK: trained networks or raw features, and every way to match them.

All ways share one training run and one pass over the images: what a variant changes is read of the
config's `words` and `matching` sections, after the training.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import claims_simcon_measure, harness
from trm_jax.data import pipeline, sources
from trm_jax.data.caption_words import CaptionWords
from trm_jax.data.region_rows import ImageRegions
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.subset import Subset
from trm_jax.evaluate import pair_scores, reranking
from trm_jax.losses.knowledge import at_samples
from trm_jax.memory import knowledge as memory
from trm_jax.train import experiment, finetune, knowledge, loop, metrics, sharding
from trm_jax.types import Batch, UserError

POINTS = 6  # evaluations of a run
WAYS = ("t2i", "i2t")
RECALLS = tuple(f"{way}_R@{k}" for way in WAYS for k in (1, 5, 10))
QUALITY = (*RECALLS, "Rsum")
# Captions without a usable word, in per cent; words of the knowledge, others with a vector, and
# words without one, of a caption; m, and the rank of the map by Procrustes.
COVERAGE = ("uncovered", "known_words", "other_words", "dropped_words")
MADE = ("neighbours", "procrustes_rank")
WATCHED = ("loss_kl", "loss_reconstruction", "loss_words", "loss_structure", "loss_prototypes")

Encode = Callable[[Batch], Any]  # a batch with features and region_mask -> regions [n, R, Z]


class Space(NamedTuple):
    """What matching reads.

    encode: regions of a batch. prototypes, random: [K, Z], the mean and one region of each word.
    """

    encode: Encode
    prototypes: np.ndarray
    random: np.ndarray


def training(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Trains by the config, evaluates `POINTS` times on `matching.evaluated`, and matches.

    Returns:
      QUALITY and COVERAGE after the last step, "Rsum_best" of the best evaluation; WATCHED over the
      last interval; "steps", and "curve": {"step": [..], metric: [.. after them]}; "variants": the
      values of each of `matching.variants`.
    """
    config = config.copy_and_resolve_references()
    built = experiment.build(config, cache_dir=Path(config.data.cache_dir))
    words, test = built.words, open_part(config, "evaluated")
    assert words is not None
    every = -(-built.job.total_steps // POINTS)
    job = built.job._replace(
        evaluate=knowledge.make_evaluator(config, built.method, words, test),
        eval_split=config.matching.evaluated.split,
        log_every=every,
        eval_every=every,
        checkpoint_every=every,
    )
    params, extras = _train(job, folder, config.mesh)
    embed, names = jax.jit(built.method.predict["embed_image"]), ("features", "region_mask")

    def encode(batch: Batch) -> Any:
        return embed(params, extras, {name: batch[name] for name in names})["regions"]

    _, random = drawn(encode, job.refresh_batches(), len(words.names), config.seed)
    prototypes = np.asarray(jax.device_get(extras["prototypes"].vectors))
    values = match(config, words, Space(encode, prototypes, random), test, folder)
    lines = metrics.read_lines(folder / "metrics.jsonl")
    curve = claims_simcon_measure.read_curve(lines)
    last = [line for line in lines if line["split"] == "train"][-1]
    values |= {name: last[name] for name in WATCHED if last.get(name) is not None}
    return values | {"Rsum_best": max(curve["Rsum"]), "steps": job.total_steps, "curve": curve}


def raw(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """MACK: means of raw features, matched with raw features; and chance as a variant."""
    config = config.copy_and_resolve_references()
    source = knowledge.open_regions(config.data)
    words = knowledge.open_words(config.words, source.words, Path(config.data.cache_dir))
    rows, test = knowledge.rows(config.rows, source), open_part(config, "evaluated")
    batches = pipeline.eval_batches(rows, batch_size=config.data.batch_size)

    def encode(batch: Batch) -> Any:
        return batch["features"]

    found = drawn(encode, batches, len(words.names), config.seed)
    values = match(config, words, Space(encode, *found), test, folder)
    counts = [len(test.captions(index)) for index in range(len(test))]
    values["variants"]["chance"] = chance(counts)
    return values


def match(
    config: ConfigDict, words: knowledge.Words, space: Space, test: Source, folder: Path
) -> dict[str, Any]:
    """The values of the config's own way to match, and "variants": those of the others."""
    images, positions = _encoded(config, space.encode, test)
    domain = functools.cache(lambda: _domain(config, words, space))

    @functools.cache
    def fitted(steps: int) -> np.ndarray:
        settings = config.matching.fine_tuning.to_dict()
        return finetune.fit(*domain(), steps=steps, seed=config.seed, **settings).matrix

    def one(varied: ConfigDict) -> tuple[dict[str, Any], pair_scores.Scores]:
        matching = varied.matching
        if matching.neighbours_share:
            kept = int(words.has_vector.sum())
            varied.words.neighbours = max(1, round(matching.neighbours_share * kept))
        vectors, seen = space.prototypes, images
        if matching.prototypes == "random":
            vectors = space.random
        if matching.steps:
            matrix = fitted(matching.steps)
            vectors = vectors @ matrix
            if matching.transform_regions:
                seen = finetune.transformed(images, matrix)
        matcher = knowledge.CaptionMatcher(test, words, varied.words)
        found = matcher.scores(iter(seen), positions, vectors)
        made = matcher.prototypes(vectors).report
        values = pair_scores.metrics(found, folds=varied.evaluate.folds)
        values |= coverage(matcher.captions)
        return values | {name: made[name] for name in MADE if name in made}, found

    own, found = one(config.copy_and_resolve_references())
    if config.matching.scores:
        file = folder / config.matching.scores
        np.savez(file, scores=found.scores, image_of_text=found.image_of_text)
    variants = {}
    for key, switches in config.matching.variants:
        varied = config.copy_and_resolve_references()
        harness.apply_overrides(varied, dict(switches))
        variants[key], _ = one(varied)
    return {**own, "variants": variants}


def open_part(config: ConfigDict, name: str) -> Source:
    """The part `name` of `matching`, of data.test_dataset; its first data.test_size images."""
    data, part = config.data, config.matching[name]
    options = {**data.test_options.to_dict(), **part.options.to_dict()}
    source = sources.open_source(data.test_dataset, part.split, root=data.test_root, **options)
    return Subset(source, range(data.test_size)) if 0 < data.test_size < len(source) else source


def drawn(
    encode: Encode, batches: Iterable[Batch], size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(the mean [K, Z], one random region [K, Z]) of each of `size` words, by one pass."""

    @jax.jit
    def add(sums, regions, mu, batch, key):
        samples = at_samples(mu, batch["sample_region"])
        word = batch["sample_word"].reshape(-1)
        where = jnp.repeat(batch["valid"], batch["sample_word"].shape[1])
        sums = memory.accumulate(sums, samples, word, where=where)
        return sums, memory.draw(regions, key, samples, word, where=where)

    key, sums, regions = jax.random.key(seed), None, None
    for number, batch in enumerate(batches):
        mu = encode(batch)
        if sums is None or regions is None:
            sums = memory.create_sums(size, mu.shape[-1])
            regions = memory.create_random_regions(size, mu.shape[-1])
        kept = {name: batch[name] for name in ("sample_region", "sample_word", "valid")}
        sums, regions = add(sums, regions, mu, kept, jax.random.fold_in(key, number))
    assert sums is not None and regions is not None
    means = memory.finish(sums, memory.create(size, sums.high.shape[1]))
    return np.asarray(means.vectors), np.asarray(regions.vectors)


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


def _encoded(
    config: ConfigDict, encode: Encode, source: Source
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """(regions and masks of all images, in batches; which image of the source each is)."""
    parts, positions = [], []
    examples = ImageRegions(source, config.rows.most)
    for batch in pipeline.eval_batches(examples, batch_size=config.evaluate.batch_size):
        regions, valid = np.asarray(encode(batch)), batch["valid"]
        parts.append((regions[valid], batch["region_mask"][valid]))
        positions.append(batch["index"][valid])
    return parts, np.concatenate(positions)


def _domain(
    config: ConfigDict, words: knowledge.Words, space: Space
) -> tuple[finetune.RegionLists, np.ndarray, CaptionWords]:
    """Images of the domain, and captions of its other images: none of them is of a pair."""
    domain = open_part(config, "domain")
    if len(domain) < 2:
        raise UserError("fine-tuning needs two images of the domain at least")
    shown, told = (Subset(domain, range(start, len(domain), 2)) for start in (0, 1))
    images, _ = _encoded(config, space.encode, shown)
    matcher = knowledge.CaptionMatcher(told, words, config.words)
    prototypes = matcher.prototypes(space.prototypes).vectors
    return finetune.list_regions(images), prototypes, matcher.captions

"""Knowledge sets of runs of MASK: built, matched with captions, fine-tuned; launch/match.py."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from trm_jax.data import sources, word_vectors
from trm_jax.data.sources.base import Source
from trm_jax.evaluate import pair_scores
from trm_jax.memory import knowledge as memory_of_words
from trm_jax.memory import knowledge_file
from trm_jax.memory.knowledge_file import Knowledge
from trm_jax.train import checkpoints, experiment, finetune, runner, sharding, workdirs
from trm_jax.train import knowledge as settings_of
from trm_jax.types import UserError

_IMAGES = 128  # that are encoded at a time
RAW = "raw features"  # the encoder of a knowledge that needs none


class Encoder(NamedTuple):
    """What regions of images become, and how a knowledge says that it is of this encoder.

    embed: batch of images -> {"regions" [n, r, Z], "mask" [n, r]}.
    identity: in a knowledge's provenance.
    """

    embed: Any
    identity: str


def open_run(workdir: str) -> tuple[experiment.Experiment, Any, Any, int]:
    """(the experiment, params, extras, step) of the newest checkpoint of a run, any method's."""
    folder = Path(workdir)
    config = workdirs.read_config(folder)
    config.mesh.update({"data": -1, "fsdp": 1})
    built = experiment.build(config, cache_dir=folder / "features")
    mesh = sharding.make_mesh()
    return built, *runner.restore(built, folder, mesh)


def build(
    built: experiment.Experiment,
    params: Any,
    extras: Any,
    *,
    raw: bool,
    seed: int = 0,
    provenance: dict[str, Any],
) -> Knowledge:
    """The exact prototypes of all words over the training regions, and a random region of each.

    Args:
      built: of method mask.
      params, extras: of its checkpoint; not read if `raw`.
      raw: means of the features themselves (MACK), not of mu.
      seed: of the random regions.
      provenance: kept in the set, beside its encoder.

    Raises:
      UserError: the run is of another method.
    """
    if built.words is None:
        raise UserError("a knowledge is built of a run with method='mask'; this is another method")
    field = "features" if raw else "mu"
    samples = built.method.predict["samples"]

    @jax.jit
    def add(params, extras, sums, drawn, key, batch):
        found = samples(params, extras, batch)
        given = found[field], found["word"]
        sums = memory_of_words.accumulate(sums, *given, where=found["where"])
        return sums, memory_of_words.draw(drawn, key, *given, where=found["where"])

    count = len(built.words.names)
    width = built.clip["features" if raw else "width"]
    sums = memory_of_words.create_sums(count, width)
    drawn = memory_of_words.create_random_regions(count, width)
    names = tuple(built.method.specs["samples"])
    for number, batch in enumerate(built.job.refresh_batches()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        part = {name: batch[name] for name in names}
        sums, drawn = add(params, extras, sums, drawn, key, part)
    exact = memory_of_words.finish(sums, memory_of_words.create(count, width))
    vectors, counts, random = jax.device_get((exact.vectors, exact.counts, drawn.vectors))
    found = Knowledge(
        words=built.words.names,
        word_vectors=built.words.vectors,
        prototypes=vectors,
        counts=counts.astype(np.int64),
        random_regions=random,
        provenance={"encoder": identity(params, raw), **provenance},
    )
    return knowledge_file.select(found, counts > 0)


def identity(params: Any, raw: bool) -> str:
    """Names an encoder by its weights."""
    if raw:
        return RAW
    return checkpoints.weights_hash(jax.device_get(params["knowledge"]))


def encoder(built: experiment.Experiment, params: Any, extras: Any) -> Encoder:
    """That of a run of method mask."""
    if built.words is None:
        raise UserError("--workdir must be a run with method='mask', whose encoder made this set")
    function = jax.jit(functools.partial(built.method.predict["embed_image"], params, extras))
    return Encoder(function, identity(params, raw=False))


def raw_encoder() -> Encoder:
    """The features as they are."""
    return Encoder(lambda batch: {"regions": batch["features"], "mask": batch["region_mask"]}, RAW)


def open_captioned(data: ConfigDict, *, dataset: str, root: str, split: str) -> Source:
    """Images with captions: those of a run's config, but for what is not empty."""
    name = dataset or data.test_dataset or data.dataset
    place = root or (data.test_root if data.test_dataset else data.root)
    own = data.test_options if data.test_dataset else data.options
    options = {} if dataset else {k: v for k, v in own.to_dict().items() if v not in ("", ())}
    return sources.open_source(name, split, root=place, **options)


class Sides:
    """The images and the captions of a source, as a knowledge meets them.

    Args:
      knowledge: with an encoder or raw.
      of: must be the encoder that the knowledge was built with.
      source: images with region features and captions.
      settings: the config's `words` section.
      vectors: of words outside the knowledge; None if settings.unknown is "drop".
      most: regions of an image.
      transform_regions: apply the map of a fine-tuned knowledge to regions too.

    Raises:
      UserError: the knowledge is of another encoder, or a setting cannot be.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        of: Encoder,
        source: Source,
        settings: ConfigDict,
        *,
        vectors: word_vectors.VectorSource | None,
        most: int,
        transform_regions: bool = True,
    ):
        _check_encoder(knowledge, of)
        words = settings_of.Words(knowledge.words, knowledge.word_vectors, vectors)
        self.knowledge, self.source = knowledge, source
        self.matcher = settings_of.CaptionMatcher(source, words, settings)
        self._embed, self._most = of.embed, most
        self._map = knowledge.region_map if transform_regions else None

    def images(self) -> Iterator[settings_of.Encoded]:
        """All readable images in order, in batches."""
        found = settings_of.encoded(self._embed, self.source, most=self._most, batch_size=_IMAGES)
        for batch in found:
            ((regions, mask),) = finetune.transformed([(batch.regions, batch.mask)], self._map)
            yield settings_of.Encoded(np.asarray(regions), np.asarray(mask), batch.positions)


class Matched(NamedTuple):
    """Scores of a captioned set by a knowledge, and what was done about its words."""

    scores: pair_scores.Scores
    report: dict[str, Any]


def score(sides: Sides, *, random_regions: bool = False) -> Matched:
    """Matches all images with all captions.

    random_regions: in place of prototypes (the ablation of Table 1).
    """
    matcher, knowledge, images = sides.matcher, sides.knowledge, list(sides.images())
    positions = np.concatenate([image.positions for image in images])
    chosen = knowledge.random_regions if random_regions else knowledge.prototypes
    prototypes = matcher.prototypes(chosen)
    pairs = ((image.regions, image.mask) for image in images)
    found = matcher.scores(pairs, positions, prototypes)
    report = {**prototypes.report, "captions_unusable": matcher.captions.unusable}
    report["tokens_dropped"] = sum(matcher.captions.dropped.values())
    return Matched(found, report)


def tune(sides: Sides, **options: Any) -> tuple[Knowledge, finetune.FineTuning]:
    """The knowledge fitted to the images and captions, whose pairs are not looked at.

    options: those of finetune.fit.
    """
    matcher, knowledge = sides.matcher, sides.knowledge
    regions = finetune.list_regions((image.regions, image.mask) for image in sides.images())
    prototypes = matcher.prototypes(knowledge.prototypes).vectors
    fitted = finetune.fit(regions, prototypes, matcher.captions, **options)
    return knowledge_file.transform(knowledge, fitted.matrix), fitted


def _check_encoder(knowledge: Knowledge, of: Encoder) -> None:
    made = knowledge.provenance.get("encoder")
    if made != of.identity:
        remedy = "add --raw" if made == RAW else "give the --workdir that it was built of"
        raise UserError(f"the knowledge was built with another encoder; {remedy}")

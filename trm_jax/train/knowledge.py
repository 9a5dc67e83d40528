"""What runs of MASK need of a config: regions with words, word vectors, an evaluator."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from trm_jax.data import caption_words, corpus_vectors, sources, word_vectors
from trm_jax.data.region_rows import ImageRegions, RegionRows
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.labelled_regions import LabelledRegions, RegionSource
from trm_jax.data.sources.visual_genome import VisualGenome
from trm_jax.evaluate import caption_prototypes, knowledge_matching, pair_scores
from trm_jax.models import knowledge as networks
from trm_jax.train import datasets, evaluation, glyph_knowledge
from trm_jax.types import BadSampleError, Batch, Method, PyTree, UserError

REGIONS: dict[str, Callable[..., RegionSource]] = {
    "labelled_regions": LabelledRegions,
    "visual_genome": VisualGenome,
}


class Data(NamedTuple):
    """What a run of MASK reads: regions with words, images with captions, and where words' vectors
    are (`words.vectors`)."""

    regions: RegionSource
    captioned: Source
    vectors: str


class Words(NamedTuple):
    """The words of the regions and where vectors of words come from.

    names: K words, of which those without a vector have a zero row and are never learnt.
    vectors: float32 [K, N].
    source: of all vectors, to look up words of captions; None where unknown ones are dropped.
    """

    names: tuple[str, ...]
    vectors: np.ndarray
    source: word_vectors.VectorSource | None

    @property
    def has_vector(self) -> np.ndarray:
        """bool [K]."""
        return np.any(self.vectors != 0, axis=1)

    def read(self, words: Sequence[str]) -> np.ndarray:
        """float32 [u, N] of words that the source has, whole or in parts."""
        assert self.source is not None
        return word_vectors.read_any_case(self.source, words).vectors


def open_data(config: ConfigDict, cache_dir: Path) -> Data:
    """The data of a config. Raises UserError for whatever of it cannot be used."""
    data, vectors = config.data, config.words.vectors
    if data.dataset == "glyph_regions":
        found = glyph_knowledge.open_all(data, cache_dir)
        return Data(found.train, found.test, vectors or f"corpus:{found.texts}")
    regions = _open_regions(data)
    if not vectors:
        raise UserError(
            "words.vectors is empty; give a file of word vectors (GloVe, word2vec or fastText)"
        )
    return Data(regions, datasets.open_test(data), vectors)


def _open_regions(data: ConfigDict) -> RegionSource:
    if data.dataset not in REGIONS:
        raise UserError(
            f"data.dataset={data.dataset!r} has no word-labelled regions; method='mask' reads "
            f"{', '.join(REGIONS)} or glyph_regions"
        )
    if not data.root:
        raise UserError(f"data.root is empty; '{data.dataset}' needs the place of its files")
    opener = REGIONS[data.dataset]
    options = {name: v for name, v in data.options.to_dict().items() if v not in ("", ())}
    sources.check_options(data.dataset, opener, options)
    return opener(data.root, **options)


def open_words(place: str, width: int, names: Sequence[str], cache_dir: Path) -> Words:
    """The vectors of the regions' words.

    Args:
      place, width: see `open_vectors`.
      names: the words.
      cache_dir: for the index of a file in a folder that cannot be written to.

    Raises:
      UserError: there is no such file, it is damaged, or it has none of the words.
    """
    source = open_vectors(place, width, cache_dir)
    found = word_vectors.read_any_case(source, names)
    words = Words(tuple(names), np.where(found.found[:, None], found.vectors, 0.0), source)
    if not words.has_vector.any():
        raise UserError(
            f"{place} has a vector for none of the {len(names)} words of the regions, such as "
            f"{names[0]!r}"
        )
    return words


def open_vectors(place: str, width: int, cache_dir: Path) -> word_vectors.VectorSource:
    """A file of word vectors, or "corpus:FILE": vectors of `width` numbers made of its texts, one a
    line, by the words that stand together (data/corpus_vectors.py)."""
    kind, _, file = place.partition(":")
    if kind != "corpus":
        return word_vectors.open_file(Path(place), cache=cache_dir)
    try:
        texts = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"words.vectors={place} cannot be read: {error}") from None
    return corpus_vectors.fit(texts, width=width)


def resolve(model: ConfigDict, features: int, word_width: int) -> dict[str, Any]:
    """The networks' configuration: `model.knowledge` with what data and word vectors say."""
    given = model.knowledge.to_dict()
    return networks.validate({**given, "features": features, "word_width": word_width})


def rows(settings: ConfigDict, source: RegionSource) -> RegionRows:
    """The training rows of a config's `rows` section."""
    return RegionRows(
        source,
        regions=settings.regions,
        samples=settings.samples,
        attention_set=settings.attention_set,
    )


def report(source: RegionSource, words: Words, examples: RegionRows) -> dict[str, int]:
    """Counts for run.json."""
    without = int((~words.has_vector).sum())
    return {**source.report(), "words_without_vector": without, **examples.report()}


class CaptionMatcher:
    """Scores of captions by the words they have, for any knowledge of the same words.

    source: images with captions. words: of the knowledge. settings: the config's `words` section.

    Raises:
      UserError: there is no caption or an empty one, or a choice of `settings` that cannot be.
    """

    def __init__(self, source: Source, words: Words, settings: ConfigDict):
        if settings.unknown not in caption_prototypes.UNKNOWN:
            known = ", ".join(caption_prototypes.UNKNOWN)
            raise UserError(f"words.unknown={settings.unknown!r} is none of {known}")
        if settings.pooling not in knowledge_matching.POOLINGS:
            known = ", ".join(knowledge_matching.POOLINGS)
            raise UserError(f"words.pooling={settings.pooling!r} is none of {known}")
        texts = [source.captions(index) for index in range(len(source))]
        self.owner = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
        self._words, self._settings = words, settings
        kept = words.has_vector
        self._rows = np.flatnonzero(kept)
        self._names = [words.names[row] for row in self._rows]
        if settings.unknown == "drop":
            has: Callable[[str], bool] = lambda word: False  # noqa: E731
        elif words.source is None:
            raise UserError("words.vectors is empty; give a file, or words.unknown='drop'")
        else:
            has = words.source.__contains__
        self.captions = caption_words.usable(
            [text for own in texts for text in own],
            frozenset(self._names),
            has,
            caption_words=settings.caption_words,
            tagger=settings.tagger,
        )

    def prototypes(self, vectors: np.ndarray) -> caption_prototypes.CaptionPrototypes:
        """Of the captions' words, from the prototypes [K, Z] of all words of the knowledge."""
        return caption_prototypes.estimate(
            self.captions,
            self._names,
            self._words.vectors[self._rows],
            vectors[self._rows],
            self._words.read,
            unknown=self._settings.unknown,
            neighbours=self._settings.neighbours,
        )

    def scores(
        self,
        images: Iterable[tuple[Any, Any]],
        positions: np.ndarray,
        prototypes: caption_prototypes.CaptionPrototypes,
    ) -> pair_scores.Scores:
        """All pairs of images and captions.

        images: batches of (regions [n, r, Z], mask [n, r]). positions: [n], which image of the
        source each one is. prototypes: of `self.prototypes`.
        """
        found = knowledge_matching.score_all(
            images,
            prototypes.vectors,
            self.captions,
            pooling=self._settings.pooling,
        )
        if not np.isin(self.owner, positions).all():
            lost = int(self.owner[~np.isin(self.owner, positions)][0])
            raise UserError(
                f"image {lost} of the evaluation split cannot be read, but has captions; leave "
                "both out"
            )
        return pair_scores.Scores(found, np.searchsorted(positions, self.owner), positions)


def make_evaluator(
    config: ConfigDict, method: Method, words: Words, source: Source
) -> evaluation.Evaluator:
    """(params, extras) -> recalls of the captions of `source` by the prototypes of `extras`."""
    score = make_scorer(config, method, words, source)

    def evaluate(params: PyTree, extras: PyTree) -> dict[str, float]:
        return pair_scores.metrics(score(params, extras), folds=config.evaluate.folds)

    return evaluate


def make_scorer(
    config: ConfigDict, method: Method, words: Words, source: Source
) -> Callable[[PyTree, PyTree], pair_scores.Scores]:
    """(params, extras) -> the scores of all images and captions of `source`."""
    matcher = CaptionMatcher(source, words, config.words)
    embed, most = jax.jit(method.predict["embed_image"]), config.rows.most
    with contextlib.suppress(BadSampleError):
        ImageRegions(source, most).sample(0, np.random.default_rng(0))  # too many are told at once

    def score(params: PyTree, extras: PyTree) -> pair_scores.Scores:
        size, workers = config.evaluate.batch_size, config.data.workers
        bound = functools.partial(embed, params, extras)
        images = list(encoded(bound, source, most=most, batch_size=size, workers=workers))
        vectors = evaluation.to_host(extras["prototypes"].vectors)
        positions = np.concatenate([image.positions for image in images])
        pairs = ((image.regions, image.mask) for image in images)
        return matcher.scores(pairs, positions, matcher.prototypes(vectors))

    return score


class Encoded(NamedTuple):
    """Regions of some images, on the host: [n, r, Z], their mask [n, r], the images' positions."""

    regions: np.ndarray
    mask: np.ndarray
    positions: np.ndarray


def encoded(
    embed: Callable[[Batch], dict[str, Any]],
    source: Source,
    *,
    most: int,
    batch_size: int,
    workers: int = 0,
) -> Iterator[Encoded]:
    """All readable images of `source` in order, encoded.

    Args:
      embed: {"features", "region_mask"} -> {"regions", "mask"}, see methods/mask.py.
      source: images with region features. most: regions of an image.
      batch_size, workers: see `evaluation.device_batches`.
    """
    examples = ImageRegions(source, most)
    for batch in evaluation.device_batches(examples, batch_size, workers):
        found = embed({name: batch[name] for name in ("features", "region_mask")})
        keys = {name: batch[name] for name in ("index", "valid")}
        host = evaluation.to_host({**found, **keys})
        valid = np.asarray(host["valid"])
        yield Encoded(*(np.asarray(host[name])[valid] for name in ("regions", "mask", "index")))

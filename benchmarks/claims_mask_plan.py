"""Which runs the claims of MASK need: a source's config with one row's switches.

A run trains once, or reads raw features (MACK), and is then matched in every way that its row
stands for: its variants change the words, the prototypes or the pooling, and never the training.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from benchmarks import claims_mask_measure as measure
from benchmarks import harness
from configs import mask_coco_subset, mask_glyphs
from trm_jax.types import UserError

MASK, MACK, CHANCE = "MASK", "MACK", "chance"
# Row -> its switches; these have --seeds seeds.
LOSSES: dict[str, dict[str, Any]] = {
    MASK: {},
    "w/o L_cm": {"loss.cross_modal_weight": 0.0},
    "w/o L_cl": {"loss.contrastive_weight": 0.0},
}
# Recipe -> the config field that it goes over, and its values (Tables 4 and 15).
WEIGHTS: dict[str, tuple[str, tuple[float, ...]]] = {
    "lambda1": ("loss.cross_modal_weight", (1.0, 3.0, 5.0)),
    "lambda2": ("loss.contrastive_weight", (1.0, 3.0, 5.0)),
}
# Row of Table 12 -> its switches.
DEPTHS: dict[str, dict[str, int]] = {
    "PAE, 1 FC + 5 attention": {"model.knowledge.encoder.attention_layers": 5},
    "FRM, 2 FC + 5 attention": {"model.knowledge.reconstructor.attention_layers": 5},
    "MTM, 3 FC + 5 attention": {"model.knowledge.mapper.attention_layers": 5},
}
AS_TABLE_8 = "as in Table 8"
FINE_TUNING = (50, 200, 800)  # steps
ALPHAS = (0.0, 0.1, 0.15, 0.2)  # of re-ranking
SCORES = "scores.npz"  # of a run that re-ranks others


class Part(NamedTuple):
    """Images with captions: the config's own, or others like them.

    split: of data.test_dataset, where there is one. switches: config fields that give others.
    """

    split: str = "test"
    switches: Mapping[str, Any] = {}


class Source(NamedTuple):
    """Word-labelled regions with the images and captions that their knowledge is measured on.

    title: of its tables.
    make: folder of the data -> config.
    files: below that folder, which must be there.
    test: what results are of. validation: what settings are chosen on.
    domain: unpaired images and captions to fine-tune on.
    """

    title: str
    make: Callable[[Path], ConfigDict]
    files: tuple[str, ...]
    test: Part
    validation: Part
    domain: Part


def _flickr8k(data: Path) -> ConfigDict:
    places = (data / name for name in _FLICKR8K)
    config = mask_coco_subset.get_config(",".join(map(str, places)))
    config.words.unknown = "interpolate"  # as in the paper; what the config has is "w/o OOD"
    return config


# Scenes that are matched alone have no use for regions to learn from and for texts.
_OTHER_SCENES = {"data.train_size": 1, "data.options.texts": 1}
DOMAIN_SCENES = 1000
_FLICKR8K = ("coco_regions/train2017.npz", "flickr8k_precomp", "words/glove.twitter.25d.12k.txt")
SOURCES: dict[str, Source] = {
    "flickr8k": Source(
        "Knowledge of COCO's boxes, Flickr8k's captions",
        _flickr8k,
        _FLICKR8K,
        test=Part(),
        validation=Part("dev"),
        domain=Part("train"),
    ),
    "glyphs": Source(
        "Glyph scenes: half of the synonyms stand in captions alone",
        lambda _: mask_glyphs.get_config(),
        (),
        test=Part(),
        validation=Part(switches={**_OTHER_SCENES, "data.options.seed": 1}),
        domain=Part(
            switches={**_OTHER_SCENES, "data.options.seed": 2, "data.test_size": DOMAIN_SCENES}
        ),
    ),
}


class Variant(NamedTuple):
    """One way to match with what a run has.

    key: in the run's record. name: of the row. switches: of words and matching. places: what its
    conditions have beside those of the run; none of it in the main table.
    """

    key: str
    name: str
    switches: Mapping[str, Any]
    places: tuple[Mapping[str, Any], ...] = ({},)


def _in(recipe: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"recipe": recipe, recipe: value, **more}


def _fine_tuned(key: str, steps: int, **more: Any) -> Variant:
    switches = {"matching.steps": steps, **{f"matching.{k}": v for k, v in more.items()}}
    alone = {"prototypes_alone": True} if more else {}
    return Variant(key, MASK, switches, (_in("fine-tuning", steps, **alone),))


def _dropped(name: str, *places: Mapping[str, Any]) -> Variant:
    return Variant("drop", name, {"words.unknown": "drop"}, ({}, *places))


_POOLINGS = {"global mean": "global_mean", "bidirectional": "bidirectional"}
VARIANTS: dict[str, tuple[Variant, ...]] = {
    MASK: (
        _dropped("w/o OOD", _in("unknown", "drop")),
        Variant("random", "random region", {"matching.prototypes": "random"}),
        *(Variant(p, name, {"words.pooling": p}) for name, p in _POOLINGS.items()),
        *(
            Variant(kind, MASK, {"words.unknown": kind}, (_in("unknown", kind),))
            for kind in ("interpolate", "procrustes")
        ),
        *(Variant(f"m={m}", MASK, {"words.neighbours": m}, (_in("m", str(m)),)) for m in (1, 10)),
        *(
            Variant(f"m={m}", MASK, {"matching.neighbours_share": share}, (_in("m", m),))
            for m, share in (("K/8", 1 / 8), ("K/2", 1 / 2), ("K", 1.0))
        ),
        *(
            Variant(kind, MASK, {"words.caption_words": kind}, (_in("caption_words", kind),))
            for kind in ("all", "nouns_adjectives", "nouns")
        ),
        # Words such as "the" are outside the knowledge too: what interpolation does for nouns.
        Variant(
            "nouns, drop",
            MASK,
            {"words.caption_words": "nouns", "words.unknown": "drop"},
            (_in("caption_words", "nouns, w/o OOD"),),
        ),
        *(_fine_tuned(f"fine-tuned {steps}", steps) for steps in FINE_TUNING),
        _fine_tuned("fine-tuned prototypes", FINE_TUNING[1], transform_regions=False),
    ),
    **{
        name: (
            _dropped(f"{name}, w/o OOD"),
            # With nouns alone, interpolated words are words of things.
            Variant(
                "nouns",
                MASK,
                {"words.caption_words": "nouns"},
                (_in("caption_words", f"nouns, {name}"),),
            ),
        )
        for name in LOSSES
        if name != MASK
    },
    MACK: (
        Variant("interpolate", "MACK, with OOD", {"words.unknown": "interpolate"}),
        Variant("random", "MACK, random region", {"matching.prototypes": "random"}),
        *(Variant(p, f"MACK, {name}", {"words.pooling": p}) for name, p in _POOLINGS.items()),
        Variant(CHANCE, CHANCE, {}),
    ),
}


def tasks(
    *,
    sources: Mapping[str, Source],
    seeds: int,
    sweep_seeds: int = 1,
    data: Path,
    cache_dir: Path,
    tagger: str = "",
    overrides: Mapping[str, Any] | None = None,
    validation: bool = False,
    variants: bool = True,
) -> list[harness.Task]:
    """All runs in the order in which they are worth having.

    MASK and MACK first, then MASK without each of its losses, seed by seed; then the weights of the
    losses one at a time, and the depths.

    Args:
      sources: of SOURCES.
      seeds: 0, 1, .. of LOSSES.
      sweep_seeds: of weights and depths, no more than `seeds`.
      data: the folder of the sources' files.
      cache_dir: where an index of word vectors is kept for all runs.
      tagger: that finds nouns and adjectives, see the config's words.tagger.
      overrides: dotted config fields, set wherever a run has them, before a row's own.
      validation: measure on the sources' validation parts.
      variants: match each run in all ways, not in its own alone.

    Raises:
      UserError: an override that no run has.
    """
    given = {"data.cache_dir": str(cache_dir), "words.tagger": tagger}
    makers = [
        _Maker(name, source, data, given, dict(overrides or {}), validation, variants)
        for name, source in sources.items()
    ]
    planned = []
    for seed in range(seeds):
        for maker in makers:
            rows = [maker.row(name, seed) for name in LOSSES]
            planned += rows if seed else [rows[0], maker.raw(), *rows[1:]]
    for seed in range(min(seeds, sweep_seeds)):
        planned += [task for maker in makers for task in maker.sweeps(seed)]
    unused = set(overrides or {}) - set().union(*(maker.found for maker in makers))
    if unused:
        raise UserError(f"--set=config.{sorted(unused)[0]}: no run's config has that field")
    return planned


def expanded(
    planned: Sequence[harness.Task], records: Mapping[str, Mapping[str, Any]]
) -> tuple[list[harness.Task], dict[str, Mapping[str, Any]]]:
    """A task and a record for every variant of every run, as if each had been measured alone."""
    every, found = [], {}
    for task in planned:
        record = records.get(task.folder)
        every.append(task)
        if not record:
            continue
        found[task.folder] = record
        for variant in VARIANTS.get(task.name, ()):
            values = record["values"]["variants"].get(variant.key)
            if not values:
                continue
            own = dict(task.conditions[0])
            places = tuple({**own, **place} for place in variant.places)
            one = task._replace(name=variant.name, conditions=places)
            every.append(one)
            found[one.folder] = {**record, "values": values}
    return every, found


class _Maker:
    """Makes the tasks of one source."""

    def __init__(
        self,
        name: str,
        source: Source,
        data: Path,
        given: Mapping[str, Any],
        overrides: Mapping[str, Any],
        validation: bool,
        variants: bool,
    ):
        self.name, self.source, self.data = name, source, data
        self.given, self.overrides = given, overrides
        self.validation, self.variants = validation, variants
        self.found: set[str] = set()

    def row(self, name: str, seed: int) -> harness.Task:
        """A row with trained networks; MASK's own stands in every recipe and has all variants."""
        config = self._config(name, seed, LOSSES[name])
        places = [self._condition(config)]
        if name == MASK:
            places += [{**places[0], **place} for place in _own_places(config)]
            config.matching.scores = SCORES
        self._take_variants(config, name)
        return self._task(name, places, config, measure.training)

    def raw(self) -> harness.Task:
        """MACK: prototypes of raw features, nothing to train, no word outside the knowledge."""
        config = self._config(MACK, 0, {"words.unknown": "drop"})
        self._take_variants(config, MACK)
        task = self._task(MACK, [{"source": self.name}], config, measure.raw)
        kinds = ("data.", "words.", "evaluate", "matching", "rows", "seed")
        read = tuple(name for name in task.sections if name.startswith(kinds))
        return task._replace(seed=None, sections=read)

    def sweeps(self, seed: int) -> list[harness.Task]:
        """The weights that MASK's own row does not have, and the depths."""
        own, made = self.row(MASK, seed), []
        for recipe, (field, values) in WEIGHTS.items():
            for value in values:
                config = self._config(recipe, seed, {field: value})
                if config.loss != own.config.loss:
                    made.append((config, _in(recipe, value)))
        for depth, switches in DEPTHS.items():
            made.append((self._config(depth, seed, switches), _in("depth", depth)))
        return [
            self._task(MASK, [{**self._condition(config), **place}], config, measure.training)
            for config, place in made
        ]

    def _config(self, name: str, seed: int, switches: Mapping[str, Any]) -> ConfigDict:
        config = self.source.make(self.data)
        part = self.source.validation if self.validation else self.source.test
        for other in (part, self.source.domain):
            _switch(config.copy_and_resolve_references(), self.name, other.switches)
        config.update({"matching": {
            "evaluated": _plain(part),
            "domain": _plain(self.source.domain),
            "vectors": Path(config.words.vectors).name,  # where they lie is not what they are
            "prototypes": "mean",  # or "random": a region in place of each
            "neighbours_share": 0.0,  # of the knowledge's words, in place of words.neighbours
            "steps": 0,  # of fine-tuning
            "transform_regions": True,
            "fine_tuning": {"batch_images": 32, "batch_texts": 128, "learning_rate": 1e-4},
            "scores": "",  # the file that they are left in
            "variants": (),
        }})  # fmt: skip
        _switch(config, self.name, {"seed": seed, **self.given})
        self.found |= harness.apply_overrides(config, self.overrides)
        _switch(config, name, switches)
        return config

    def _take_variants(self, config: ConfigDict, name: str) -> None:
        """Those that change something."""
        chosen = []
        for variant in VARIANTS[name] if self.variants else ():
            changed = config.copy_and_resolve_references()
            _switch(changed, variant.key, variant.switches)
            if changed != config:
                chosen.append((variant.key, tuple(variant.switches.items())))
        config.matching.variants = tuple(chosen)

    def _condition(self, config: ConfigDict) -> dict[str, Any]:
        """Where a run's values stand in the results."""
        train = config.train
        length = {"steps": train.steps} if train.steps else {"epochs": train.epochs}
        return {"source": self.name, "width": config.model.knowledge.width, **length}

    def _task(
        self,
        name: str,
        places: list[dict[str, Any]],
        config: ConfigDict,
        function: Callable[[ConfigDict, Path], dict[str, Any]],
    ) -> harness.Task:
        # The paths say where files lie, not what is in them.
        read = {*config.keys()} - {"data", "words"}
        read |= {f"data.{field}" for field in config.data if field != "test_root"}
        read |= {f"words.{field}" for field in config.words if field not in ("vectors", "tagger")}
        return harness.Task(name, tuple(places), config.seed, config, function, tuple(sorted(read)))


def _plain(part: Part) -> dict[str, Any]:
    return {"split": part.split, "switches": tuple(part.switches.items())}


def _own_places(config: ConfigDict) -> list[dict[str, Any]]:
    """Where MASK's own row stands among the recipes."""
    words, loss = config.words, config.loss
    return [
        _in("m", str(words.neighbours)),
        _in("unknown", words.unknown),
        _in("caption_words", words.caption_words),
        _in("fine-tuning", 0),
        _in("lambda1", loss.cross_modal_weight),
        _in("lambda2", loss.contrastive_weight),
        _in("depth", AS_TABLE_8),
    ]


def _switch(config: ConfigDict, name: str, switches: Mapping[str, Any]) -> None:
    unknown = set(switches) - harness.apply_overrides(config, switches)
    if unknown:
        raise UserError(f"the row {name} sets {sorted(unknown)[0]}, which its config lacks")

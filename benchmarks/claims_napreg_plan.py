"""Which runs the claims of NAPReg need: the project's own config file, with one row's switches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import claims_napreg_measure as measure
from benchmarks import harness
from configs import napreg_flickr8k
from trm_jax.types import UserError

SOURCE = "flickr8k_precomp"
EPOCHS, DROP_EPOCH = 6, 4  # the learning rate is a tenth after the latter
WARMUP = 1.0  # epochs: from nothing, the hardest negatives make a triplet collapse

# Model -> (the argument of configs/napreg_flickr8k.py, its switches).
_SCORER = "model.matching.scorer"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SCAN i2t": (
        "scan",
        {f"{_SCORER}.direction": "i2t", f"{_SCORER}.attention_scale": 4.0},
    ),
    "SCAN t2i": (
        "scan",
        {
            f"{_SCORER}.direction": "t2i",
            f"{_SCORER}.attention_scale": 9.0,
            f"{_SCORER}.lse_scale": 6.0,
        },
    ),
    # It takes four times as long, and collapses at the hardest negatives: they never come.
    "SGRAF-SAF": (
        "saf",
        {"train.epochs": 3, "optimizer.drop_epochs": (2,), "loss.warmup_epochs": 3.0},
    ),
}
CHIEF = "SCAN i2t"
# Row -> (loss.pair, loss.nouns).
METHODS: dict[str, tuple[str, str]] = {
    "triplet": ("triplet", "none"),
    "triplet+NAP": ("triplet", "nap"),
    "MS": ("multi_similarity", "none"),
    "MS+NAP": ("multi_similarity", "nap"),
    "MS+Proxy-Anchor": ("multi_similarity", "proxy_anchor"),
    "Polyloss": ("polynomial", "none"),
    "InfoNCE": ("infonce", "none"),  # not in the paper
}
FULL = "MS+NAP"  # the paper's own
FIRST = ("triplet", "triplet+NAP")
# Recipe -> the config field that it goes over, and its values, with FULL and CHIEF.
RECIPES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "K": ("nouns.min_count", (1, 2, 3, 5, 8)),
    "context": ("loss.context", ("mean_nouns", "per_noun")),
}


def tasks(
    *,
    seeds: int,
    sweep_seeds: int = 1,
    data: str,
    cache_dir: Path,
    tagger: str = "",
    overrides: Mapping[str, Any] | None = None,
    validation: bool = False,
) -> list[harness.Task]:
    """All runs in the order in which they are worth having.

    Seed by seed SCAN i2t with the triplet, then with the nouns; then its other rows, the
    frequencies and contexts of the nouns, SCAN t2i and SGRAF-SAF.

    Args:
      seeds: 0, 1, .. of the two first rows.
      sweep_seeds: of all others, no more than `seeds`.
      data: the folder of flickr8k_precomp.
      cache_dir: where the nouns of the captions are kept for all runs.
      tagger: that finds them, see the config's nouns.tagger.
      overrides: dotted config fields, set wherever a run has them, before a row's own.
      validation: measure on a tenth of the training images.

    Raises:
      UserError: an override that no run has.
    """
    given = {"data.cache_dir": str(cache_dir), "nouns.tagger": tagger}
    given |= {"data.holdout": 0.1} if validation else {}
    maker = _Maker(data, given, dict(overrides or {}))
    planned = [maker.row(CHIEF, name, seed) for seed in range(seeds) for name in FIRST]
    for seed in range(min(seeds, sweep_seeds)):
        planned += [maker.row(CHIEF, name, seed) for name in METHODS if name not in FIRST]
        planned += [task for recipe in RECIPES for task in maker.others(recipe, seed)]
        for model in (name for name in MODELS if name != CHIEF):
            planned += [maker.row(model, name, seed) for name in METHODS]
    unused = set(maker.overrides) - maker.found
    if unused:
        raise UserError(f"--set=config.{sorted(unused)[0]}: no run's config has that field")
    return planned


class _Maker:
    """Makes tasks of one invocation's data and overrides."""

    def __init__(self, data: str, given: dict[str, Any], overrides: dict[str, Any]):
        self.data, self.given, self.overrides = data, given, overrides
        self.found: set[str] = set()

    def row(self, model: str, name: str, seed: int) -> harness.Task:
        """A row of a model; FULL of CHIEF stands in each recipe too, and is measured once."""
        config = self._config(model, name, seed)
        condition = _condition(config, model)
        places = [condition]
        if (model, name) == (CHIEF, FULL):
            places += [_place(config, condition, recipe) for recipe in RECIPES]
        return _task(name, places, config)

    def others(self, recipe: str, seed: int) -> list[harness.Task]:
        """FULL of CHIEF with the values of a recipe that its row does not have."""
        field, values = RECIPES[recipe]
        own, made = self.row(CHIEF, FULL, seed).fingerprint(), []
        for value in values:
            config = self._config(CHIEF, FULL, seed)
            _switch(config, recipe, {field: value})
            place = _place(config, _condition(config, CHIEF), recipe)
            made.append(_task(FULL, [place], config))
        return [task for task in made if task.fingerprint() != own]

    def _config(self, model: str, name: str, seed: int) -> ConfigDict:
        kind, switches = MODELS[model]
        pair, nouns = METHODS[name]
        config = napreg_flickr8k.get_config(f"{kind},{self.data}")
        config.train.epochs = EPOCHS
        config.optimizer.drop_epochs = (DROP_EPOCH,)
        config.loss.warmup_epochs = WARMUP
        if kind == "scan":
            switches = {**switches, f"{_SCORER}.pooling": _pooling(model, pair)}
        _switch(config, model, {"seed": seed, **switches, **self.given})
        self.found |= harness.apply_overrides(config, self.overrides)
        _switch(config, name, {"loss.pair": pair, "loss.nouns": nouns})
        if pair != "triplet":
            config.loss.warmup_epochs = 0.0
        return config


def _pooling(model: str, pair: str) -> str:
    """SCAN t2i's own is LogSumExp; MS and Polyloss hold scores against fixed cosines."""
    return "lse" if model == "SCAN t2i" and pair == "triplet" else "mean"


def _condition(config: ConfigDict, model: str) -> dict[str, Any]:
    """Where a run's values stand in the results."""
    matching, condition = config.model.matching, {"source": SOURCE, "model": model}
    if "pooling" in matching.scorer:
        condition["pooling"] = matching.scorer.pooling
    if config.loss.nouns != "none":
        condition["K"] = config.nouns.min_count
    condition["width"] = matching.embed_dim
    if "sim_dim" in matching.scorer:
        condition["sim_dim"] = matching.scorer.sim_dim
    condition["batch"] = config.data.batch_size
    length = (
        {"steps": config.train.steps} if config.train.steps else {"epochs": config.train.epochs}
    )
    return condition | length


def _place(config: ConfigDict, condition: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """The condition of a run in a recipe."""
    if recipe == "context":
        condition = {**condition, "context": config.loss.context}
    return {**condition, "recipe": recipe}


def _task(name: str, places: list[dict[str, Any]], config: ConfigDict) -> harness.Task:
    # The path of the tagger says where it lies, not what it finds.
    read = {*config.to_dict()} - {"nouns"}
    if config.loss.nouns != "none":
        read |= {"nouns.min_count", "nouns.lemmatise"}
    return harness.Task(
        name, tuple(places), config.seed, config, measure.training, tuple(sorted(read))
    )


def _switch(config: ConfigDict, name: str, switches: Mapping[str, Any]) -> None:
    unknown = set(switches) - harness.apply_overrides(config, switches)
    if unknown:
        raise UserError(f"the row {name} sets {sorted(unknown)[0]}, which its config lacks")

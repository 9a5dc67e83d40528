"""Which runs the claims of SimCon need: the project's own config files, with one row's switches."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import claims_simcon_measure as measure
from benchmarks import harness
from configs import common, lit_flickr8k, simcon_flickr8k, simcon_glyphs
from trm_jax.types import UserError

NOISE, NOISES = 0.3, (0.0, 0.3, 0.6)  # share of the training images whose captions are not theirs
BATCH = int(simcon_glyphs.get_config().data.batch_size)
BATCHES = (64, 128, 256, 512, 1024, 2048)
FEATURES, PHOTOS = "flickr8k_precomp", "flickr8k"  # the folders below --data

# Row of the paper's ablation -> (loss.name, its switches); every row adds one thing.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "InfoNCE": ("infonce", {}),
    "SimCon": ("simcon", {}),
    "+views": ("mv_simcon", {"loss.joint_positives": False, "loss.ncs_weight": 0.0}),
    "+NCS": ("mv_simcon", {"loss.joint_positives": False, "loss.ncs_weight": 1.0}),
    "+joint positives": ("mv_simcon", {"loss.joint_positives": True, "loss.ncs_weight": 1.0}),
}
BASELINE, FULL = "InfoNCE", "+joint positives"  # all of MV-SimCon
RECIPES: dict[str, dict[str, Any]] = {
    f"tau {tau}, {own}": {"loss.self_similarity": own, "tau": tau}
    for tau in ("learnable", "fixed")
    for own in ("exclude", "include")
}
# All of MV-SimCon at the most noise, with one thing changed: source -> (its name, what changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "glyphs_later": ("positives after half", {"loss.changes": (1 / 2, 2 / 3, 5 / 6)}),
    "glyphs_without_ncs": ("without NCS", {"loss.ncs_weight": 0.0}),
}
SOURCES = ("glyphs", "glyphs_exchanged", *VARIANTS, "flickr8k_features", "flickr8k_photos")
# At other batches than the config's, so that the noise of a step's gradient changes less.
_RATE_POWER = 0.5
# Scenes of other seeds than the ones that are tested on are new images.
_VALIDATION_SCENES = 1000


def tasks(
    *,
    seeds: int,
    sweep_seeds: int = 1,
    data: str = "",
    overrides: Mapping[str, Any] | None = None,
    validation: bool = False,
) -> list[harness.Task]:
    """All runs in the order in which they are worth having.

    Seed by seed the ablation, the noise and the features; then captions exchanged among scenes,
    the photos, the recipes and the batch sizes.

    Args:
      seeds: 0, 1, .. of every row.
      sweep_seeds: of all after the features, no more than `seeds`.
      data: folder of flickr8k_precomp/ and flickr8k/; "" leaves these sources out.
      overrides: dotted config fields, set wherever a run has them, before a row's own.
      validation: measure on other glyph scenes, and on a tenth of Flickr8k's training images.

    Raises:
      UserError: an override that no run has.
    """
    maker = _Maker(data, dict(overrides or {}), validation)
    planned: list[harness.Task] = []
    for seed in range(seeds):
        planned += [maker.glyphs(name, NOISE, seed) for name in METHODS]
        for noise in (n for n in NOISES if n != NOISE):
            planned += [maker.glyphs(name, noise, seed) for name in (BASELINE, FULL)]
        planned += [maker.variant(source, seed) for source in VARIANTS]
        if data:
            planned += [
                maker.flickr8k("features", name, noise, seed)
                for noise in NOISES
                for name in (BASELINE, "SimCon")
            ]
    for seed in range(min(seeds, sweep_seeds)):
        planned += [maker.exchanged(name, seed) for name in (BASELINE, "SimCon", FULL)]
        if data:
            planned += [
                maker.flickr8k("photos", name, noise, seed)
                for noise in (0.0, NOISE)
                for name in (BASELINE, "SimCon")
            ]
        planned += [maker.recipe(recipe, seed) for recipe in RECIPES]
        planned += [maker.batch(name, b, seed) for b in BATCHES for name in (BASELINE, FULL)]
    unused = set(maker.overrides) - maker.found
    if unused:
        raise UserError(f"--set=config.{sorted(unused)[0]}: no run's config has that field")
    return _merged(planned)


def count_runs(source: str, seeds: int, sweep_seeds: int) -> int:
    """How many runs the whole plan has for a source."""
    if source == "flickr8k_features":
        return seeds * 2 * len(NOISES)
    if source == "flickr8k_photos":
        return min(seeds, sweep_seeds) * 2 * 2
    if source in VARIANTS:
        return seeds
    if source == "glyphs_exchanged":
        return min(seeds, sweep_seeds) * 3
    ablation = len(METHODS) + 2 * (len(NOISES) - 1)
    # One recipe and one batch size are the ablation's own.
    sweeps = len(RECIPES) - 1 + 2 * len(set(BATCHES) - {BATCH})
    return seeds * ablation + min(seeds, sweep_seeds) * sweeps


def _merged(planned: Sequence[harness.Task]) -> list[harness.Task]:
    """Tasks that would run the same config as one task that stands in several places."""
    merged: dict[tuple, harness.Task] = {}
    for task in planned:
        place = (task.name, task.seed, task.fingerprint())
        before = merged.get(place, task._replace(conditions=()))
        new = tuple(c for c in task.conditions if c not in before.conditions)
        merged[place] = before._replace(conditions=before.conditions + new)
    return list(merged.values())


class _Maker:
    """Makes tasks of one invocation's data and overrides."""

    def __init__(self, data: str, overrides: dict, validation: bool):
        self.data, self.overrides, self.validation = data, overrides, validation
        self.found: set[str] = set()

    def glyphs(self, name: str, noise: float, seed: int) -> harness.Task:
        """A row of the ablation on glyph scenes."""
        return self._task(name, self._glyphs(name, noise, seed), "glyphs", noise)

    def variant(self, source: str, seed: int) -> harness.Task:
        """One of VARIANTS."""
        config = self._glyphs(FULL, max(NOISES), seed)
        _switch(config, source, VARIANTS[source][1])
        return self._task(FULL, config, source, max(NOISES))

    def exchanged(self, name: str, seed: int) -> harness.Task:
        """The most noise, but all of it other scenes' captions: none is generic or cut short."""
        config = self._glyphs(name, 0.0, seed)
        config.data.update({"caption_shuffle": max(NOISES), "label_seed": seed})
        return self._task(name, config, "glyphs_exchanged", max(NOISES))

    def recipe(self, recipe: str, seed: int) -> harness.Task:
        """SimCon with the anchor's own similarity or without it, tau learned or not."""
        config, switches = self._glyphs("SimCon", NOISE, seed), dict(RECIPES[recipe])
        if switches.pop("tau") == "fixed":
            config.optimizer.freeze = (*config.optimizer.freeze, "logit_scale$")
        _switch(config, recipe, switches)
        return self._task("SimCon", config, "glyphs", NOISE, recipe=recipe)

    def batch(self, name: str, batch: int, seed: int) -> harness.Task:
        """Another batch size for as many epochs; the learning rate goes with its square root."""
        config = self._glyphs(name, NOISE, seed)
        ratio = batch / config.data.batch_size
        config.optimizer.learning_rate *= math.pow(ratio, _RATE_POWER)
        config.data.batch_size = batch
        return self._task(name, config, "glyphs", NOISE)

    def flickr8k(self, kind: str, name: str, noise: float, seed: int) -> harness.Task:
        """Two towers on Flickr8k's photos, or on precomputed region "features" of them."""
        loss, switches = METHODS[name]
        if kind == "features":
            config = common.simcon(lit_flickr8k.get_config(str(Path(self.data) / FEATURES)), loss)
            config.loss.update(common.SHORT_RUN)
        else:
            config = simcon_flickr8k.get_config(f"{loss},{Path(self.data) / PHOTOS}")
        config.data.caption_shuffle = noise
        # The captions that are exchanged.
        config.data.label_seed = seed
        if self.validation:
            config.data.holdout = 0.1
        config = self._finish(config, name, seed, switches)
        return self._task(name, config, f"flickr8k_{kind}", noise)

    def _glyphs(self, name: str, noise: float, seed: int) -> ConfigDict:
        loss, switches = METHODS[name]
        config = simcon_glyphs.get_config(f"{loss},{noise}")
        if self.validation:
            config.data.options.seed += _VALIDATION_SCENES
        return self._finish(config, name, seed, switches)

    def _finish(self, config: ConfigDict, name: str, seed: int, switches: dict) -> ConfigDict:
        config.seed = seed
        self.found |= harness.apply_overrides(config, self.overrides)
        _switch(config, name, switches)
        return config

    def _task(self, name: str, config: ConfigDict, source: str, noise: float, **more: str):
        batch = config.data.batch_size
        condition = {"source": source, "noise": noise, "batch": batch, **more}
        return harness.Task(name, (condition,), config.seed, config, measure.training_curve)


def _switch(config: ConfigDict, name: str, switches: Mapping[str, Any]) -> None:
    unknown = set(switches) - harness.apply_overrides(config, switches)
    if unknown:
        raise UserError(f"the row {name} sets {sorted(unknown)[0]}, which its config lacks")

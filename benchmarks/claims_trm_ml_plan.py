"""Which runs the claims of TRM-ML need: the project's own config files, with one row's switches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import harness, measures
from configs import coco_features, common, demo, dualcoop_demo
from trm_jax.types import UserError

KNOWN = {"glyphs": (0.1, 0.3, 0.5), "coco_features": (0.1, 0.3, 0.5, 1.0)}
AVERAGED = (0.1, 0.3, 0.5)  # the paper averages 10 % to 90 %

_NO_DISTILLATION = {"loss.distillation_weight": 0.0}
_NO_CONTRAST = {"loss.contrastive_weight": 0.0}
_NO_PSEUDO_LABELS = {"memory.pseudo_labels": "none"}

# The rows of Table 3. +KD is CARL with distillation, +MMCP and +MMCL are CARL with one of them.
ABLATION: dict[str, dict[str, Any]] = {
    "TRM-ML": {},
    "baseline": {"model.options.region_attention": False},
    "+CARL": {**_NO_DISTILLATION, **_NO_CONTRAST, **_NO_PSEUDO_LABELS},
    "+KD": {**_NO_CONTRAST, **_NO_PSEUDO_LABELS},
    "+MMCP": {**_NO_DISTILLATION, **_NO_CONTRAST},
    "+MMCL": {**_NO_DISTILLATION, **_NO_PSEUDO_LABELS},
}
# Table 6, with distillation and without MMCL; its row "none" is +KD.
MEMORY: dict[str, dict[str, Any]] = {
    f"memory: {kind}": {**_NO_CONTRAST, "memory.pseudo_labels": kind}
    for kind in ("text", "visual", "both")
}
# What "our optimizer" means for DualCoOp; decay and freeze name its own parameters.
_OPTIMIZER = (
    "name",
    "learning_rate",
    "schedule",
    "warmup_epochs",
    "warmup_rate",
    "weight_decay",
    "b2",
    "clip",
    "ema",
)


def tasks(
    *,
    seeds: int,
    cache_dir: Path,
    data: str = "",
    lit: str = "",
    overrides: Mapping[str, Any] | None = None,
    validation: bool = False,
) -> list[harness.Task]:
    """All runs in the order in which they are worth having.

    10 % first, seed by seed, so that what is finished is balanced; Table 6 last.

    Args:
      seeds: 0, 1, .. of every row.
      cache_dir: of the frozen towers' features, shared by all runs.
      data: folder of coco_dense/ and coco_subset/.
      lit: weights of the joint space of coco_features; "" leaves that source out.
      overrides: dotted config fields, set wherever a run has them, before a row's own.
      validation: measure on 20 % of the training images.

    Raises:
      UserError: an override that no run has, or missing data.
    """
    maker = _Maker(str(cache_dir), data, lit, dict(overrides or {}), validation)
    sources = ["glyphs"] + (["coco_features"] if lit else [])
    if lit and not data:
        raise UserError("--data is empty: give the folder of coco_dense/ and coco_subset/")
    planned: list[harness.Task] = []
    for known in sorted({known for source in sources for known in KNOWN[source]}):
        for seed in range(seeds):
            for source in (s for s in sources if known in KNOWN[s]):
                planned += maker.main_rows(source, known, seed)
                if seed == 0 and known == KNOWN[source][0]:
                    planned += maker.zero_shot(source)
    for seed in range(seeds):
        for source in sources:
            planned += maker.memory_rows(source, KNOWN[source][0], seed)
    unused = set(maker.overrides) - maker.found
    if unused:
        raise UserError(f"--set=config.{sorted(unused)[0]}: no run's config has that field")
    return planned


def count_runs(source: str, seeds: int) -> int:
    """How many runs the whole plan has for a source."""
    per_fraction = len(ABLATION) + 2 + (1 if source == "glyphs" else 2)
    return seeds * (per_fraction * len(KNOWN[source]) + len(MEMORY)) + 2


class _Maker:
    """Makes tasks of one invocation's data, weights and overrides."""

    def __init__(self, cache_dir: str, data: str, lit: str, overrides: dict, validation: bool):
        self.cache_dir, self.data, self.lit = cache_dir, data, lit
        self.overrides, self.validation = overrides, validation
        self.found: set[str] = set()

    def main_rows(self, source: str, known: float, seed: int) -> list[harness.Task]:
        """The ablation, DualCoOp in both recipes, logistic regression; the claim's rows first."""
        condition = {"source": source, "known": known}
        rows = {name: self._trained(name, condition, seed, ABLATION[name]) for name in ABLATION}
        peers = [self._dualcoop(condition, seed, recipe) for recipe in ("own", "ours")]
        config = self._config(source, known, seed)
        logistic = [
            harness.Task(
                "logistic regression",
                (condition,),
                seed,
                config,
                measures.logistic,
                ("data.", "model.clip."),
            )
        ]
        if source == "coco_features":
            logistic.append(
                harness.Task(
                    "logistic regression (raw features)",
                    (condition,),
                    seed,
                    config,
                    measures.logistic_raw,
                    ("data.",),
                )
            )
        return [rows.pop("TRM-ML"), *peers, rows.pop("baseline"), *rows.values(), *logistic]

    def zero_shot(self, source: str) -> list[harness.Task]:
        """Both poolings; no label is used, so each value stands beside every known fraction."""
        config = self._config(source, KNOWN[source][0], 0)
        pools = {"global": measures.zero_shot_global, "max": measures.zero_shot_max}
        return [
            harness.Task(
                "zero-shot",
                tuple({"source": source, "known": k, "recipe": pool} for k in KNOWN[source]),
                None,
                config,
                measure,
                ("data.", "model.clip.", "evaluate."),
            )
            for pool, measure in pools.items()
        ]

    def memory_rows(self, source: str, known: float, seed: int) -> list[harness.Task]:
        """Table 6: who may give pseudo-labels."""
        condition = {"source": source, "known": known}
        return [self._trained(name, condition, seed, MEMORY[name]) for name in MEMORY]

    def _trained(self, name, condition, seed, switches) -> harness.Task:
        config = self._config(condition["source"], condition["known"], seed)
        unknown = set(switches) - harness.apply_overrides(config, switches)
        if unknown:
            raise UserError(f"the row {name} sets {sorted(unknown)[0]}, which its config lacks")
        return harness.Task(name, (condition,), seed, config, measures.training)

    def _dualcoop(self, condition, seed, recipe) -> harness.Task:
        source, known = condition["source"], condition["known"]
        if source == "glyphs":
            config = dualcoop_demo.get_config(f"{recipe},{known}")
        else:
            config = coco_features.get_config(f"{known},dualcoop")
            if recipe == "ours":
                _take_recipe(config, coco_features.get_config(str(known)))
        config = self._finish(config, source, seed)
        return harness.Task(
            "DualCoOp", ({**condition, "recipe": recipe},), seed, config, measures.training
        )

    def _config(self, source: str, known: float, seed: int) -> ConfigDict:
        module = demo if source == "glyphs" else coco_features
        return self._finish(module.get_config(str(known)), source, seed)

    def _finish(self, config: ConfigDict, source: str, seed: int) -> ConfigDict:
        """Data, seed and the invocation's overrides on a config file's result."""
        config.seed = config.data.label_seed = seed
        config.data.cache_dir = self.cache_dir
        if source == "coco_features":
            config.model.pretrained = self.lit
            config.data.root = str(Path(self.data) / "coco_dense")
            config.data.options.annotations = str(Path(self.data) / "coco_subset")
        if self.validation:
            config.data.holdout = 0.2
        self.found |= harness.apply_overrides(config, self.overrides)
        return config


def _take_recipe(config: ConfigDict, reference: ConfigDict) -> None:
    """DualCoOp with TRM-ML's optimizer, batch and epochs; the loss as in the demo's "ours"."""
    common.our_recipe(config)
    config.prompts = reference.prompts
    for field in _OPTIMIZER:
        config.optimizer[field] = reference.optimizer[field]
    config.data.batch_size = reference.data.batch_size
    config.train.epochs = reference.train.epochs

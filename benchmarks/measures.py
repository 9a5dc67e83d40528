"""What a worker measures: a training run, zero-shot recognition, logistic regression.

All three see the same data, the same label mask and the same frozen features: those of the config.
"""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from trm_jax.data import pipeline
from trm_jax.data.sources.base import Source
from trm_jax.evaluate import multilabel, zero_shot
from trm_jax.models.clip import towers
from trm_jax.train import datasets, experiment, metrics, runner, workdirs

REGULARIZATION = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5


def training(config: ConfigDict, folder: Path) -> dict[str, float]:
    """Trains by the config; the last and the best mAP, pseudo-label quality of the last epoch.

    One log interval is one epoch, so that the last training line of metrics.jsonl covers exactly
    the last epoch. All values but "seconds" are in per cent.
    """
    config = config.copy_and_resolve_references()
    source, _, _ = datasets.open_data(config.data)
    per_epoch = pipeline.steps_per_epoch(len(source), config.data.batch_size)
    config.train.update({"log_every": per_epoch, "eval_every": per_epoch, "checkpoint_every": 0})
    config.evaluate.pictures = 0
    final = runner.train(config, str(folder))
    lines = metrics.read_lines(folder / "metrics.jsonl")
    last = [line for line in lines if line["split"] == "train"][-1]
    values = {"mAP": final["mAP"], "mAP_best": final["mAP_best"]}
    values |= {k: 100.0 * v for k, v in last.items() if k.startswith("pseudo_")}
    values["seconds"] = workdirs.read_json(folder / "run.json")["wall_seconds"]
    return values


def zero_shot_global(config: ConfigDict, folder: Path) -> dict[str, float]:
    """mAP of cosines between "a photo of a {name}." and the towers' own image embedding."""
    return _zero_shot(config, folder, "global")


def zero_shot_max(config: ConfigDict, folder: Path) -> dict[str, float]:
    """As `zero_shot_global`, with the highest cosine over the positions."""
    return _zero_shot(config, folder, "max")


def logistic(config: ConfigDict, folder: Path) -> dict[str, float]:
    """mAP of one logistic regression per class on the frozen towers' pooled dense features."""
    built = experiment.build(config, cache_dir=Path(config.data.cache_dir or folder / "features"))
    observed = np.asarray(built.observed)
    return fit_and_test(
        pooled(built.train, "dense"), observed, pooled(built.test, "dense"), built.test.labels
    )


def logistic_raw(config: ConfigDict, folder: Path) -> dict[str, float]:
    """As `logistic`, on the precomputed features themselves, before any tower."""
    del folder
    train, test, _ = datasets.open_data(config.data)
    observed = datasets.observed_labels(config.data, train)
    return fit_and_test(pooled(train, "features"), observed, pooled(test, "features"), test.labels)


def pooled(source: Source, name: str) -> np.ndarray:
    """[N, 2 D] float64: mean and maximum over the positions of the features `name`."""
    rows = []
    for index in range(len(source)):
        features = np.asarray(source.read(index)[name], np.float64)
        rows.append(np.concatenate([features.mean(axis=0), features.max(axis=0)]))
    return np.stack(rows)


def fit_and_test(
    features: np.ndarray, observed: np.ndarray, test_features: np.ndarray, truth: np.ndarray
) -> dict[str, float]:
    """Logistic regression per class on its known labels; C by cross-validation of the mAP.

    Args:
      features: [N, D] of the training images.
      observed: [N, C] in {-1, 0, 1}; unknown entries (0) are never looked at.
      test_features: [M, D].
      truth: [M, C] in {-1, 1}.

    Returns:
      {"mAP", "regularization"}: the test mAP and the chosen C. A class without a known positive
      or a known negative gives every image the same score.
    """
    scaler = StandardScaler().fit(features)
    features, test_features = scaler.transform(features), scaler.transform(test_features)
    folds = np.random.default_rng(0).permutation(len(features)) % FOLDS
    quality = {}
    for strength in REGULARIZATION:
        scores = np.zeros(observed.shape)
        for fold in range(FOLDS):
            held = folds == fold
            scores[held] = class_scores(features[~held], observed[~held], features[held], strength)
        quality[strength] = multilabel.mean_average_precision(scores, observed)
    best = max(quality, key=lambda strength: quality[strength])
    scores = class_scores(features, observed, test_features, best)
    return {"mAP": multilabel.mean_average_precision(scores, truth), "regularization": best}


def class_scores(
    features: np.ndarray, observed: np.ndarray, test_features: np.ndarray, strength: float
) -> np.ndarray:
    """[M, C] decision values of one logistic regression per class; 0 where none can be fitted."""
    scores = np.zeros((len(test_features), observed.shape[1]))
    for column, labels in enumerate(observed.T):
        known = labels != 0
        if len(np.unique(labels[known])) < 2:
            continue
        model = LogisticRegression(C=strength, max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features[known], labels[known])
        scores[:, column] = model.decision_function(test_features)
    return scores


def _zero_shot(config: ConfigDict, folder: Path, pool: str) -> dict[str, float]:
    built = experiment.build(config, cache_dir=Path(config.data.cache_dir or folder / "features"))
    params, _ = built.job.init()
    model = towers.build(built.clip)
    embed = jax.jit(lambda tokens: model.apply(params["clip"], tokens, method="encode_text"))
    names = [name.replace("_", " ") for name in built.info.class_names]
    classes = zero_shot.class_embeddings(
        embed,
        built.tokenizer,
        names,
        tuple(config.evaluate.templates),
        length=built.clip["text"]["context_length"],
    )
    samples = [built.test.read(index) for index in range(len(built.test))]
    score = jax.jit(
        lambda sample: zero_shot.scores(
            classes, sample["global_embedding"][None], sample["dense"][None], pool=pool
        )
    )
    scores = np.concatenate([np.asarray(score(jax.tree.map(jnp.asarray, s))) for s in samples])
    return {"mAP": multilabel.mean_average_precision(scores, built.test.labels)}

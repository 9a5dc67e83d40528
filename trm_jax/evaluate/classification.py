"""Zero-shot classification: the ImageNet protocol, top-1 and top-5 accuracy from embeddings.

The classes come from `zero_shot.class_embeddings`, with any templates. Of equal cosines the first
class ranks higher, so that equal class embeddings give chance order and never 100 %.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from trm_jax.types import Array, Batch, UserError

_LEVELS = (1, 5)


def evaluate(
    embed_image: Callable[[Batch], dict[str, Any]],
    classes: ArrayLike,
    batches: Iterable[Batch],
    *,
    to_host: Callable[[Any], Any] = jax.device_get,
) -> dict[str, float]:
    """top1 and top5: the share of images whose class is among the nearest, in per cent.

    Args:
        embed_image: batch -> {"embedding": [n, d], ..}; any scale, jitted, parameters bound.
        classes: [C, d], any scale.
        batches: dicts with "truth", int [n] (the class) or [n, C] in {-1, 0, 1} (an image counts
            as right if any class that it has is among the nearest); and, where there is padding,
            valid [n] bool.
        to_host: see `evaluate.multilabel.evaluate`.

    Raises:
        UserError: no valid row, no truth, a truth without a class or one that is none of the C,
            or an embedding that is not finite.
    """
    classes, found = np.asarray(classes, np.float32), []
    pending = None
    for batch in batches:
        if "truth" not in batch:
            raise UserError(f"the evaluation batches have no 'truth'; they have {sorted(batch)}")
        truth = batch["truth"]
        if truth.ndim == 2 and truth.shape[1] != len(classes):
            raise UserError(
                f"{len(classes)} class embeddings for the {truth.shape[1]} classes of the data"
            )
        part = {"rank": _ranks(embed_image(batch)["embedding"], classes, truth)}
        part["valid"] = batch.get("valid", np.ones(len(truth), bool))
        # One behind: the device never waits.
        if pending is not None:
            found.append(_fetch(pending, to_host))
        pending = part
    if pending is not None:
        found.append(_fetch(pending, to_host))
    rank = np.concatenate(found) if found else np.zeros(0, np.int32)
    if not len(rank):
        raise UserError("the evaluation set has no valid row: check data.root and the split")
    return {f"top{k}": 100.0 * float((rank < k).mean()) for k in _LEVELS}


def _fetch(part: dict[str, Any], to_host: Callable[[Any], Any]) -> np.ndarray:
    """Ranks of the valid rows of one batch."""
    host = {name: np.asarray(array) for name, array in to_host(part).items()}
    rank = host["rank"][host["valid"].astype(bool)]
    if (rank == -1).any():
        raise UserError(
            f"{int((rank == -1).sum())} images of the evaluation set have no class among the "
            "class embeddings: check the labels and the class names"
        )
    if (rank == -2).any():
        raise UserError(
            f"{int((rank == -2).sum())} image embeddings are not finite: the model diverged or "
            "precision.compute is too low; evaluate an earlier checkpoint"
        )
    return rank


@jax.jit
def _ranks(embedding: ArrayLike, classes: ArrayLike, truth: ArrayLike) -> Array:
    """0-based rank [n] of the best-ranked true class; -1 without one, -2 if not finite."""
    cosines = jnp.matmul(_unit(embedding), _unit(classes).T, precision="highest")
    truth = jnp.asarray(truth)
    columns = jnp.arange(cosines.shape[1])[None, :]
    right = truth == 1 if truth.ndim == 2 else columns == truth[:, None]
    best = jnp.where(right, cosines, -jnp.inf)
    value, first = best.max(axis=1, keepdims=True), best.argmax(axis=1)[:, None]
    rank = ((cosines > value) | ((cosines == value) & (columns < first))).sum(axis=1)
    rank = jnp.where(right.any(axis=1), rank, -1)
    return jnp.where(jnp.isfinite(cosines).all(axis=1), rank, -2)


def _unit(vectors: ArrayLike) -> Array:
    """Rows at length 1, in float32; a zero row stays zero."""
    vectors = jnp.asarray(vectors, jnp.float32)
    return vectors * jax.lax.rsqrt(jnp.square(vectors).sum(axis=-1, keepdims=True) + 1e-12)

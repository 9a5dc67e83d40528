"""Retrieval by scores of pairs, for models that read an image's regions with a caption's words.

Both sides are encoded once; then blocks of images meet blocks of captions. The memory on the device
is that of all encoded images and of one block of captions and scores.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from trm_jax.evaluate import retrieval
from trm_jax.types import Batch, UserError


class Scores(NamedTuple):
    """All pair scores of an evaluation set.

    scores: float32 [n_images, n_texts], images and texts in the order of the source.
    image_of_text: [n_texts] rows of `scores`.
    images: [n_images] positions in the source.
    """

    scores: np.ndarray
    image_of_text: np.ndarray
    images: np.ndarray


def score_all(
    embed_image: Callable[[Batch], dict[str, Any]],
    embed_text: Callable[[Batch], dict[str, Any]],
    pair_scores: Callable[[Batch], dict[str, Any]],
    image_batches: Iterable[Batch],
    text_batches: Iterable[Batch],
    *,
    to_host: Callable[[Any], Any] = jax.device_get,
) -> Scores:
    """Scores every image of the first with every caption of the second.

    Args:
      embed_image, embed_text: batch -> encoded arrays, which stay on the device.
      pair_scores: both sides' arrays -> {"scores": [n, m]}. All three jitted, parameters bound.
      image_batches: dicts with index [n], the image's position in the source, and valid [n].
      text_batches: dicts with index [m], the caption's place in the order of the source,
        image_index [m], its image's position, and valid [m].
      to_host: see `evaluate.multilabel.evaluate`.

    Raises:
      UserError: no valid image or caption, one twice, or a caption of an image that is not there.
    """
    sides = [(embed_image(batch), _keys(batch, to_host, "index")) for batch in image_batches]
    positions = np.concatenate([keys["index"][keys["valid"]] for _, keys in sides])
    images = np.unique(positions)
    if not len(images) or len(images) != len(positions):
        raise UserError("the evaluation set has no readable image, or one of them twice")
    numbers, owners, columns = [], [], []
    for batch in text_batches:
        keys = _keys(batch, to_host, "index", "image_index")
        known = keys["valid"] & np.isin(keys["image_index"], images)
        if strange := np.flatnonzero(keys["valid"] & ~known).tolist():
            raise UserError(
                f"caption {keys['index'][strange[0]]} describes image "
                f"{keys['image_index'][strange[0]]}, which cannot be read; leave both out of the "
                "evaluation split"
            )
        texts = embed_text(batch)
        block = np.zeros((len(images), int(known.sum())), np.float32)
        for encoded, of in sides:
            found = to_host(pair_scores({**encoded, **texts})["scores"])
            rows = np.searchsorted(images, of["index"][of["valid"]])
            block[rows] = np.asarray(found)[of["valid"]][:, known]
        numbers.append(keys["index"][known])
        owners.append(keys["image_index"][known])
        columns.append(block)
    if not sum(map(len, numbers)):
        raise UserError("the evaluation set has no captions: check data.root and the split")
    order = np.argsort(np.concatenate(numbers), kind="stable")
    owner = np.searchsorted(images, np.concatenate(owners)[order])
    return Scores(np.concatenate(columns, axis=1)[:, order], owner, images)


def metrics(found: Scores, *, folds: int = 1) -> dict[str, float]:
    """Recalls of the scores, see `retrieval.folded_recalls`; images without a caption are left out.

    Raises:
      UserError: as `retrieval.ranks`, or `folds` does not divide the images.
    """
    captioned, owner = np.unique(found.image_of_text, return_inverse=True)
    return retrieval.folded_recalls(found.scores[captioned], owner, folds=folds)


def ensemble(parts: Iterable[Scores]) -> Scores:
    """The mean of several models' scores of the same pairs (SGRAF: of SGR and SAF).

    Raises:
      UserError: the models were not evaluated on the same images and captions.
    """
    first, *others = parts
    total = first.scores.astype(np.float64)
    for other in others:
        if not (
            np.array_equal(first.images, other.images)
            and np.array_equal(first.image_of_text, other.image_of_text)
        ):
            raise UserError("an ensemble needs the same images and captions for all of its runs")
        total = total + other.scores
    return first._replace(scores=(total / (1 + len(others))).astype(np.float32))


def _keys(batch: Batch, to_host, *names: str) -> dict[str, np.ndarray]:
    found = to_host({name: batch[name] for name in (*names, "valid")})
    return {name: np.asarray(array) for name, array in found.items()}

"""Scores of all pairs in blocks: every score in its place, whatever the order and the padding."""

import numpy as np
import pytest

from trm_jax.evaluate import pair_scores, retrieval
from trm_jax.types import UserError

OWNER = np.asarray([0, 0, 1, 3, 3, 3, 4])  # image 2 has no caption
RNG = np.random.default_rng(0)
IMAGES, TEXTS = RNG.normal(size=(5, 3)), RNG.normal(size=(7, 3))


def _batches(keys, order, size):
    """Rows of `keys` in `order`, `size` at a time; what fills up the last batch is not valid."""
    order = np.asarray(order)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        padded = np.pad(rows, (0, size - len(rows)))
        yield {
            **{name: array[padded] for name, array in keys.items()},
            "valid": np.arange(size) < len(rows),
        }


def _score_all(images=range(5), texts=(6, 0, 3, 1, 5, 2, 4), owner=OWNER, size=3):
    return pair_scores.score_all(
        lambda batch: {"regions": batch["rows"]},
        lambda batch: {"words": batch["rows"]},
        lambda both: {"scores": np.tanh(both["regions"] @ both["words"].T)},
        _batches({"index": np.arange(5), "rows": IMAGES}, images, size),
        _batches({"index": np.arange(7), "image_index": owner, "rows": TEXTS}, texts, size),
        to_host=lambda tree: tree,
    )


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("images", [range(5), (4, 1, 0, 3, 2)])
def test_every_score_is_in_its_place(size, images):
    found = _score_all(images, size=size)
    np.testing.assert_allclose(found.scores, np.tanh(IMAGES @ TEXTS.T), rtol=1e-6)
    np.testing.assert_array_equal(found.image_of_text, OWNER)


def test_images_without_a_caption_are_no_candidates():
    kept = [0, 1, 3, 4]
    wanted = retrieval.recalls(np.tanh(IMAGES @ TEXTS.T)[kept], np.searchsorted(kept, OWNER))
    assert pair_scores.metrics(_score_all()) == pytest.approx(wanted)


def test_an_unreadable_image_with_captions_is_an_error():
    with pytest.raises(UserError, match=r"caption \d describes image 3, which cannot be read"):
        _score_all(images=(0, 1, 2, 4))
    with pytest.raises(UserError, match="one of them twice"):
        _score_all(images=(0, 1, 2, 3, 4, 4))
    # An image without a caption may be unreadable.
    found = _score_all(images=(0, 1, 3, 4))
    np.testing.assert_array_equal(found.image_of_text, [0, 0, 1, 2, 2, 2, 3])


def test_an_ensemble_is_the_mean_of_the_scores():
    one = _score_all()
    other = one._replace(scores=-3 * one.scores)
    np.testing.assert_allclose(pair_scores.ensemble([one, other]).scores, -one.scores, rtol=1e-6)
    with pytest.raises(UserError, match="same images"):
        pair_scores.ensemble([one, one._replace(images=one.images[::-1])])

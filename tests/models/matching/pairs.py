"""Random images and captions as the scorers take them."""

import numpy as np

from trm_jax.models.matching.attention import columns, similarities


def unit(x):
    """Rows of unit norm."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pairs(lengths, *, images, regions, width, related=0.0, seed=0, dtype=np.float32):
    """(regions [n, r, d], words [m, T, d], mask [m, T]) with captions of these lengths.

    Args:
      lengths: words of each caption; 0 is possible.
      images, regions, width: n, r, d.
      related: how much word t of caption i is like region t mod r of image i.
      seed, dtype: of the numbers.
    """
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(images, regions, width)))
    mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    noise = unit(rng.normal(size=(*mask.shape, width)))
    own = vectors[np.arange(len(lengths)) % images][:, np.arange(mask.shape[1]) % regions]
    words = unit(related * own + noise) * mask[..., None]
    return vectors.astype(dtype), words.astype(dtype), mask


def padded(words, mask, extra=2):
    """The same captions with more padding, which holds NaN everywhere."""
    words = np.where(mask[..., None], words, np.nan)
    words = np.pad(words, ((0, 0), (0, extra), (0, 0)), constant_values=np.nan)
    return words.astype(np.float32), np.pad(mask, ((0, 0), (0, extra)))


def least_gap(regions, words, mask, level=0.0):
    """How far similarities stay from `level`: from 0, where LeakyReLU bends, or a threshold."""
    found = np.abs(np.asarray(similarities(regions, columns(words))) - level)
    return found.transpose(3, 2, 0, 1)[mask].min()

"""SCAN: an image and a caption match as well as their regions and words explain each other.

Source: Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV 2018.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from trm_jax.models import AnyArray
from trm_jax.models.matching.attention import (
    Prepared,
    attended_cosine,
    attention,
    prepare,
    prepare_words,
    similarities,
)
from trm_jax.types import UserError

# Of each direction: lambda of the softmax, lambda of LogSumExp. The paper has 20 for the second of
# i2t on COCO.
SCALES = {"t2i": (9.0, 6.0), "i2t": (4.0, 5.0)}


class Scan(nn.Module):
    """Scores of all pairs of images and captions; no parameters.

    "t2i" (Eq. 8-10): every word attends to the regions; the similarities of words and regions are
    rectified and normalised over the caption's words, the softmax is over the regions. A word's
    relevance is its cosine with what it attends to, and the score pools the words. "i2t" (Eq. 1-5)
    is the same with regions and words exchanged.

    Attributes:
      direction: "t2i" or "i2t".
      pooling: "mean", or "lse": log(sum exp(lse_scale R)) / lse_scale, which may exceed 1.
      attention_scale: lambda of the softmax; None: 9 for t2i, 4 for i2t.
      lse_scale: lambda of the pooling; None: 6 for t2i, 5 for i2t.
    """

    direction: str = "t2i"
    pooling: str = "mean"
    attention_scale: float | None = None
    lse_scale: float | None = None

    @nn.compact
    def __call__(
        self,
        regions: Float[AnyArray, "n r d"] | Prepared,
        words: Float[AnyArray, "m T d"] | Prepared,
        mask: Bool[AnyArray, "m T"],
        *,
        train: bool = False,
    ) -> Float[Array, "n m"]:
        """Scores; 0 for a caption without words.

        Args:
          regions: of unit norm.
          words: of unit norm; padding is never read. Both may be prepared, once for many pairs.
          mask: true at the real words of a caption.
          train: training and evaluation do not differ.

        Raises:
          UserError: the direction or the pooling is unknown.
        """
        del train
        if self.direction not in SCALES:
            raise UserError(
                f"scorer.direction = {self.direction!r} must be one of {', '.join(SCALES)}"
            )
        scale, lse_scale = SCALES[self.direction]
        scale = scale if self.attention_scale is None else self.attention_scale
        lse_scale = lse_scale if self.lse_scale is None else self.lse_scale
        mask = jnp.asarray(mask)
        images, captions = prepare(regions), prepare_words(words, mask)
        if self.direction == "t2i":
            similarity = similarities(images.vectors, captions.columns)
            weights = attention(similarity, scale)
            relevance = attended_cosine(weights, similarity, images.gram)  # [n, T, m]
            scores = self._pool(relevance, mask.T[None], lse_scale)
        else:
            similarity = similarities(captions.vectors, images.columns)
            weights = attention(similarity, scale, mask)
            relevance = attended_cosine(weights, similarity, captions.gram)  # [m, r, n]
            scores = self._pool(relevance, jnp.ones((1, relevance.shape[1], 1), bool), lse_scale).T
        return jnp.where(mask.any(axis=1)[None], scores, 0.0)

    def _pool(self, relevance: Array, where: Array, lse_scale: float) -> Array:
        """[a, j, b] -> [a, b]."""
        if self.pooling == "mean":
            total = jnp.sum(relevance, axis=1, where=where)
            return total / jnp.maximum(where.sum(axis=1), 1)
        if self.pooling == "lse":
            where = jnp.broadcast_to(where, relevance.shape)
            return jax.nn.logsumexp(lse_scale * relevance, axis=1, where=where) / lse_scale
        raise UserError(f"scorer.pooling = {self.pooling!r} must be one of mean, lse")

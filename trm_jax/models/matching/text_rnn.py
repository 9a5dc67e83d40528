"""The text side of matching models: word embeddings and a bidirectional GRU.

Source: Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV 2018, Eq. 1-3; SGRAF
and NAAF read captions alike.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trm_jax.losses.cosine import normalize
from trm_jax.models import AnyArray
from trm_jax.types import Key


def symmetric_uniform(bound: float) -> nn.initializers.Initializer:
    """The initializer U(-bound, bound)."""

    def init(key: Key, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        del out_sharding  # part of the type, for explicit sharding alone
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class TextRnn(nn.Module):
    """Embedding, bidirectional GRU, mean of both directions, unit norm per word.

    The cell is Flax's GRUCell, whose reset gate multiplies W h + b as torch's does:
    n = tanh(W_in x + b_in + r (W_hn h + b_hn)). torch has a second bias in its other two gates,
    which adds to the first and so says nothing new; weights from torch are b_ir + b_hr and
    b_iz + b_hz here. Weights start as torch's do, U(-1/sqrt(d), 1/sqrt(d)), biases included.

    Attributes:
      vocab_size: rows of the embedding.
      features: d, the width of the joint space and of each direction.
      embedding: width of a word's embedding, which starts as U(-0.1, 0.1).
      dropout: of embeddings, in training (SGRAF 0.4).
      dtype: of the products; the state of the GRU and the norm are float32.
    """

    vocab_size: int
    features: int
    embedding: int = 300
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[AnyArray, "m T"], mask: Bool[AnyArray, "m T"], *, train: bool = False
    ) -> Float[Array, "m T d"]:
        """Word vectors of unit norm, float32, zero at padding.

        Args:
          tokens: ids below vocab_size.
          mask: true at the tokens of a text, which come first in its row.
          train: whether embeddings are dropped out; needs the random stream "dropout".
        """
        shape = (self.vocab_size, self.embedding)
        table = jnp.asarray(self.param("word_embedding", symmetric_uniform(0.1), shape))
        x = nn.Dropout(self.dropout, deterministic=not train)(table[tokens])
        both = nn.Bidirectional(
            nn.RNN(self._cell("forward")), nn.RNN(self._cell("backward")), merge_fn=_mean
        )
        # With its length, each text is read backwards from its last token, not from padding.
        states = jnp.asarray(both(x, seq_lengths=jnp.asarray(mask.sum(axis=1))))
        return jnp.where(mask[..., None], normalize(states), 0.0)

    def _cell(self, name: str) -> nn.GRUCell:
        init = symmetric_uniform(self.features**-0.5)
        return nn.GRUCell(
            self.features,
            kernel_init=init,
            recurrent_kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            name=name,
        )


def _mean(forward: Array, backward: Array) -> Array:
    return 0.5 * (forward + backward)

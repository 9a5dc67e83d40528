"""The prediction head between two views of an image.

Chen and He, "Exploring simple Siamese representation learning" (SimSiam), CVPR 2021.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from trm_jax.models import AnyArray


class SimSiamPredictor(nn.Module):
    """Linear to `hidden` without bias, BatchNorm over the global batch, ReLU, Linear back.

    Attributes:
      hidden: width of the bottleneck; a quarter of the embedding's in the paper.
    """

    hidden: int

    @nn.compact
    def __call__(
        self,
        embeddings: Float[AnyArray, "n d"],
        train: bool = False,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> Float[Array, "n d"]:
        """Predictions [n, d] float32, un-normalised.

        Args:
          embeddings: [n, d].
          train: use and update batch statistics (mutable=["batch_stats"]).
          where: [n], rows that count in them.
        """
        x = nn.Dense(self.hidden, use_bias=False, name="down")(embeddings.astype(jnp.float32))
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, use_fast_variance=False, name="norm"
        )
        mask = None if where is None else jnp.asarray(where)[:, None]
        x = nn.relu(norm(x, mask=mask))
        return nn.Dense(embeddings.shape[-1], name="up")(x)

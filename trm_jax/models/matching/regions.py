"""The image side of matching models: region features of a frozen detector, projected."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from trm_jax.losses.cosine import normalize
from trm_jax.models import AnyArray


class RegionEncoder(nn.Module):
    """Linear map of each region to the joint space, then unit norm.

    Source: Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV 2018, section 3.2.
    Weights start as its public program has them: Xavier uniform, biases zero.

    Attributes:
      features: d of the joint space.
      dtype: of the product; the norm is float32.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, regions: Float[AnyArray, "n r D"]) -> Float[Array, "n r d"]:
        """Region vectors of unit norm, float32; features of any float type."""
        init = nn.initializers.xavier_uniform()
        x = nn.Dense(self.features, dtype=self.dtype, kernel_init=init, name="projection")(regions)
        return normalize(x)

"""Projection head for precomputed features: an image tower whose backbone ran elsewhere."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from trm_jax.models import AnyArray
from trm_jax.models.clip.transformer import gelu, layer_norm
from trm_jax.types import UserError


class FeatureProjection(nn.Module):
    """Features of regions or grid cells -> (global embedding, dense embeddings).

    dense = skip(LN(x)) + fc2(GELU(fc1(LN(x)))) per region (locked-image tuning); the global
    embedding is the mean of the dense ones, or with pool="max_mean" half their mean plus half
    their element-wise maximum.

    Attributes:
      embed_dim: d of the joint space.
      width: D of the features.
      hidden: width of the hidden layer; 0 leaves the linear skip alone.
      skip: whether the linear skip exists.
      pool: "mean" or "max_mean".
      dtype: of the compute.
    """

    embed_dim: int
    width: int
    hidden: int
    skip: bool = True
    pool: str = "mean"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "n r D"], train: bool = False
    ) -> tuple[Float[Array, "n d"], Float[Array, "n r d"]]:
        """Returns the global embedding (float32) and the dense features (dtype).

        Raises:
          UserError: the features do not have `width` channels.
        """
        del train  # no dropout, no batch statistics
        if x.shape[-1] != self.width:
            raise UserError(
                f"model.clip.image.width is {self.width}, the data's features have {x.shape[-1]}"
            )
        x = layer_norm("ln")(x).astype(self.dtype)
        parts = []
        if self.skip or not self.hidden:
            parts.append(nn.Dense(self.embed_dim, dtype=self.dtype, name="skip")(x))
        if self.hidden:
            hidden = gelu(nn.Dense(self.hidden, dtype=self.dtype, name="fc1")(x))
            parts.append(nn.Dense(self.embed_dim, dtype=self.dtype, name="fc2")(hidden))
        dense = sum(parts[1:], start=parts[0])
        pooled = dense.astype(jnp.float32).mean(axis=1)
        if self.pool == "max_mean":
            pooled = 0.5 * pooled + 0.5 * dense.astype(jnp.float32).max(axis=1)
        return pooled, dense

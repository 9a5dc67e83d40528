"""CLIP's Vision Transformer with dense features from the last block's value path."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from trm_jax.models import AnyArray
from trm_jax.models.clip.positions import resize_grid
from trm_jax.models.clip.transformer import Block, layer_norm
from trm_jax.types import UserError


class VisionTransformer(nn.Module):
    """Normalised images -> (CLS embedding, dense patch embeddings), both in the joint space.

    The dense features skip the last block's token mixing: its attention is replaced by
    out_proj(v_proj(LN(x))) per token, residual and MLP kept, then ln_post and proj, so that each
    patch keeps its own content (MaskCLIP, Zhou et al. 2022).

    Attributes:
      embed_dim: d of the joint space.
      image_size: input side that the position embeddings belong to; other sizes resize them.
      patch_size, width, layers, heads, activation: as in CLIP.
      dtype: of the compute.
      attention: "xla" or "cudnn", see transformer.attend.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    activation: str
    dtype: Any = jnp.float32
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "n H W 3"], train: bool = False
    ) -> tuple[Float[Array, "n d"], Float[Array, "n hw d"]]:
        """Returns the pooled embedding (float32) and the dense features (dtype), un-normalised.

        Raises:
          UserError: H or W is no multiple of the patch size.
        """
        del train  # no dropout, no batch statistics
        patch, side = self.patch_size, self.image_size // self.patch_size
        if x.shape[1] % patch or x.shape[2] % patch:
            raise UserError(
                f"data.image_size: {x.shape[1]}x{x.shape[2]} is no multiple of the ViT's patch "
                f"size {patch}; choose one"
            )
        grid = (x.shape[1] // patch, x.shape[2] // patch)
        normal = nn.initializers.normal(self.width**-0.5)
        x = nn.Conv(
            self.width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name="conv1",
        )(x)
        x = x.reshape(x.shape[0], -1, self.width)
        cls = self.param("class_embedding", normal, (self.width,))
        positions = self.param("positional_embedding", normal, (side**2 + 1, self.width))
        cls = jnp.broadcast_to(cls.astype(self.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([cls, x], axis=1)
        x = x + resize_grid(positions, (side, side), grid).astype(self.dtype)[None]
        x = layer_norm("ln_pre")(x).astype(self.dtype)
        blocks = [
            Block(
                self.width,
                self.heads,
                self.layers,
                self.activation,
                self.dtype,
                self.attention,
                name=f"resblocks_{i}",
            )
            for i in range(self.layers)
        ]
        for block in blocks[:-1]:
            x = block(x)
        ln_post = layer_norm("ln_post")
        cls = ln_post(blocks[-1].read(x, jnp.zeros(x.shape[0], jnp.int32)))
        dense = ln_post(blocks[-1].value_path(x[:, 1:])).astype(self.dtype)
        if not self.embed_dim:
            return cls, dense
        proj = self.param("proj", normal, (self.width, self.embed_dim)).astype(self.dtype)
        return (cls.astype(self.dtype) @ proj).astype(jnp.float32), dense @ proj

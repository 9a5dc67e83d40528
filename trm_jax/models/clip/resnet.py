"""CLIP's ModifiedResNet: three-convolution stem, anti-aliased strides, attention pooling.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
section 2.4. Any number of stages; the total stride is 4 * 2^(stages - 1).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from trm_jax.models import AnyArray
from trm_jax.models.clip.positions import resize_grid
from trm_jax.models.clip.transformer import attend
from trm_jax.types import UserError


def average_pool(x: Float[AnyArray, "n h w c"], size: int) -> Float[Array, "n h2 w2 c"]:
    """Non-overlapping mean pooling; h and w are multiples of `size`.

    A reshape and a mean: the gradient of reduce_window is several times slower on CPU.
    """
    if size == 1:
        return jnp.asarray(x)
    n, h, w, c = x.shape
    return x.reshape(n, h // size, size, w // size, size, c).mean(axis=(2, 4))


def _conv(channels: int, size: int, dtype: Any, name: str, stride: int = 1) -> nn.Conv:
    return nn.Conv(
        channels,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


def _batch_norm(train: bool, dtype: Any, name: str, scale_init: Any = None) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        scale_init=scale_init or nn.initializers.ones,
        name=name,
    )


class Bottleneck(nn.Module):
    """1x1, 3x3, (mean pooling,) 1x1 with expansion 4; strides are mean pools, never skips."""

    planes: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """[n, h, w, c] -> [n, h / stride, w / stride, 4 * planes]."""
        out = _conv(self.planes, 1, self.dtype, "conv1")(x)
        out = nn.relu(_batch_norm(train, self.dtype, "bn1")(out))
        out = _conv(self.planes, 3, self.dtype, "conv2")(out)
        out = nn.relu(_batch_norm(train, self.dtype, "bn2")(out))
        out = _conv(4 * self.planes, 1, self.dtype, "conv3")(average_pool(out, self.stride))
        # CLIP starts every residual branch at zero.
        out = _batch_norm(train, self.dtype, "bn3", nn.initializers.zeros)(out)
        if self.stride > 1 or x.shape[-1] != 4 * self.planes:
            x = average_pool(x, self.stride)
            x = _conv(4 * self.planes, 1, self.dtype, "downsample_conv")(x)
            x = _batch_norm(train, self.dtype, "downsample_bn")(x)
        return nn.relu(out + x)


class AttentionPool(nn.Module):
    """One attention query, the mean position, over all positions; dense features beside it.

    Attributes:
      side: of the square grid that the position embeddings belong to.
      heads, embed_dim: attention heads and output width.
      dense_pos_embed: whether the dense features add the (resized) position embedding first.
      dtype: of the compute.
    """

    side: int
    heads: int
    embed_dim: int
    dense_pos_embed: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "n h w c"]) -> tuple[Array, Array]:
        """Returns (pooled [n, d], dense [n, hw, d] = c_proj(v_proj(x)) at every position)."""
        n, h, w, c = x.shape
        init = nn.initializers.normal(c**-0.5)

        def linear(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)

        q_proj, k_proj, v_proj = (linear(c, f"{name}_proj") for name in "qkv")
        c_proj = linear(self.embed_dim, "c_proj") if self.embed_dim else lambda y: y
        positions = self.param("positional_embedding", init, (self.side**2 + 1, c))
        positions = resize_grid(positions, (self.side, self.side), (h, w)).astype(self.dtype)
        plain = x.reshape(n, h * w, c)
        x = jnp.concatenate([plain.mean(axis=1, keepdims=True), plain], axis=1) + positions[None]
        heads = (n, -1, self.heads, c // self.heads)
        value = v_proj(x)
        pooled = attend(
            q_proj(x[:, :1]).reshape(heads), k_proj(x).reshape(heads), value.reshape(heads)
        )
        dense = value[:, 1:] if self.dense_pos_embed else v_proj(plain)
        return c_proj(pooled.reshape(n, c)), c_proj(dense)


class ModifiedResNet(nn.Module):
    """Normalised images -> (pooled embedding, dense features), both in the joint space.

    Attributes:
      embed_dim: d of the joint space.
      layers: bottlenecks of each stage.
      width: channels after the stem; the last stage has width * 4 * 2^(stages - 1).
      heads: of the attention pool.
      image_size: input side that the pool's position embeddings belong to.
      dense_pos_embed: see AttentionPool.
      dtype: of the compute.
    """

    embed_dim: int
    layers: tuple[int, ...]
    width: int
    heads: int
    image_size: int
    dense_pos_embed: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "n H W 3"], train: bool = False
    ) -> tuple[Float[Array, "n d"], Float[Array, "n hw d"]]:
        """Returns the pooled embedding (float32) and the dense features (dtype), un-normalised.

        Args:
          x: normalised images.
          train: use and update batch statistics (collection "batch_stats").

        Raises:
          UserError: H or W is no multiple of the total stride.
        """
        stride = 4 * 2 ** (len(self.layers) - 1)
        if x.shape[1] % stride or x.shape[2] % stride:
            raise UserError(
                f"data.image_size: {x.shape[1]}x{x.shape[2]} is no multiple of the ResNet's "
                f"stride {stride}; choose one"
            )
        for i, channels in enumerate((self.width // 2, self.width // 2, self.width), start=1):
            x = _conv(channels, 3, self.dtype, f"conv{i}", stride=2 if i == 1 else 1)(x)
            x = nn.relu(_batch_norm(train, self.dtype, f"bn{i}")(x))
        x = average_pool(x, 2)
        for stage, depth in enumerate(self.layers):
            for i in range(depth):
                down = 2 if stage > 0 and i == 0 else 1
                name = f"layer{stage + 1}_{i}"
                x = Bottleneck(self.width * 2**stage, down, self.dtype, name=name)(x, train)
        pooled, dense = AttentionPool(
            self.image_size // stride,
            self.heads,
            self.embed_dim,
            self.dense_pos_embed,
            self.dtype,
            name="attnpool",
        )(x)
        return pooled.astype(jnp.float32), dense

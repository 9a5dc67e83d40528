"""The parts of GroupViT: transformer blocks with stochastic depth, and the grouping of tokens.

Xu et al., "GroupViT: Semantic Segmentation Emerges from Text Supervision", CVPR 2022, section 3.1.

What is random is drawn for each example from a key of its own and the number of the part that
asks, never from the batch: an example gets the same noise alone, in a micro-batch and in the
recomputation of a backward pass.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from trm_jax.models import AnyArray
from trm_jax.models.clip.transformer import ACTIVATIONS, attend, layer_norm
from trm_jax.types import Key

INIT_STD = 0.02  # of the public model's weights


def gumbel_noise(
    keys: Shaped[Key, " n"], number: int | Int[AnyArray, ""], shape: tuple[int, ...]
) -> Float[Array, "n *shape"]:
    """Standard Gumbel noise, float32: example i draws from fold_in(keys[i], number)."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, number), shape))(keys)


def branch_factors(
    keys: Shaped[Key, " n"],
    number: int | Int[AnyArray, ""],
    rate: float | Float[AnyArray, ""],
) -> Float[Array, "n 2"]:
    """What stochastic depth multiplies both branches of a block with, float32.

    0 with probability `rate`, else 1 / (1 - rate), so that the expectation is 1 (Huang et al.,
    "Deep Networks with Stochastic Depth", 2016).

    Args:
      keys: of the examples.
      number: of the block.
      rate: in [0, 1).
    """

    def draw(key: Key) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, number), (2,))

    return (jax.vmap(draw)(keys) >= rate) / (1.0 - jnp.asarray(rate, jnp.float32))


def hard_assignment(
    logits: Float[AnyArray, "n G N"], noise: Float[AnyArray, "n G N"] | None = None
) -> Float[Array, "n G N"]:
    """Each token's group as exact zeros and ones, with the gradient of the softmax.

    Gumbel-softmax at temperature 1 with straight-through gradients (Jang et al. 2017), over the
    groups; GroupViT, Eq. 5 and 6. A tie goes to the first group.

    Args:
      logits: of groups and tokens, float32.
      noise: Gumbel noise of training; None takes the largest logit.
    """
    scores = logits if noise is None else logits + noise
    soft = jax.nn.softmax(scores, axis=-2)
    hard = jax.nn.one_hot(scores.argmax(axis=-2), scores.shape[-2], axis=-2, dtype=soft.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))  # the bracket is exactly zero


def linear(features: int, dtype: Any, name: str, initializer_range: float) -> nn.Dense:
    """A linear map with biases, which start as N(0, initializer_range^2) and zero."""
    return nn.Dense(
        features, dtype=dtype, kernel_init=nn.initializers.normal(initializer_range), name=name
    )


class Mlp(nn.Module):
    """hidden -> features over the last axis; with `tokens`, over the last but one."""

    hidden: int
    features: int
    activation: str
    dtype: Any = jnp.float32
    tokens: bool = False
    initializer_range: float = INIT_STD

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n, N, c] -> [n, N, features], or with `tokens` [n, features, c]."""
        x = x.swapaxes(1, 2) if self.tokens else x
        x = ACTIVATIONS[self.activation](
            linear(self.hidden, self.dtype, "fc1", self.initializer_range)(x)
        )
        x = linear(self.features, self.dtype, "fc2", self.initializer_range)(x)
        return x.swapaxes(1, 2) if self.tokens else x


class MultiHeadAttention(nn.Module):
    """Attention from queries to other tokens or to themselves, with biases."""

    width: int
    heads: int
    dtype: Any = jnp.float32
    kernel: str = "xla"
    initializer_range: float = INIT_STD

    @nn.compact
    def __call__(self, query: Float[AnyArray, "n q c"], tokens: Float[AnyArray, "n N c"]) -> Array:
        """[n, q, width]; `query` and `tokens` may be the same."""
        heads = (self.heads, self.width // self.heads)
        q = linear(self.width, self.dtype, "q_proj", self.initializer_range)(query).reshape(
            *query.shape[:2], *heads
        )
        k, v = (
            linear(self.width, self.dtype, name, self.initializer_range)(tokens).reshape(
                *tokens.shape[:2], *heads
            )
            for name in ("k_proj", "v_proj")
        )
        out = attend(q, k, v, None, self.kernel).reshape(query.shape)
        return linear(self.width, self.dtype, "out_proj", self.initializer_range)(out)


class EncoderBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), where stochastic depth may drop each branch.

    Attributes:
      width, heads, activation: as in GroupViT; the MLP's hidden layer has 4 width.
      dtype: of the compute; parameters, LayerNorm and softmax are float32.
      kernel: of the attention, see transformer.attend.
      initializer_range: see `linear`.
    """

    width: int
    heads: int
    activation: str
    dtype: Any = jnp.float32
    kernel: str = "xla"
    initializer_range: float = INIT_STD

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "n N c"], factors: Float[AnyArray, "n 2"] | None = None
    ) -> Float[Array, "n N c"]:
        """`factors` multiply the branches of each example, see `branch_factors`."""
        std = self.initializer_range
        attention = MultiHeadAttention(
            self.width, self.heads, self.dtype, self.kernel, std, name="attn"
        )
        mlp = Mlp(4 * self.width, self.width, self.activation, self.dtype, False, std, name="mlp")
        first, second = (None, None) if factors is None else (factors[:, 0], factors[:, 1])
        normed = layer_norm("norm1")(x).astype(self.dtype)
        x = jnp.asarray(x + _scaled(attention(normed, normed), first))
        return x + _scaled(mlp(layer_norm("norm2")(x)), second)


def _scaled(branch: Array, factor: AnyArray | None) -> Array:
    if factor is None:
        return branch
    return (branch * factor[:, None, None]).astype(branch.dtype)


class CrossBlock(nn.Module):
    """Queries look at tokens: x = q + attention(q, tokens); LN(x + MLP(LN(x)))."""

    width: int
    heads: int
    activation: str
    dtype: Any = jnp.float32
    initializer_range: float = INIT_STD

    @nn.compact
    def __call__(self, query: Array, tokens: Array) -> Float[Array, "n q c"]:
        """[n, q, width] in float32."""
        std = self.initializer_range
        attention = MultiHeadAttention(
            self.width, self.heads, self.dtype, initializer_range=std, name="attn"
        )
        x = query + attention(query.astype(self.dtype), tokens)
        mlp = Mlp(4 * self.width, self.width, self.activation, self.dtype, False, std, name="mlp")
        return layer_norm("norm_post")(x + mlp(layer_norm("norm2")(x)))


class Assignment(nn.Module):
    """Every token goes to one group, and a group gets the mean of its tokens (Eq. 3 to 7).

    The mean is sum / (count + 1), so that a group without tokens gets zero.
    """

    width: int
    dtype: Any = jnp.float32
    initializer_range: float = INIT_STD

    @nn.compact
    def __call__(
        self,
        groups: Float[AnyArray, "n G c"],
        tokens: Float[AnyArray, "n N c"],
        noise: Float[AnyArray, "n G N"] | None,
    ) -> tuple[Float[Array, "n G c"], Float[Array, "n G N"]]:
        """(what the groups gather, softmax of the logits over groups without noise, float32)."""
        q = linear(self.width, self.dtype, "q_proj", self.initializer_range)(groups)
        k, v = (
            linear(self.width, self.dtype, name, self.initializer_range)(tokens)
            for name in ("k_proj", "v_proj")
        )
        logits = jnp.einsum("nGc,nNc->nGN", q, k, preferred_element_type=jnp.float32)
        logits = logits * self.width**-0.5
        hard = hard_assignment(logits, noise)
        total = jnp.einsum(
            "nGN,nNc->nGc", hard.astype(self.dtype), v, preferred_element_type=jnp.float32
        )
        mean = total / (hard.sum(axis=-1, keepdims=True) + 1.0)
        out = linear(self.width, self.dtype, "out_proj", self.initializer_range)(
            mean.astype(self.dtype)
        )
        return out, jax.nn.softmax(logits, axis=-2)


class GroupingBlock(nn.Module):
    """Tokens are merged into fewer ones, the groups.

    Attributes:
      width, heads, activation: as in GroupViT.
      groups: how many come out.
      dtype: of the compute.
      initializer_range: see `linear`.
    """

    width: int
    heads: int
    groups: int
    activation: str
    dtype: Any = jnp.float32
    initializer_range: float = INIT_STD

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "n N c"],
        tokens: Float[AnyArray, "n t c"],
        noise: Float[AnyArray, "n G N"] | None = None,
    ) -> tuple[Float[Array, "n G c"], Float[Array, "n G N"]]:
        """Groups the tokens `x`.

        Args:
          x: what is grouped.
          tokens: the group tokens that went through the stage beside it.
          noise: Gumbel noise of training.

        Returns:
          (groups in the compute dtype, soft assignment without noise in float32: every token's
          column sums to one over the groups).
        """
        tokens = layer_norm("norm_tokens")(tokens).astype(self.dtype)
        x = layer_norm("norm_x")(x).astype(self.dtype)
        kind, std = (self.activation, self.dtype), self.initializer_range
        inter = Mlp(self.width // 2, self.groups, *kind, True, std, name="token_mlp")
        asking = layer_norm("norm_post")(inter(tokens))
        asking = CrossBlock(self.width, self.heads, *kind, std, name="cross")(asking, x)
        asking = asking.astype(self.dtype)
        gathered, soft = Assignment(self.width, self.dtype, std, name="assign")(asking, x, noise)
        gathered = gathered + asking
        mlp = Mlp(4 * self.width, self.width, *kind, False, std, name="channel_mlp")
        return gathered + mlp(layer_norm("norm_new")(gathered)), soft

"""The pre-norm transformer block that CLIP's image and text towers share.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from trm_jax.models import AnyArray


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU, as in torch and OpenCLIP."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


def layer_norm(name: str) -> nn.LayerNorm:
    """LayerNorm as torch computes it: eps 1e-5, two-pass variance, float32 in and out."""
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name)


def attend(
    query: Float[AnyArray, "n q heads c"],
    key: Float[AnyArray, "n k heads c"],
    value: Float[AnyArray, "n k heads c"],
    mask: Bool[AnyArray, "#n q k"] | None = None,
    kernel: str = "xla",
) -> Float[Array, "n q heads c"]:
    """Scaled dot-product attention with a float32 softmax; `mask` is true where q may see k.

    kernel "cudnn" never writes the scores to memory; it serves half precision without a mask, and
    the others go to "xla".
    """
    if kernel == "cudnn" and mask is None and query.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    scores = jnp.einsum("nqhc,nkhc->nhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("nhqk,nkhc->nqhc", weights, value)


class Attention(nn.Module):
    """Multi-head self-attention with biases; `out_std` initialises the output projection."""

    width: int
    heads: int
    out_std: float
    dtype: Any = jnp.float32
    kernel: str = "xla"

    def setup(self):
        def linear(name: str, std: float) -> nn.Dense:
            return nn.Dense(
                self.width, dtype=self.dtype, kernel_init=nn.initializers.normal(std), name=name
            )

        self.q_proj = linear("q_proj", self.width**-0.5)
        self.k_proj = linear("k_proj", self.width**-0.5)
        self.v_proj = linear("v_proj", self.width**-0.5)
        self.out_proj = linear("out_proj", self.out_std)

    def __call__(self, x: Array, mask: Array | None = None, reader: Array | None = None) -> Array:
        """[n, T, width] -> [n, T, width], or [n, q, width] for the queries `reader` [n, q, width]
        alone; `mask` [n or 1, T or q, T] is true where attention is allowed."""
        asking = x if reader is None else reader
        heads = (self.heads, self.width // self.heads)
        query = self.q_proj(asking).reshape(*asking.shape[:2], *heads)
        key, value = (p(x).reshape(*x.shape[:2], *heads) for p in (self.k_proj, self.v_proj))
        # A single query has no scores worth a kernel.
        kernel = self.kernel if reader is None else "xla"
        return self.out_proj(attend(query, key, value, mask, kernel).reshape(asking.shape))

    def value_path(self, x: Array) -> Array:
        """What every token would get if it attended to itself alone: out_proj(v_proj(x))."""
        return self.out_proj(self.v_proj(x))


class BlockMlp(nn.Module):
    """width -> 4 width -> width."""

    width: int
    activation: str
    out_std: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., width] -> [..., width]."""
        hidden_init = nn.initializers.normal((2 * self.width) ** -0.5)
        out_init = nn.initializers.normal(self.out_std)
        x = nn.Dense(4 * self.width, dtype=self.dtype, kernel_init=hidden_init, name="c_fc")(x)
        x = ACTIVATIONS[self.activation](x)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=out_init, name="c_proj")(x)


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)).

    Attributes:
      width: channels of the residual stream.
      heads: attention heads; divides width.
      depth: number of blocks of the tower; the initial output projections shrink with it.
      activation: a name of ACTIVATIONS.
      dtype: of the compute; parameters, LayerNorm and softmax are float32.
      kernel: of the attention, see `attend`.
    """

    width: int
    heads: int
    depth: int
    activation: str = "quick_gelu"
    dtype: Any = jnp.float32
    kernel: str = "xla"

    def setup(self):
        out_std = (self.width * 2 * self.depth) ** -0.5
        self.ln_1 = layer_norm("ln_1")
        self.attn = Attention(self.width, self.heads, out_std, self.dtype, self.kernel, name="attn")
        self.ln_2 = layer_norm("ln_2")
        self.mlp = BlockMlp(self.width, self.activation, out_std, self.dtype, name="mlp")

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """[n, T, width] -> [n, T, width]; `mask` [1, T, T] is true where attention is allowed."""
        x = x + self.attn(self.ln_1(x).astype(self.dtype), mask)
        return x + self.mlp(self.ln_2(x))

    def read(self, x: Array, rows: AnyArray, mask: Array | None = None) -> Array:
        """Row rows[i] of example i alone: [n, T, width], [n] -> [n, width].

        A tower reads one row of its last block, so the other queries and MLPs need not be computed.
        `mask` [n, T] is true where that row may look.
        """
        normed = self.ln_1(x).astype(self.dtype)
        asking = jnp.take_along_axis(normed, rows[:, None, None], axis=1)
        seen = None if mask is None else mask[:, None]
        x = jnp.take_along_axis(x, rows[:, None, None], axis=1)
        x = x + self.attn(normed, seen, asking)
        return (x + self.mlp(self.ln_2(x)))[:, 0]

    def value_path(self, x: Array) -> Array:
        """The block without token mixing: attention replaced by its value path."""
        x = x + self.attn.value_path(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

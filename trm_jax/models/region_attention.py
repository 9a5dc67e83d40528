"""Category-aware region learning (CARL) of TRM-ML, Eq. 2-4, and its small projections.

One decoder layer with one attention head: learnable category queries attend to the dense features
of an image. The same energies give the query-level features (softmax over positions, Eq. 2-3) and,
through a sigmoid, the soft regions of the region-level features (Eq. 4).
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trm_jax.models import AnyArray
from trm_jax.models.clip.transformer import gelu, layer_norm
from trm_jax.types import PyTree, UserError

_XAVIER = nn.initializers.xavier_uniform()
INITIALIZERS = {
    "xavier": _XAVIER,
    "identity": lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype),
}


class Linear(nn.Module):
    """A Dense layer whose kernel and bias can be read, for products in another order."""

    inputs: int
    outputs: int
    dtype: Any = jnp.float32
    kernel_init: Callable = _XAVIER

    def setup(self):
        shape = (self.inputs, self.outputs)
        self.kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros, (self.outputs,))

    def __call__(self, x: Float[AnyArray, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """x W + b in `dtype`."""
        out = jnp.asarray(x, self.dtype) @ self.kernel.astype(self.dtype)
        return out + jnp.broadcast_to(self.bias.astype(self.dtype), out.shape)


class Mlp(nn.Module):
    """dim -> hidden -> dim with biases and Xavier-uniform kernels.

    Attributes:
      dim: input and output width.
      hidden: width in between.
      activation: element-wise function.
      dtype: of the compute.
    """

    dim: int
    hidden: int
    activation: Callable[[Array], Array] = jax.nn.relu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch d"]) -> Float[Array, "*batch d"]:
        """[..., dim] -> [..., dim]."""
        x = self.activation(Linear(self.dim, self.hidden, self.dtype, name="fc1")(x))
        return Linear(self.hidden, self.dim, self.dtype, name="fc2")(x)


def text_projection(dim: int, dtype: Any = jnp.float32) -> Mlp:
    """MLP_t of the matching loss MMCL: d -> 4d -> d, ReLU."""
    return Mlp(dim, 4 * dim, jax.nn.relu, dtype)


def region_projection(dim: int, dtype: Any = jnp.float32) -> Mlp:
    """MLP_v of the matching loss MMCL: d -> d -> d, ReLU."""
    return Mlp(dim, dim, jax.nn.relu, dtype)


class RegionAttention(nn.Module):
    """CARL: dense features -> region energies and query-level features.

    No query residual, no dropout, no positional encoding; biases everywhere. With the defaults
    it has exactly 4d^2 + 4d (attention) + 8d^2 + 5d (MLP) + 6d (3 LayerNorms) + C d parameters.

    Attributes:
      num_classes: C.
      dim: d.
      self_attention: the queries first attend to each other (pre-norm, residual, one head).
      kernel_init: of W_q, W_k, W_v and W_o, a name of INITIALIZERS. With "identity" and queries
        that are text features, attention starts where image and text agree, and F_q in the joint
        space; "xavier" (the default of attention layers) starts anywhere and learns both.
      dtype: of the compute; the energies and both softmaxes are float32.
    """

    num_classes: int
    dim: int
    self_attention: bool = False
    kernel_init: str = "xavier"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, dense: Float[AnyArray, "n hw d"]
    ) -> tuple[Float[Array, "n C hw"], Float[Array, "n C d"]]:
        """Energies e (float32) and query-level features F_q of un-normalised dense features."""
        queries = self.param("queries", nn.initializers.normal(0.02), (self.num_classes, self.dim))
        if self.self_attention:
            queries = queries + self._attend_among(layer_norm("self_norm")(queries))
        keys = layer_norm("feature_norm")(dense).astype(self.dtype)

        # e = <W_q LN(q) + b_q, W_k LN(f) + b_k> / sqrt(d)   (Eq. 2). The queries do not depend on
        # the image, so W_k is folded into them: C d^2 products instead of n hw d^2.
        query = self._linear("query", jnp.float32)(layer_norm("query_norm")(queries))
        key = self._linear("key", jnp.float32)
        folded = (query @ key.kernel.T).astype(self.dtype)
        energies = jnp.einsum("npd,cd->ncp", keys, folded, preferred_element_type=jnp.float32)
        energies = (energies + (query @ key.bias)[None, :, None]) * self.dim**-0.5

        # h = W_o(a . W_v LN(f)),  F_q = h + MLP(LN(h))   (Eq. 3)
        weights = jax.nn.softmax(energies, axis=-1).astype(self.dtype)
        values = self._linear("value", self.dtype)(keys)
        hidden = jnp.einsum("ncp,npd->ncd", weights, values)
        hidden = self._linear("out", self.dtype)(hidden)
        mlp = Mlp(self.dim, 4 * self.dim, gelu, self.dtype, name="mlp")
        return energies, hidden + mlp(layer_norm("hidden_norm")(hidden))

    def _linear(self, name: str, dtype: Any) -> Linear:
        init = _XAVIER if name.startswith("self_") else INITIALIZERS[self.kernel_init]
        return Linear(self.dim, self.dim, dtype, init, name=name)

    def _attend_among(self, queries: Float[AnyArray, "C d"]) -> Float[Array, "C d"]:
        query, key, value = (
            self._linear(f"self_{name}", jnp.float32)(queries) for name in ("query", "key", "value")
        )
        weights = jax.nn.softmax(query @ key.T * self.dim**-0.5, axis=-1)
        return self._linear("self_out", jnp.float32)(weights @ value)


def with_queries(
    params: Mapping[str, PyTree], queries: Float[AnyArray, "C d"]
) -> dict[str, PyTree]:
    """A copy of RegionAttention's parameters that starts from `queries` (text features, say).

    Raises:
      UserError: the shape differs.
    """
    if queries.shape != params["queries"].shape:
        raise UserError(
            f"initial queries have the shape {list(queries.shape)}, the region attention needs "
            f"{list(params['queries'].shape)}; use the encoder the model was made for"
        )
    return {**params, "queries": jnp.asarray(queries, jnp.float32)}


def region_features(
    energies: Float[AnyArray, "n C hw"], dense: Float[AnyArray, "n hw d"]
) -> Float[Array, "n C d"]:
    """Region-level features F_r (Eq. 4) as a weighted mean, float32.

    F_r = sum_p r_p f_p with r = sigmoid(e), of the original dense features. Matching is by cosine,
    so the sum is divided by sum_p r_p: weights softmax_p(log_sigmoid(e)), which equal
    r / sum r and stay defined where every r underflows.
    """
    weights = jax.nn.softmax(jax.nn.log_sigmoid(energies.astype(jnp.float32)), axis=-1)
    return jnp.einsum("ncp,npd->ncd", weights, dense.astype(jnp.float32))


def top_pixels(
    energies: Float[AnyArray, "n C hw"], dense: Float[AnyArray, "n hw d"], k: int
) -> Float[Array, "n C k d"]:
    """Dense features of the k positions of highest energy, best first.

    Ranked by e, since sigmoid(e) saturates and ties; equal energies rank by position.

    Raises:
      UserError: k exceeds the number of positions.
    """
    if k > energies.shape[-1]:
        raise UserError(
            f"the top k = {k} pixels exceed the {energies.shape[-1]} positions of the dense "
            "features; lower k"
        )
    _, positions = jax.lax.top_k(energies, k)
    return jax.vmap(lambda features, index: features[index])(dense, positions)

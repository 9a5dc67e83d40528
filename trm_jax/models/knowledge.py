"""MASK's networks: regions to the space of prototypes, back to features, and on to word vectors.

Source: "Multimodal aligned semantic knowledge for unpaired image-text matching" (MASK), sections
3.2 and 3.3 and Tables 8 and 12. Letters: n rows of R regions, D the width of their features, Z of
the prototypes, N of the word vectors. A row is an image or a part of one; attention never leaves
it. Padded regions are seen by nobody, whatever they hold; what the networks return for them is
finite and means nothing.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from trm_jax.models import AnyArray, checks
from trm_jax.models.clip.towers import count_parameters
from trm_jax.models.clip.transformer import Attention, layer_norm
from trm_jax.types import Key, PyTree, UserError

_WHERE = "model.knowledge"
_DEPTHS = {
    "encoder": {"fc_layers": 1, "attention_layers": 3},
    "reconstructor": {"fc_layers": 2, "attention_layers": 1},
    "mapper": {"fc_layers": 3, "attention_layers": 3},
}
# Far beyond any use: a slip of the keyboard ends in one line, not in exhausted memory.
_MOST_LAYERS = 64
_WIDEST = 65_536
_LEAST_SIGMA = 1e-6


class SelfAttention(nn.Module):
    """LN(x + MHSA(x)) over the regions of a row: 4 c^2 + 6 c parameters for the width c.

    No feed-forward part, no dropout, no positions.

    Attributes:
      heads: 1 is taken where they do not divide the width.
      dtype: of the products; the residual, LayerNorm and softmax are float32.
    """

    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "n R c"], mask: Bool[AnyArray, "n R"]
    ) -> Float[Array, "n R c"]:
        """[n, R, c] float32; `mask` is true where a region may be attended to."""
        n, regions, width = x.shape
        heads = 1 if width % self.heads else self.heads
        attention = Attention(width, heads, width**-0.5, self.dtype, name="attention")
        seen = jnp.broadcast_to(jnp.asarray(mask)[:, None], (n, regions, regions))
        x = jnp.asarray(x, jnp.float32)
        return layer_norm("norm")(x + attention(x.astype(self.dtype), seen))


class PrototypeAwareEncoder(nn.Module):
    """PAE, h: the Gaussian of each region in the space of prototypes, from its row (Eq. 3).

    FC and ReLU, self-attention, LayerNorm; sigma = softplus(linear(mu)) + 1e-6.

    Attributes:
      width: Z.
      fc_layers: FC + ReLU, from 1.
      attention_layers: from 1.
      heads, dtype: see SelfAttention.
    """

    width: int = 512
    fc_layers: int = 1
    attention_layers: int = 3
    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[AnyArray, "n R D"], mask: Bool[AnyArray, "n R"]
    ) -> tuple[Float[Array, "n R Z"], Float[Array, "n R Z"]]:
        """Mean and standard deviation, float32; sigma >= 1e-6."""
        # Zeroed, since the weight 0 times a NaN of a padded region would reach its whole row.
        x = jnp.where(jnp.asarray(mask)[..., None], features, 0)
        x = _fc_relu(x, self.width, self.fc_layers, self.dtype)
        x = _attend(x, mask, range(self.attention_layers), self.heads, self.dtype)
        mu = layer_norm("norm")(x)
        return mu, nn.softplus(nn.Dense(self.width, name="sigma")(mu)) + _LEAST_SIGMA


class FeatureReconstructor(nn.Module):
    """FRM, g: from z = mu + sigma * noise back to the features of the regions (Eq. 4).

    FC and ReLU, self-attention, FC; a single FC layer is the last one.

    Attributes:
      features: D.
      fc_layers: from 1, the last one included.
      attention_layers: from 1.
      heads, dtype: see SelfAttention.
    """

    features: int
    fc_layers: int = 2
    attention_layers: int = 1
    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, z: Float[AnyArray, "n R Z"], mask: Bool[AnyArray, "n R"]
    ) -> Float[Array, "n R D"]:
        """Features, float32."""
        x = _fc_relu(jnp.asarray(z), z.shape[-1], self.fc_layers - 1, self.dtype)
        x = _attend(x, mask, range(self.attention_layers), self.heads, self.dtype)
        return _fc(x, self.features, "fc_out", self.dtype).astype(jnp.float32)


class WordMapper(nn.Module):
    """MTM, f: from mu to the space of word vectors (Eq. 7).

    FC and ReLU, two self-attentions, FC and ReLU, one self-attention, FC. More FC + ReLU stand
    after the first, more attention after the last. One FC layer is the first, two are the first
    and the last. The last attention is the one that stays, then those before the middle FC.

    Attributes:
      features: N.
      fc_layers: from 1.
      attention_layers: from 1.
      heads, dtype: see SelfAttention.
    """

    features: int
    fc_layers: int = 3
    attention_layers: int = 3
    heads: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, mu: Float[AnyArray, "n R Z"], mask: Bool[AnyArray, "n R"]
    ) -> Float[Array, "n R N"]:
        """The predicted word vectors w', un-normalised, float32."""
        has_middle, has_last = self.fc_layers >= 3, self.fc_layers >= 2
        at_first = self.fc_layers - has_middle - has_last
        before = min(2, self.attention_layers - 1)
        x = _fc_relu(jnp.asarray(mu), self.features, at_first, self.dtype)
        x = _attend(x, mask, range(before), self.heads, self.dtype)
        if has_middle:
            x = nn.relu(_fc(x, self.features, "fc_middle", self.dtype))
        x = _attend(x, mask, range(before, self.attention_layers), self.heads, self.dtype)
        if has_last:
            x = _fc(x, self.features, "fc_out", self.dtype)
        return x.astype(jnp.float32)


class RegionCodes(NamedTuple):
    """What KnowledgeModel makes of regions; all float32.

    mu, sigma:      [n, R, Z] mean and standard deviation, sigma >= 1e-6.
    reconstruction: [n, R, D] features made of one draw of z.
    words:          [n, R, N] predicted word vectors w', un-normalised.
    """

    mu: Array
    sigma: Array
    reconstruction: Array
    words: Array


class KnowledgeModel(nn.Module):
    """PAE, FRM and MTM as one module; make it with `build`.

    Attributes:
      config: a configuration returned by `validate`.
      dtype: of the products; parameters and what is returned are float32.
    """

    config: Mapping[str, Any]
    dtype: Any = jnp.float32

    def setup(self):
        common = {"heads": self.config["heads"], "dtype": self.dtype}
        encoder, reconstructor, mapper = (self.config[name] for name in _DEPTHS)
        self.encoder = PrototypeAwareEncoder(self.config["width"], **encoder, **common)
        self.reconstructor = FeatureReconstructor(
            self.config["features"], **reconstructor, **common
        )
        self.mapper = WordMapper(self.config["word_width"], **mapper, **common)

    def __call__(
        self,
        features: Float[AnyArray, "n R D"],
        mask: Bool[AnyArray, "n R"],
        noise: Float[AnyArray, "n R Z"],
    ) -> RegionCodes:
        """All that the losses read.

        Args:
          features: of any float type.
          mask: which regions are real; a row may have none.
          noise: standard normal, z of Eq. 4.
        """
        mu, sigma = self.encoder(features, mask)
        reconstruction = self.reconstructor(mu + sigma * noise, mask)
        return RegionCodes(mu, sigma, reconstruction, self.mapper(mu, mask))

    def encode(
        self, features: Float[AnyArray, "n R D"], mask: Bool[AnyArray, "n R"]
    ) -> Float[Array, "n R Z"]:
        """The means mu alone, un-normalised, without any noise: prototypes and matching."""
        return self.encoder(features, mask)[0]


def validate(config: Any) -> dict[str, Any]:
    """Checks a knowledge model's configuration and fills in defaults.

    Args:
      config: any nested mapping with "features" (D) and "word_width" (N); optional are "width" (Z,
        512), "heads" (4) and "encoder", "reconstructor" and "mapper", each with "fc_layers" and
        "attention_layers" (Table 12; the defaults are Table 8's).

    Returns:
      Nested dicts with every field present, equal for equal models.

    Raises:
      UserError: a field is missing, unknown or out of range.
    """
    fields = {"features": checks.REQUIRED, "word_width": checks.REQUIRED, "width": 512, "heads": 4}
    fields |= dict.fromkeys(_DEPTHS, {})
    top = checks.complete(checks.plain(config), fields, _WHERE)
    _check_range(top, ("features", "word_width", "width", "heads"), _WIDEST, _WHERE)
    for name, depths in _DEPTHS.items():
        where = f"{_WHERE}.{name}"
        top[name] = checks.complete(top[name], depths, where)
        _check_range(top[name], tuple(depths), _MOST_LAYERS, where)
    return top


def build(config: Any, *, dtype: Any = jnp.float32) -> KnowledgeModel:
    """The model that `config` describes (see `validate`, which may raise UserError)."""
    return KnowledgeModel(validate(config), dtype)


def init(model: KnowledgeModel, key: Key) -> dict[str, PyTree]:
    """Freshly initialised variables {"params"}."""
    return jax.jit(model.init)(key, *_example(model.config))


def parameter_counts(config: Any) -> dict[str, int]:
    """Weights and biases of "PAE", "sigma" (its head, not in PAE), "FRM" and "MTM".

    With D = 2048, Z = 512 and N = 300: 4,205,056, 262,656, 2,364,928 and 1,419,900. Computes and
    allocates nothing.

    Raises:
      UserError: see `validate`.
    """
    model = build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *_example(model.config))["params"]
    counts = {name: count_parameters(shapes[name]) for name in _DEPTHS}
    sigma = count_parameters(shapes["encoder"]["sigma"])
    return {
        "PAE": counts["encoder"] - sigma,
        "sigma": sigma,
        "FRM": counts["reconstructor"],
        "MTM": counts["mapper"],
    }


def _example(config: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """One row of one region: features, mask and noise."""
    features, noise = (jnp.zeros((1, 1, config[name])) for name in ("features", "width"))
    return features, jnp.ones((1, 1), bool), noise


def _check_range(section: Mapping[str, Any], names: tuple[str, ...], top: int, where: str) -> None:
    checks.positive(section, names, where)
    for name in names:
        if section[name] > top:
            raise UserError(f"{where}.{name} = {section[name]} is more than {top}; lower it")


def _fc(x: Array, features: int, name: str, dtype: Any) -> Array:
    # Not from zero: a region without any features would start at mu = 0, where the gradient of a
    # cosine is a million and each LayerNorm on the way back multiplies it by 300.
    bias_init = nn.initializers.normal(0.01)
    return nn.Dense(features, dtype=dtype, bias_init=bias_init, name=name)(x)


def _fc_relu(x: Array, features: int, layers: int, dtype: Any) -> Array:
    """The layers fc_0, fc_1, .., each with a ReLU, inside the calling module."""
    for i in range(layers):
        x = nn.relu(_fc(x, features, f"fc_{i}", dtype))
    return x


def _attend(x: Array, mask: AnyArray, layers: range, heads: int, dtype: Any) -> Array:
    """The layers attention_i, i in `layers`, inside the calling module."""
    for i in layers:
        x = SelfAttention(heads, dtype, name=f"attention_{i}")(x, mask)
    return x

"""A pair of CLIP towers behind one module: images or features, token ids or prompts.

Everything is used through `towers.apply(variables, ..., method="encode_image")` and so on, where
variables = {"params": ...} and, for a ResNet, "batch_stats".
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from trm_jax.models import AnyArray
from trm_jax.models.clip.config import validate
from trm_jax.models.clip.features import FeatureProjection
from trm_jax.models.clip.resnet import ModifiedResNet
from trm_jax.models.clip.text import TextTower
from trm_jax.models.clip.vit import VisionTransformer
from trm_jax.types import Key, PyTree

__all__ = ["ClipTowers", "abstract_variables", "build", "count_parameters", "validate"]

_IMAGE_TOWERS = {
    "resnet": ModifiedResNet,
    "vit": VisionTransformer,
    "features": FeatureProjection,
}


class ClipTowers(nn.Module):
    """Image tower, text tower and logit scale; make it with `build`.

    Attributes:
      config: a configuration returned by `validate`.
      dtype: of the compute; parameters are float32.
      remat_text: rematerialise the text blocks in the backward pass.
    """

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    remat_text: bool = False

    def setup(self):
        image = {k: v for k, v in self.config["image"].items() if k not in ("kind", "mean", "std")}
        kind = self.config["image"]["kind"]
        if kind == "resnet":
            image["dense_pos_embed"] = self.config["dense_pos_embed"]
        elif kind == "vit":
            image["attention"] = self.config["attention"]
        embed_dim = self.config["embed_dim"]
        self.image = _IMAGE_TOWERS[kind](
            embed_dim=embed_dim, dtype=self.dtype, name="image", **image
        )
        self.text = TextTower(
            embed_dim=embed_dim,
            dtype=self.dtype,
            remat=self.remat_text,
            name="text",
            **self.config["text"],
        )
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ()
        )

    def encode_image(
        self, x: AnyArray, train: bool = False
    ) -> tuple[Float[Array, "n d"], Float[Array, "n hw d"]]:
        """Image embeddings and dense features, un-normalised.

        Args:
          x: [n, H, W, 3] uint8, or float in [0, 1], normalised here by the configured mean and
            standard deviation; or [n, r, D] float features if the image kind is "features".
          train: use and update batch statistics (mutable=["batch_stats"]).

        Returns:
          (embedding [n, d] float32, dense [n, hw, d] in the compute dtype, row by row).
        """
        image = self.config["image"]
        if image["kind"] == "features":
            return self.image(x.astype(self.dtype), train)
        pixels = x.astype(jnp.float32)
        if x.dtype == jnp.uint8:
            pixels = pixels / 255.0
        mean = jnp.asarray(image["mean"], jnp.float32)[None, None, None]
        std = jnp.asarray(image["std"], jnp.float32)[None, None, None]
        return self.image(((pixels - mean) / std).astype(self.dtype), train)

    def encode_text(self, tokens: Int[AnyArray, "n T"]) -> Float[Array, "n d"]:
        """Text embeddings of token ids, read at the first EOS, un-normalised float32."""
        return self.text(tokens)

    def embed_tokens(self, tokens: Int[AnyArray, "*n T"]) -> Float[Array, "*n T w"]:
        """Token embeddings without positions, float32."""
        return self.text.embed_tokens(tokens)

    def encode_prompts(
        self, embeddings: Float[AnyArray, "n T w"], eos: Int[AnyArray, " n"]
    ) -> Float[Array, "n d"]:
        """Text embeddings of token embeddings, read at position `eos` of each row."""
        return self.text.encode_prompts(embeddings, eos)

    def __call__(
        self, images: AnyArray, tokens: Int[AnyArray, "n T"], train: bool = False
    ) -> tuple[Float[Array, "n d"], Float[Array, "n d"], Float[AnyArray, ""]]:
        """(image embeddings, text embeddings, logit scale); touches every parameter."""
        return self.encode_image(images, train)[0], self.encode_text(tokens), self.logit_scale


def build(config: Any, *, dtype: Any = jnp.float32, remat_text: bool = False) -> ClipTowers:
    """The towers that `config` describes (see `validate`, which may raise UserError)."""
    return ClipTowers(validate(config), dtype=dtype, remat_text=remat_text)


def example_inputs(config: Mapping[str, Any]) -> tuple[Array, Array]:
    """The smallest (images, tokens) that the towers of a validated `config` accept."""
    image = config["image"]
    if image["kind"] == "features":
        images = jnp.zeros((1, 1, image["width"]), jnp.float32)
    else:
        images = jnp.zeros((1, image["image_size"], image["image_size"], 3), jnp.uint8)
    return images, jnp.full((1, 1), config["text"]["eos_id"], jnp.int32)


def init(config: Any, key: Key) -> dict[str, PyTree]:
    """Freshly initialised variables {"params", "batch_stats" (ResNet only)}."""
    towers = build(config)
    images, tokens = example_inputs(towers.config)
    return jax.jit(towers.init)(key, images, tokens)


def abstract_variables(config: Any) -> dict[str, PyTree]:
    """The variables of `config` as jax.ShapeDtypeStruct; computes and allocates nothing."""
    towers = build(config)
    images, tokens = example_inputs(towers.config)
    return jax.eval_shape(towers.init, jax.random.key(0), images, tokens)


def count_parameters(params: PyTree) -> int:
    """The number of scalars in a tree of arrays or of jax.ShapeDtypeStruct."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

"""A pair of CLIP towers behind one module: images or features, token ids or prompts.

Everything is used through `towers.apply(variables, ..., method="encode_image")` and so on, where
variables = {"params": ...} and, for a ResNet or with MLP projectors, "batch_stats".

Training that must cut a batch into parts before the projectors see all of it calls the two halves
of `encode_image` and `encode_text` itself: `image_features`, `project_image` and so on.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from trm_jax.models import AnyArray
from trm_jax.models.clip.config import validate
from trm_jax.models.clip.features import FeatureProjection
from trm_jax.models.clip.resnet import ModifiedResNet
from trm_jax.models.clip.text import TextTower
from trm_jax.models.clip.vit import VisionTransformer
from trm_jax.models.groupvit import Grouped, GroupViT, uniform_within
from trm_jax.types import Key, PyTree, UserError

__all__ = ["ClipTowers", "abstract_variables", "build", "count_parameters", "validate"]

_IMAGE_TOWERS = {
    "resnet": ModifiedResNet,
    "vit": VisionTransformer,
    "groupvit": GroupViT,
    "features": FeatureProjection,
}


class Projector(nn.Module):
    """Linear, BatchNorm, ReLU, Linear: GroupViT's map from a tower's features to the joint space.

    The batch statistics are those of the whole array, on however many devices it lies. The running
    ones move by a tenth each step, as in torch (its momentum 0.1 is flax's 0.9); the running
    variance is the batch's own, where torch takes n / (n - 1) of it.

    Attributes:
      hidden: width of the hidden layer.
      features: d of the joint space.
      dtype: of the compute; statistics are float32.
    """

    hidden: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "*n w"],
        train: bool = False,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> Float[Array, "*n d"]:
        """Projects the last axis; `where` says which rows count in the statistics of training."""

        def linear(features: int, name: str, x: Array) -> Array:
            init = uniform_within(x.shape[-1] ** -0.5)  # torch's default
            return nn.Dense(
                features, dtype=self.dtype, kernel_init=init, bias_init=init, name=name
            )(x)

        x = linear(self.hidden, "fc1", jnp.asarray(x))
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            use_fast_variance=False,
            name="bn",
        )(x, mask=None if where is None else jnp.asarray(where)[:, None])
        return linear(self.features, "fc2", nn.relu(x))


class ClipTowers(nn.Module):
    """Image tower, text tower and logit scale; make it with `build`.

    Attributes:
      config: a configuration returned by `validate`.
      dtype: of the compute; parameters are float32.
      remat_text: rematerialise the text blocks in the backward pass.
      remat_image, scan_image: of a GroupViT, see groupvit.Stage.
    """

    config: Mapping[str, Any]
    dtype: Any = jnp.float32
    remat_text: bool = False
    remat_image: bool = False
    scan_image: bool = False

    def setup(self):
        image = {k: v for k, v in self.config["image"].items() if k not in ("kind", "mean", "std")}
        kind = self.config["image"]["kind"]
        if kind == "resnet":
            image["dense_pos_embed"] = self.config["dense_pos_embed"]
        elif kind in ("vit", "groupvit"):
            image["attention"] = self.config["attention"]
        if kind == "groupvit":
            image |= {"remat": self.remat_image, "scan": self.scan_image}
        embed_dim, hidden = self.config["embed_dim"], self.config["projector_hidden"]
        own_dim = 0 if hidden else embed_dim  # of the towers' own linear projections
        self.image = _IMAGE_TOWERS[kind](embed_dim=own_dim, dtype=self.dtype, name="image", **image)
        self.text = TextTower(
            embed_dim=own_dim,
            dtype=self.dtype,
            remat=self.remat_text,
            name="text",
            **self.config["text"],
        )
        if hidden:
            self.image_projector = Projector(hidden, embed_dim, self.dtype, name="image_projector")
            self.text_projector = Projector(hidden, embed_dim, self.dtype, name="text_projector")
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ()
        )

    def _look(
        self, x: AnyArray, train: bool = False, keys: Array | None = None
    ) -> Grouped | tuple[Array, Array]:
        """What the image tower returns for a batch as `encode_image` takes it."""
        image = self.config["image"]
        if image["kind"] == "features":
            return self.image(x.astype(self.dtype), train)
        pixels = x.astype(jnp.float32)
        if x.dtype == jnp.uint8:
            pixels = pixels / 255.0
        mean = jnp.asarray(image["mean"], jnp.float32)[None, None, None]
        std = jnp.asarray(image["std"], jnp.float32)[None, None, None]
        pixels = ((pixels - mean) / std).astype(self.dtype)
        if image["kind"] != "groupvit":
            return self.image(pixels, train)
        if train:
            _check_keys(keys, len(x))
        return self.image(pixels, keys if train else None)

    def image_features(
        self, x: AnyArray, train: bool = False, keys: Shaped[Key, " n"] | None = None
    ) -> Float[Array, "n w"]:
        """What `project_image` takes, float32; arguments as of `encode_image`."""
        return self._look(x, train, keys)[0]

    def project_image(
        self,
        features: Float[AnyArray, "*n w"],
        train: bool = False,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> Float[Array, "*n d"]:
        """Image features to the joint space, float32; the identity without a projector.

        Args:
          features: of `image_features`.
          train: use the statistics of this batch and update the running ones.
          where: rows that count in the statistics, one at least; None: all.
        """
        if not self.config["projector_hidden"]:
            return jnp.asarray(features)
        return self.image_projector(features, train, where).astype(jnp.float32)

    def encode_image(
        self,
        x: AnyArray,
        train: bool = False,
        keys: Shaped[Key, " n"] | None = None,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> tuple[Float[Array, "n d"], Float[Array, "n hw d"]]:
        """Image embeddings and dense features, un-normalised.

        The dense features of a GroupViT are, for each patch, the mean of its projected groups,
        weighted by the patch's soft assignment. They are projected with the running statistics,
        in training too.

        Args:
          x: [n, H, W, 3] uint8, or float in [0, 1], normalised here by the configured mean and
            standard deviation; or [n, r, D] float features if the image kind is "features".
          train: use and update batch statistics (mutable=["batch_stats"]); a GroupViT then draws
            Gumbel noise and drops branches.
          keys: typed PRNG keys of the examples, for that; other towers use none.
          where: rows that count in the projector's batch statistics; None: all.

        Returns:
          (embedding [n, d] float32, dense [n, hw, d] in the compute dtype, row by row).

        Raises:
          ValueError: a GroupViT is trained without one key for each example.
        """
        seen = self._look(x, train, keys)
        dense = self.project_image(seen[1])  # first: with the statistics as they were
        if isinstance(seen, Grouped):
            dense = jnp.einsum("npg,ngd->npd", seen.assignment.astype(dense.dtype), dense)
        return self.project_image(seen[0], train, where), dense.astype(self.dtype)

    def segment(
        self, x: AnyArray
    ) -> tuple[Float[Array, "n G d"], Float[Array, "n h w G"], Float[Array, "n d"]]:
        """The groups of images, and how much of each patch belongs to each group.

        Towers that group nothing have one group for each patch: its dense feature.

        Args:
          x: [n, H, W, 3] images as for `encode_image`, of any size that the patch size divides.

        Returns:
          (groups in the joint space, un-normalised; assignment, which sums to one over the groups;
          image embedding), all in evaluation mode and float32.

        Raises:
          UserError: the image kind is "features", which have no grid.
        """
        image = self.config["image"]
        if image["kind"] == "features":
            raise UserError("model.clip.image.kind 'features' cannot segment: it sees no images")
        cell = 4 * 2 ** (len(image["layers"]) - 1) if image["kind"] == "resnet" else None
        grid = [side // (cell or image["patch_size"]) for side in x.shape[1:3]]
        seen = self._look(x)
        groups = self.project_image(seen[1]).astype(jnp.float32)
        if isinstance(seen, Grouped):
            assignment = seen.assignment
        else:
            assignment = jnp.eye(groups.shape[1])[None]
        assignment = jnp.broadcast_to(
            assignment.reshape(-1, *grid, groups.shape[1]), (len(x), *grid, groups.shape[1])
        )
        return groups, assignment, self.project_image(seen[0])

    def text_features(self, tokens: Int[AnyArray, "n T"]) -> Float[Array, "n w"]:
        """What `project_text` takes, read at the first EOS, float32."""
        return self.text(tokens)

    def project_text(
        self,
        features: Float[AnyArray, "n w"],
        train: bool = False,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> Float[Array, "n d"]:
        """Text features to the joint space, float32; see `project_image`."""
        if not self.config["projector_hidden"]:
            return jnp.asarray(features)
        return self.text_projector(features, train, where).astype(jnp.float32)

    def encode_text(
        self,
        tokens: Int[AnyArray, "n T"],
        train: bool = False,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> Float[Array, "n d"]:
        """Text embeddings of token ids, read at the first EOS, un-normalised float32.

        Args:
          tokens: token ids.
          train: use and update the projector's batch statistics, if there is one.
          where: rows that count in them; None: all.
        """
        return self.project_text(self.text_features(tokens), train, where)

    def embed_tokens(self, tokens: Int[AnyArray, "*n T"]) -> Float[Array, "*n T w"]:
        """Token embeddings without positions, float32."""
        return self.text.embed_tokens(tokens)

    def encode_prompts(
        self, embeddings: Float[AnyArray, "n T w"], eos: Int[AnyArray, " n"]
    ) -> Float[Array, "n d"]:
        """Text embeddings of token embeddings, read at position `eos` of each row."""
        return self.project_text(self.text.encode_prompts(embeddings, eos))

    def __call__(
        self,
        images: AnyArray,
        tokens: Int[AnyArray, "n T"],
        train: bool = False,
        keys: Shaped[Key, " n"] | None = None,
    ) -> tuple[Float[Array, "n d"], Float[Array, "n d"], Float[AnyArray, ""]]:
        """(image embeddings, text embeddings, logit scale); touches every parameter."""
        embedding = self.project_image(self.image_features(images, train, keys), train)
        return embedding, self.encode_text(tokens, train), self.logit_scale


def _check_keys(keys: Array | None, count: int) -> None:
    if keys is None:
        raise ValueError("a GroupViT in training needs keys: typed PRNG keys, one for each image")
    if keys.shape != (count,) or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"keys must be typed PRNG keys [{count}], one for each image, not {keys.dtype}"
            f"{list(keys.shape)}"
        )


def build(
    config: Any,
    *,
    dtype: Any = jnp.float32,
    remat_text: bool = False,
    remat_image: bool = False,
    scan_image: bool = False,
) -> ClipTowers:
    """The towers that `config` describes (see `validate`, which may raise UserError).

    Args:
      config: see `validate`.
      dtype: of the compute.
      remat_text: keep only the inputs of the text blocks for the backward pass.
      remat_image: the same for the blocks of a GroupViT; implies scan_image.
      scan_image: run the blocks of each stage of a GroupViT in a loop, which compiles faster. The
        parameters are the same with and without.

    Raises:
      UserError: remat_image or scan_image for another image tower.
    """
    config = validate(config)
    if (remat_image or scan_image) and config["image"]["kind"] != "groupvit":
        raise UserError(
            "remat_image and scan_image are for model.clip.image.kind 'groupvit', not "
            f"{config['image']['kind']!r}"
        )
    return ClipTowers(config, dtype, remat_text, remat_image, scan_image)


def example_inputs(config: Mapping[str, Any]) -> tuple[Array, Array]:
    """The smallest (images, tokens) that the towers of a validated `config` accept."""
    image = config["image"]
    if image["kind"] == "features":
        images = jnp.zeros((1, 1, image["width"]), jnp.float32)
    else:
        images = jnp.zeros((1, image["image_size"], image["image_size"], 3), jnp.uint8)
    return images, jnp.full((1, 1), config["text"]["eos_id"], jnp.int32)


def init(config: Any, key: Key) -> dict[str, PyTree]:
    """Freshly initialised variables {"params", "batch_stats" (if there are any)}."""
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

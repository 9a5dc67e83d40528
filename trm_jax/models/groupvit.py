"""GroupViT: a vision transformer whose tokens merge into a few groups, as an image tower.

Xu et al., "GroupViT: Semantic Segmentation Emerges from Text Supervision", CVPR 2022.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from trm_jax.models import AnyArray
from trm_jax.models.clip.positions import bicubic_matrix
from trm_jax.models.clip.transformer import layer_norm
from trm_jax.models.grouping import (
    INIT_STD,
    EncoderBlock,
    GroupingBlock,
    Mlp,
    branch_factors,
    gumbel_noise,
)
from trm_jax.types import Key, PyTree, UserError


class Grouped(NamedTuple):
    """What the tower makes of images; d is its width where it has no projection.

    Attributes:
      pooled: [n, d], the mean of the groups, float32.
      groups: [n, G, d] in the compute dtype, un-normalised.
      assignment: [n, hw, G] float32: the product over the stages of their soft assignments; a
        patch's row sums to one.
    """

    pooled: Float[Array, "n d"]
    groups: Float[Array, "n G d"]
    assignment: Float[Array, "n hw G"]


def uniform_within(bound: float) -> Any:
    """The initialiser U(-bound, bound)."""

    def init(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Stage(nn.Module):
    """Blocks over tokens and group tokens, then the grouping block, if there are group tokens.

    Attributes:
      width, heads, activation: as in GroupViT.
      tokens: learned group tokens; 0 leaves the stage without grouping.
      groups: what the tokens are merged into.
      previous: group tokens of the stage before; 0 in the first stage.
      rates: of stochastic depth, one for each block.
      number: of the first block in the tower; `keys` are folded with the numbers of the blocks.
      grouping_number: what `keys` are folded with for the Gumbel noise.
      dtype: of the compute.
      kernel: of the attention, see transformer.attend.
      remat: keep only the inputs of the blocks for the backward pass, and recompute the rest.
      scan: one loop over the blocks, which compiles faster; `remat` implies it.
      initializer_range: see GroupViT.
    """

    width: int
    heads: int
    activation: str
    tokens: int
    groups: int
    previous: int
    rates: tuple[float, ...]
    number: int
    grouping_number: int
    dtype: Any = jnp.float32
    kernel: str = "xla"
    remat: bool = False
    scan: bool = False
    initializer_range: float = INIT_STD

    def setup(self):
        if self.tokens:
            # What is projected from the stage before says where to start.
            init = (
                nn.initializers.zeros
                if self.previous
                else nn.initializers.normal(self.initializer_range)
            )
            self.group_token = self.param("group_token", init, (self.tokens, self.width))
            grouping: Any = nn.remat(GroupingBlock) if self.remat else GroupingBlock
            kind = (self.activation, self.dtype)
            self.grouping = grouping(
                self.width, self.heads, self.groups, *kind, self.initializer_range, name="grouping"
            )
        if self.tokens and self.previous:
            self.projector_norm = layer_norm("projector_norm")
            kind = (self.activation, self.dtype)
            self.projector_mlp = Mlp(
                self.width // 2, self.tokens, *kind, True, self.initializer_range, name="projector"
            )
        self.blocks = [
            EncoderBlock(
                self.width,
                self.heads,
                self.activation,
                self.dtype,
                self.kernel,
                self.initializer_range,
                name=f"blocks_{i}",
            )
            for i in range(len(self.rates))
        ]

    def __call__(
        self,
        x: Float[AnyArray, "n N c"],
        previous: Float[AnyArray, "n p c"] | None,
        keys: Shaped[Key, " n"] | None = None,
    ) -> tuple[Array, Array | None, Array | None]:
        """One stage.

        Args:
          x: tokens.
          previous: group tokens that left the stage before, if it had any.
          keys: of the examples; None draws no noise and drops no branch.

        Returns:
          (tokens or groups, group tokens, soft assignment [n, G, N]); the last two are None
          without grouping.
        """
        if not self.tokens:
            return self._run_blocks(jnp.asarray(x), keys), None, None
        count = x.shape[1]
        own = jnp.broadcast_to(
            self.group_token.astype(self.dtype)[None], (x.shape[0], self.tokens, self.width)
        )
        if self.previous:
            own = own + self.projector_mlp(self.projector_norm(previous))
        mixed = self._run_blocks(jnp.concatenate([x, own], axis=1), keys)
        x, own = mixed[:, :count], mixed[:, count:]
        noise = None
        if keys is not None:
            noise = gumbel_noise(keys, self.grouping_number, (self.groups, count))
        groups, soft = self.grouping(x, own, noise)
        return groups, own, soft

    def _run_blocks(self, x: Array, keys: Array | None) -> Array:
        if (self.remat or self.scan) and not self.is_initializing():
            return self._scan_blocks(x, keys)
        for i, (block, rate) in enumerate(zip(self.blocks, self.rates, strict=True)):
            factors = None
            if keys is not None and rate > 0:
                factors = branch_factors(keys, self.number + i, rate)
            x = block(x, factors)
        return x

    def _scan_blocks(self, x: Array, keys: Array | None) -> Array:
        """All blocks in one loop over their stacked parameters; see TextTower for the reason."""
        weights = [block.variables["params"] for block in self.blocks]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
        block = self.blocks[0].clone(parent=None, name=None)
        drops = keys if any(self.rates) else None
        numbers = self.number + jnp.arange(len(self.rates))

        def step(x: Array, part: tuple[PyTree, Array, Array]) -> tuple[Array, None]:
            params, number, rate = part
            factors = None if drops is None else branch_factors(drops, number, rate)
            return jnp.asarray(block.apply({"params": params}, x, factors)), None

        if self.remat:
            # Inside a loop nothing can be merged with the forward pass.
            step = jax.checkpoint(step, prevent_cse=False)
        return jax.lax.scan(step, x, (stacked, numbers, jnp.asarray(self.rates)))[0]


class GroupViT(nn.Module):
    """Normalised images -> pooled embedding, groups, and which patch belongs to which group.

    Attributes:
      embed_dim: d of the joint space, reached by a linear projection; 0 for none.
      image_size: input side that the position embeddings belong to; other sizes resize them.
      patch_size, width, heads, activation: as in the paper; the MLPs have 4 width.
      depths: blocks of each stage.
      group_tokens, output_groups: of each stage; 0 in the last, which groups nothing.
      drop_path: rate of stochastic depth of the last block; it grows linearly from 0.
      initializer_range: standard deviation of linear maps and group tokens at the start. 0.02, the
        public model's, is for its width of 384: a width of 64 hardly starts to learn with it.
      dtype: of the compute; parameters, LayerNorm, softmax and assignments are float32.
      attention: "xla" or "cudnn" for the blocks, see transformer.attend.
      remat, scan: see Stage.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    width: int
    heads: int
    depths: tuple[int, ...]
    group_tokens: tuple[int, ...]
    output_groups: tuple[int, ...]
    drop_path: float
    activation: str
    initializer_range: float = INIT_STD
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: bool = False
    scan: bool = False

    def setup(self):
        bound = (3 * self.patch_size**2) ** -0.5
        self.patch_embedding = nn.Conv(
            self.width,
            (self.patch_size, self.patch_size),
            strides=(self.patch_size, self.patch_size),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=uniform_within(bound),
            bias_init=uniform_within(bound),
            name="patch_embedding",
        )
        self.patch_norm = layer_norm("patch_norm")
        side = self.image_size // self.patch_size
        normal = nn.initializers.normal
        self.positional_embedding = self.param(
            "positional_embedding", normal(0.02), (side**2, self.width)
        )
        rates = np.linspace(0, self.drop_path, sum(self.depths)).tolist()
        starts = np.cumsum((0, *self.depths)).tolist()
        self.stages = [
            Stage(
                self.width,
                self.heads,
                self.activation,
                self.group_tokens[i],
                self.output_groups[i],
                self.group_tokens[i - 1] if i else 0,
                tuple(rates[starts[i] : starts[i + 1]]),
                starts[i],
                starts[-1] + i,
                self.dtype,
                self.attention,
                self.remat,
                self.scan,
                self.initializer_range,
                name=f"stage_{i}",
            )
            for i in range(len(self.depths))
        ]
        self.norm = layer_norm("norm")
        if self.embed_dim:
            self.proj = self.param("proj", normal(self.width**-0.5), (self.width, self.embed_dim))

    def __call__(
        self, x: Float[AnyArray, "n H W 3"], keys: Shaped[Key, " n"] | None = None
    ) -> Grouped:
        """The groups of normalised images.

        Args:
          x: normalised images.
          keys: of the examples, for Gumbel noise and stochastic depth; None for evaluation.

        Raises:
          UserError: H or W is no multiple of the patch size.
        """
        patch = self.patch_size
        if x.shape[1] % patch or x.shape[2] % patch:
            raise UserError(
                f"data.image_size: {x.shape[1]}x{x.shape[2]} is no multiple of GroupViT's patch "
                f"size {patch}; choose one"
            )
        grid = (x.shape[1] // patch, x.shape[2] // patch)
        x = self.patch_embedding(x).reshape(x.shape[0], -1, self.width)
        x = (self.patch_norm(x) + self._positions(grid)[None]).astype(self.dtype)
        tokens, assignment = None, None
        for stage in self.stages:
            x, tokens, soft = stage(x, tokens, keys)
            if soft is not None:
                soft = soft.swapaxes(1, 2)
                assignment = soft if assignment is None else assignment @ soft
        assert assignment is not None  # `validate` wants one stage that groups
        groups = self.norm(x)
        pooled, groups = groups.mean(axis=1), groups.astype(self.dtype)
        if self.embed_dim:
            proj = self.proj.astype(self.dtype)
            pooled, groups = (pooled.astype(self.dtype) @ proj).astype(jnp.float32), groups @ proj
        return Grouped(pooled, groups, assignment)

    def _positions(self, grid: tuple[int, int]) -> Float[Array, "hw c"]:
        """The position embeddings of a grid, resized as torch's bicubic interpolation does."""
        side = self.image_size // self.patch_size
        if grid == (side, side):
            return jnp.asarray(self.positional_embedding)
        rows, columns = (jnp.asarray(bicubic_matrix(side, target)) for target in grid)
        square = self.positional_embedding.reshape(side, side, self.width)
        return jnp.einsum("yi,xj,ijc->yxc", rows, columns, square).reshape(-1, self.width)

"""CLIP's causal text transformer, for token ids and for prompt embeddings alike.

Causality makes any T from the EOS position on give the same feature, so callers may cut texts to
the longest EOS of the batch instead of the full context length.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from trm_jax.models import AnyArray
from trm_jax.models.clip.transformer import Block, layer_norm
from trm_jax.types import PyTree, UserError


class TextTower(nn.Module):
    """Token embedding, causal transformer, projection of the EOS position.

    Attributes:
      embed_dim: d of the joint space, reached by a linear projection; 0 leaves it out, and the
        features are those of the EOS position, of `width` channels.
      vocab_size, context_length, width, heads, layers, activation: as in CLIP.
      eos_id: the token whose first position is read out.
      dtype: of the compute.
      remat: keep only the inputs of the blocks for the backward pass, and recompute the rest.
    """

    embed_dim: int
    vocab_size: int
    context_length: int
    width: int
    heads: int
    layers: int
    activation: str
    eos_id: int
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        normal = nn.initializers.normal
        self.token_embedding = self.param(
            "token_embedding", normal(0.02), (self.vocab_size, self.width)
        )
        self.positional_embedding = self.param(
            "positional_embedding", normal(0.01), (self.context_length, self.width)
        )
        self.resblocks = [
            Block(
                self.width,
                self.heads,
                self.layers,
                self.activation,
                self.dtype,
                name=f"resblocks_{i}",
            )
            for i in range(self.layers)
        ]
        self.ln_final = layer_norm("ln_final")
        if self.embed_dim:
            self.text_projection = self.param(
                "text_projection", normal(self.width**-0.5), (self.width, self.embed_dim)
            )

    def embed_tokens(self, tokens: Int[AnyArray, "*n T"]) -> Float[Array, "*n T w"]:
        """Rows of the token embedding, float32, without positions."""
        return jnp.asarray(self.token_embedding)[tokens]

    def encode_prompts(
        self, embeddings: Float[AnyArray, "n T w"], eos: Int[AnyArray, " n"]
    ) -> Float[Array, "n d"]:
        """Text features of token embeddings, read at position `eos` of each row.

        Raises:
          UserError: T exceeds the context length.
        """
        length = embeddings.shape[1]
        if length > self.context_length:
            raise UserError(
                f"a text of {length} tokens exceeds model.clip.text.context_length "
                f"{self.context_length}; shorten the texts"
            )
        x = jnp.asarray(embeddings + self.positional_embedding[:length][None], self.dtype)
        causal = jnp.tril(jnp.ones((length, length), bool))
        if self.remat and not self.is_initializing():
            x = self._scan_blocks(x, causal[None])
        else:
            for block in self.resblocks[:-1]:
                x = block(x, causal[None])
        x = self.resblocks[-1].read(x, eos, causal[eos])
        x = self.ln_final(x)
        if not self.embed_dim:
            return x
        x = x.astype(self.dtype)
        return (x @ self.text_projection.astype(self.dtype)).astype(jnp.float32)

    def _scan_blocks(self, x: Array, mask: Array) -> Array:
        """All blocks but the last, one after the other, each recomputed in the backward pass.

        A loop, since a compiler that sees twelve blocks in a row may recompute all of them before
        it uses the first, and so keep what rematerialisation should free.
        """
        blocks = self.resblocks[:-1]
        if not blocks:
            return x
        weights = [block.variables["params"] for block in blocks]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
        block = blocks[0].clone(parent=None, name=None)

        def step(x: Array, params: PyTree) -> tuple[Array, None]:
            return jnp.asarray(block.apply({"params": params}, x, mask)), None

        # Inside a loop nothing can be merged with the forward pass.
        return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), x, stacked)[0]

    def __call__(self, tokens: Int[AnyArray, "n T"]) -> Float[Array, "n d"]:
        """Text features of token ids at the first EOS (the last position if there is none)."""
        is_eos = tokens == self.eos_id
        eos = jnp.where(is_eos.any(axis=1), is_eos.argmax(axis=1), tokens.shape[1] - 1)
        return self.encode_prompts(self.embed_tokens(tokens), eos)

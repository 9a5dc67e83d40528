"""BERT as the text side of matching models.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", NAACL 2019. MiniLM and others of the family differ in size alone.
`pretrained/convert_bert.py` reads published weights.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trm_jax.losses.cosine import normalize
from trm_jax.models import AnyArray
from trm_jax.models.clip.transformer import attend
from trm_jax.models.grouping import INIT_STD, Mlp, linear
from trm_jax.types import UserError


def _layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-12, dtype=jnp.float32, use_fast_variance=False, name=name)


class BertBlock(nn.Module):
    """LN(x + attention(x)), then LN(x + MLP(x)): the norms come last, unlike CLIP's.

    Attributes:
      width, heads, hidden: of the stream, the attention and the MLP.
      dropout: of both branches.
      dtype: of the compute; parameters, LayerNorm, softmax and the stream are float32.
    """

    width: int
    heads: int
    hidden: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "m T w"], mask: Bool[AnyArray, "m T"], *, train: bool = False
    ) -> Float[Array, "m T w"]:
        """No token looks where `mask` is false."""
        heads = (self.heads, self.width // self.heads)
        tokens = jnp.asarray(x, self.dtype)
        query, key, value = (
            linear(self.width, self.dtype, name, INIT_STD)(tokens).reshape(*x.shape[:2], *heads)
            for name in ("query", "key", "value")
        )
        seen = jnp.broadcast_to(mask[:, None], (*mask.shape, mask.shape[1]))
        branch = attend(query, key, value, seen).reshape(x.shape)
        branch = linear(self.width, self.dtype, "out", INIT_STD)(branch)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = _layer_norm("attention_norm")(x + drop(branch))
        mlp = Mlp(self.hidden, self.width, "gelu", self.dtype, name="mlp")
        return _layer_norm("mlp_norm")(x + drop(mlp(x)))


class BertEncoder(nn.Module):
    """Embeddings of words, positions and the first segment, then blocks; no pooler.

    Attributes:
      config: vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size,
        max_position_embeddings and type_vocab_size, as in transformers' BertConfig.
      dropout: of the embeddings and of each branch of a block, in training (0.1 in BERT, which
        drops attention weights as well).
      dtype: of the compute.
    """

    config: Mapping[str, int]
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[AnyArray, "m T"], mask: Bool[AnyArray, "m T"], *, train: bool = False
    ) -> Float[Array, "m T w"]:
        """The last hidden states, float32; those at padding mean nothing.

        Args:
          tokens: ids below vocab_size.
          mask: true at the tokens of a text.
          train: whether dropout is on; needs the random stream "dropout".

        Raises:
          UserError: the texts have more positions than the model, or the width is no multiple of
            the heads.
        """
        length, sizes = tokens.shape[1], self.config
        most, width = sizes["max_position_embeddings"], sizes["hidden_size"]
        if length > most:
            raise UserError(
                f"a text of {length} tokens exceeds max_position_embeddings {most} of the BERT; "
                "shorten the texts"
            )
        heads = sizes["num_attention_heads"]
        if width % heads:
            raise UserError(
                f"hidden_size {width} of the BERT is no multiple of num_attention_heads {heads}"
            )
        words = self._table("word_embedding", sizes["vocab_size"])[tokens]
        places = self._table("position_embedding", most)[:length]
        segment = self._table("type_embedding", sizes["type_vocab_size"])[:1]
        x = _layer_norm("norm")(words + (places + segment)[None])
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        hidden = sizes["intermediate_size"]
        for number in range(sizes["num_hidden_layers"]):
            name = f"blocks_{number}"
            block = BertBlock(width, heads, hidden, self.dropout, self.dtype, name=name)
            x = block(x, mask, train=train)
        return x

    def _table(self, name: str, rows: int) -> Array:
        init = nn.initializers.normal(INIT_STD)
        return jnp.asarray(self.param(name, init, (rows, self.config["hidden_size"])))


class BertText(nn.Module):
    """A BERT, a linear map of each token to the joint space, unit norm.

    Attributes:
      config: of the BertEncoder, as `pretrained/convert_bert.py` reads it.
      features: d of the joint space.
      dropout: of the BERT.
      dtype: of the compute; the norm is float32.
    """

    config: Mapping[str, int]
    features: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[AnyArray, "m T"], mask: Bool[AnyArray, "m T"], *, train: bool = False
    ) -> Float[Array, "m T d"]:
        """Token vectors of unit norm, float32, zero at padding; see BertEncoder.

        Raises:
          UserError: as BertEncoder.
        """
        bert = BertEncoder(self.config, self.dropout, self.dtype, name="bert")
        x = bert(tokens, mask, train=train)
        init = nn.initializers.xavier_uniform()
        x = nn.Dense(self.features, dtype=self.dtype, kernel_init=init, name="projection")(x)
        return jnp.where(mask[..., None], normalize(x), 0.0)

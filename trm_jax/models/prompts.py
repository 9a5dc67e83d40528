"""Dual learnable prompts: one positive and one negative context per class.

The prompt of class c is [SOS][w_1 .. w_L][class name][.][EOS]; only the contexts w are trained
(CoOp, Zhou et al. 2022; DualCoOp, Sun et al. 2022). Since the text tower is causal, prompts are cut
at the longest EOS instead of being padded to the full context length. With the name in both
prompts, their difference says nothing before training: what the towers know of the name cancels.
A negative prompt without the name keeps that knowledge, which decides where a class has few known
labels or none.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from trm_jax.models import AnyArray
from trm_jax.types import UserError


def class_token_ids(names: Sequence[str], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of what follows the context: the class name, a full stop, EOS.

    Args:
      names: class names; "_" reads as a space.
      tokenizer: has `encode(text) -> list[int]` (no SOS, no EOS) and `eos_id`.

    Returns:
      (ids [C, S] int32 padded with 0, lengths [C] int32 that count name, "." and EOS).
    """
    rows = [[*tokenizer.encode(name.replace("_", " ") + "."), tokenizer.eos_id] for name in names]
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), int(lengths.max(initial=0))), np.int32)
    for row, padded in zip(rows, ids, strict=True):
        padded[: len(row)] = row
    return ids, lengths


def prompt_length(
    names: Sequence[str],
    lengths: np.ndarray,
    *,
    context: int,
    context_length: int,
) -> int:
    """The static T of all prompts: SOS + context + longest name part, rounded up to 8.

    Args:
      names: class names, for the message.
      lengths: [C] from `class_token_ids`.
      context: learnable tokens of each prompt.
      context_length: positions that the text tower has; bounds the rounding.

    Raises:
      UserError: a prompt does not fit; names the class.
    """
    longest = int(np.argmax(lengths))
    tokens = 1 + context + int(lengths[longest])
    if tokens > context_length:
        raise UserError(
            f"class name {names[longest]!r} makes a prompt of {tokens} tokens, over "
            f"model.clip.text.context_length {context_length}; shorten the name or the context"
        )
    return min(-(-tokens // 8) * 8, context_length)


class DualPrompts(nn.Module):
    """The contexts of C classes and the assembly of their prompts.

    Attributes:
      num_classes: C.
      width: w of the text tower.
      length: context tokens per prompt.
      class_specific: contexts [C, length, w]; otherwise [length, w] shared by all classes.
    """

    num_classes: int
    width: int
    length: int = 16
    class_specific: bool = True

    @nn.compact
    def __call__(
        self,
        prefix: Float[AnyArray, "1 w"],
        name_embeddings: Float[AnyArray, "C2 S w"],
        name_lengths: Int[AnyArray, " C2"],
        total: int,
    ) -> tuple[Float[Array, "C2 T w"], Int[Array, " C2"]]:
        """Prompt embeddings and EOS positions, for `ClipTowers.encode_prompts`.

        Args:
          prefix: embedding of SOS.
          name_embeddings: embeddings of what follows each context (`class_token_ids`), all negative
            prompts first; tokens beyond a name are ignored, since they lie behind its EOS.
          name_lengths: tokens of each name part, EOS included.
          total: T, static, from `prompt_length`.

        Returns:
          (embeddings [2C, T, w], eos [2C]); first all negative prompts, then all positive ones.
        """
        count = self.num_classes
        shape = (self.length, self.width)
        if self.class_specific:
            shape = (count, *shape)
        init = nn.initializers.normal(0.02)
        contexts = jnp.stack([self.param(name, init, shape) for name in ("negative", "positive")])
        if not self.class_specific:
            contexts = contexts[:, None]
        contexts = jnp.broadcast_to(contexts, (2, count, self.length, self.width))
        # The context precedes the name, so assembly is a concatenation: no gather, no scatter.
        names = name_embeddings[:, : total - 1 - self.length]
        padding = total - 1 - self.length - names.shape[1]
        names = jnp.pad(names, ((0, 0), (0, padding), (0, 0)))
        embeddings = jnp.concatenate(
            [
                jnp.broadcast_to(prefix, (2 * count, 1, self.width)),
                contexts.reshape(2 * count, self.length, self.width),
                names,
            ],
            axis=1,
        )
        return embeddings, self.length + jnp.asarray(name_lengths)

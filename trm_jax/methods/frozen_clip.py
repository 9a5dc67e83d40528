"""What prompt-tuning methods share: a frozen CLIP, dual prompts per class, dense image features.

The classifier of every such method is the text tower's answer to learned prompts, so the image
side never needs a gradient and the text side passes one through frozen weights to the prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trm_jax.losses.cosine import normalize
from trm_jax.models import prompts as prompt_models
from trm_jax.models.clip import towers
from trm_jax.models.placement import replicated, sharded_rows
from trm_jax.types import Array, ArraySpec, Batch, BatchSpec, DataInfo, Key, PyTree, UserError


class Prompts(NamedTuple):
    """The learnable prompts of a method (models/prompts.py)."""

    length: int = 16  # context tokens of each prompt
    class_specific: bool = True  # a context per class and sign, or one pair for all classes
    negative_names: bool = True  # the negative prompts carry the class name too (the papers)
    initial_words: str = ""  # `length` tokens from which contexts start; "": N(0, 0.02^2)
    remat: bool = False  # keep only the text blocks' inputs for the backward pass


class FrozenClip(NamedTuple):
    """Towers, prompts and the constant token ids of the class names.

    inputs: the image entry of a batch ("image", "features" or "dense") and its ArraySpec.
    """

    config: Mapping[str, Any]
    towers: Any
    prompts: prompt_models.DualPrompts
    prompt_length: int
    inputs: BatchSpec
    sos_id: int
    name_ids: Array  # [2C, S] tokens of "{name}." and EOS, zero padded; negative prompts first
    name_lengths: Array  # [2C]
    photo_ids: Array  # [C, T] "a photo of a {name}."
    context_ids: Array  # [L] tokens of `Prompts.initial_words`, [0] without
    grid: tuple[int, int]  # positions of a dense map

    def init(self, key: Key, *, pretrained: PyTree | None) -> dict[str, PyTree]:
        """Params {"clip": variables, "prompts": ...}; `pretrained` None draws random towers."""
        clip_key, prompt_key = jax.random.split(key)
        variables = towers.init(self.config, clip_key) if pretrained is None else pretrained
        constants = self._constants(variables)
        arguments = (*constants, self.name_lengths, self.prompt_length)
        prompts = self.prompts.init(prompt_key, *arguments)["params"]
        if self.context_ids.size:
            words = self.towers.apply(variables, self.context_ids, method="embed_tokens")
            prompts = jax.tree.map(lambda drawn: jnp.broadcast_to(words, drawn.shape), prompts)
        return {"clip": variables, "prompts": prompts}

    def image_features(self, params: PyTree, batch: Batch) -> tuple[Array, Array]:
        """(dense [n, hw, d], pooled [n, d]) in the joint space, without gradient."""
        if "dense" in batch:
            # Cached features are those of the compute dtype: cast back, they lose nothing.
            return batch["dense"].astype(self.towers.dtype), batch["global_embedding"]
        images = batch["image"] if "image" in batch else batch["features"]
        pooled, dense = self.towers.apply(params["clip"], images, method="encode_image")
        return jax.lax.stop_gradient((dense, pooled))

    def text_features(self, params: PyTree) -> tuple[Array, Array]:
        """(negative [C, d], positive [C, d]): the text tower's answer to the two prompts."""
        prefix, names = self._constants(params["clip"])
        embeddings, eos = self.prompts.apply(
            {"params": params["prompts"]}, prefix, names, self.name_lengths, self.prompt_length
        )
        # Every device encodes its share of the prompts, not all of them.
        embeddings, eos = jax.tree.map(sharded_rows, (embeddings, eos))
        features = self.towers.apply(params["clip"], embeddings, eos, method="encode_prompts")
        negative, positive = jnp.split(replicated(features.astype(jnp.float32)), 2)
        return negative, positive

    def cacheable(self, params: PyTree, batch: Batch) -> dict[str, Array]:
        """{"dense" [n, hw, d], "global_embedding" [n, d]}, for the feature cache."""
        dense, pooled = self.image_features(params, batch)
        return {"dense": dense, "global_embedding": pooled}

    def prepared(self, params: PyTree) -> dict[str, Array]:
        """{"text_negative", "text_positive"} [C, d]: what "prepare" predicts."""
        negative, positive = self.text_features(params)
        return {"text_negative": negative, "text_positive": positive}

    def photo_features(self, params: PyTree) -> Array:
        """[C, d] unit-norm text features of "a photo of a {name}."."""
        return self.encode_unit(params["clip"], self.photo_ids)

    def encode_unit(self, variables: PyTree, tokens: Array) -> Array:
        """[m, T] tokens -> [m, d] unit-norm text features."""
        features = self.towers.apply(variables, tokens, method="encode_text")
        return normalize(features)

    def _constants(self, variables: PyTree) -> tuple[Array, Array]:
        embed = lambda ids: self.towers.apply(variables, ids, method="embed_tokens")  # noqa: E731
        return embed(jnp.full((1, 1), self.sos_id, jnp.int32))[0], embed(self.name_ids)


def make(
    info: DataInfo,
    tokenizer,
    clip: Mapping[str, Any],
    inputs: BatchSpec,
    grid: tuple[int, int],
    prompts: Prompts,
    dtype,
) -> FrozenClip:
    """Builds the shared part of a prompt-tuning method.

    Args:
      info: class names.
      tokenizer: data.tokenizers.Tokenizer of the text tower.
      clip: towers' config, models/clip/towers.py.
      inputs: the image entry of a batch.
      grid: height and width of its dense map.
      prompts: see `Prompts`.
      dtype: compute dtype.

    Raises:
      UserError: a prompt is too long, or its initial words have another length.
    """
    model = towers.build(clip, dtype=dtype, remat_text=prompts.remat)
    limit = clip["text"]["context_length"]
    names = info.class_names
    context_ids = tokenizer.encode(prompts.initial_words)
    if context_ids and len(context_ids) != prompts.length:
        raise UserError(
            f"prompts.initial_words={prompts.initial_words!r} has {len(context_ids)} tokens; set "
            f"prompts.length, now {prompts.length}, to it"
        )
    negatives = names if prompts.negative_names else [""] * len(names)
    name_ids, lengths = prompt_models.class_token_ids([*negatives, *names], tokenizer)
    return FrozenClip(
        config=clip,
        towers=model,
        prompts=prompt_models.DualPrompts(
            num_classes=len(names),
            width=clip["text"]["width"],
            length=prompts.length,
            class_specific=prompts.class_specific,
        ),
        prompt_length=prompt_models.prompt_length(
            [*negatives, *names], lengths, context=prompts.length, context_length=limit
        ),
        inputs=inputs,
        sos_id=tokenizer.sos_id,
        name_ids=jnp.asarray(name_ids),
        name_lengths=jnp.asarray(lengths),
        photo_ids=jnp.asarray(photo_tokens(names, tokenizer, limit)),
        context_ids=jnp.asarray(context_ids, jnp.int32),
        grid=grid,
    )


def photo_tokens(names: Sequence[str], tokenizer, limit: int):
    """[C, T] tokens of "a photo of a {name}.", no longer than the longest needs."""
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in names]
    longest = max(len(tokenizer.encode(text)) for text in texts) + 2
    return tokenizer(texts, min(limit, -(-longest // 8) * 8))


def batch_specs(inputs: BatchSpec, num_classes: int) -> dict[str, BatchSpec]:
    """Specs of multi-label methods: training needs labels, prediction the image alone."""
    labels = {
        "labels": ArraySpec((None, num_classes), jnp.int8),
        "truth": ArraySpec((None, num_classes), jnp.int8),
        "index": ArraySpec((None,), jnp.int32),
        "valid": ArraySpec((None,), jnp.bool_),
    }
    names = ("scores", "regions", "dense")
    return {"train": {**inputs, **labels}, "eval": {**inputs, **labels}} | dict.fromkeys(
        names, inputs
    )

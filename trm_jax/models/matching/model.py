"""A matching model: region encoder, text encoder and the scorer of their pairs, as one module.

Everything is used through `model.apply(variables, ..., method="encode_image")` and so on. Encoding
is apart from scoring, so that each image and each caption of an evaluation is encoded once.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trm_jax.models import AnyArray
from trm_jax.models.matching import attention
from trm_jax.models.matching.bert import BertText
from trm_jax.models.matching.config import validate
from trm_jax.models.matching.naaf import Naaf
from trm_jax.models.matching.regions import RegionEncoder
from trm_jax.models.matching.scan import Scan
from trm_jax.models.matching.sgraf import Sgraf
from trm_jax.models.matching.text_rnn import TextRnn
from trm_jax.types import Key, PyTree


class MatchingModel(nn.Module):
    """Regions and words in one space, and the scores of their pairs; make it with `build`.

    Attributes:
      config: a configuration returned by `validate`.
      dtype: of the encoders' products; parameters and scores are float32.
    """

    config: Mapping[str, Any]
    dtype: Any = jnp.float32

    def setup(self):
        width, text = self.config["embed_dim"], self.config["text"]
        self.image = RegionEncoder(width, self.dtype)
        if text["kind"] == "bert":
            self.text = BertText(text["bert"], width, text["dropout"], self.dtype)
        else:
            self.text = TextRnn(
                text["vocab_size"], width, text["embedding"], text["dropout"], self.dtype
            )
        self.scorer = _scorer(self.config)

    def encode_image(self, features: Float[AnyArray, "n r D"]) -> Float[Array, "n r d"]:
        """Unit region vectors."""
        return self.image(features)

    def encode_text(
        self, tokens: Int[AnyArray, "m T"], train: bool = False
    ) -> tuple[Float[Array, "m T d"], Bool[Array, "m T"]]:
        """(unit word vectors, zero at padding; which tokens are real). Training needs "dropout"."""
        mask = jnp.asarray(tokens) != 0
        return self.text(tokens, mask, train=train), mask

    def prepare_images(
        self,
        regions: Float[AnyArray, "n r d"],
        train: bool = False,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> Float[Array, "n g"]:
        """What the scorer reads of whole images, once for all captions: [n, d], or nothing [n, 0].

        Args:
          regions: of unit norm, the whole batch in training: SGRAF takes batch statistics here.
          train: use and update them; needs "dropout".
          where: images that count in them.
        """
        if self.config["kind"] != "sgraf":
            return jnp.zeros((regions.shape[0], 0))
        return self.scorer.prepare_images(regions, train, where)

    def prepare_captions(
        self, words: Float[AnyArray, "m T d"], mask: Bool[AnyArray, "m T"], train: bool = False
    ) -> Float[Array, "m g"]:
        """The same of whole captions; training needs "dropout"."""
        if self.config["kind"] != "sgraf":
            return jnp.zeros((words.shape[0], 0))
        return self.scorer.prepare_captions(words, mask, train)

    def score(
        self,
        regions: Float[AnyArray, "n r d"] | attention.Prepared,
        image_global: Float[AnyArray, "n g"],
        words: Float[AnyArray, "m T d"] | attention.Prepared,
        mask: Bool[AnyArray, "m T"],
        caption_global: Float[AnyArray, "m g"],
        threshold: Float[AnyArray, " m"],
        train: bool = False,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> tuple[Float[Array, "n m"], Float[Array, "m s"]]:
        """Scores of all pairs.

        Args:
          regions, words: as encoded, or prepared. mask: true at real words.
          image_global, caption_global: from `prepare_images` and `prepare_captions`.
          threshold: of each caption, for NAAF.
          train: SAF takes statistics over the images for each caption.
          where: images that count in them.

        Returns:
          (scores; SAF's statistics of each caption [m, 2] in training, else [m, 0]).
        """
        kind, none = self.config["kind"], jnp.zeros((mask.shape[0], 0))
        if kind == "scan":
            return self.scorer(regions, words, mask, train=train), none
        if kind == "naaf":
            return self.scorer(regions, words, mask, threshold=threshold, train=train), none
        scores, statistics = self.scorer(
            regions,
            image_global,
            words,
            mask,
            caption_global=caption_global,
            train=train,
            where=where,
        )
        return scores, none if statistics is None else statistics

    def attend(
        self,
        regions: Float[AnyArray, "n r d"],
        words: Float[AnyArray, "n T d"],
        mask: Bool[AnyArray, "n T"],
    ) -> tuple[Float[Array, "n T r"], Float[Array, "n T d"]]:
        """What each word sees of its own image, by text-to-image attention (lambda 9).

        Of all scorers alike: SCAN i2t evaluates it for the nouns alone.

        Returns:
          (weights over the regions, contexts of unit norm), 0 at padding.
        """
        return attention.matched_attention(regions, words, mask)

    def __call__(self, features: AnyArray, tokens: Int[AnyArray, "m T"]) -> Float[Array, "n m"]:
        """Scores in evaluation; touches every parameter."""
        regions = self.encode_image(features)
        words, mask = self.encode_text(tokens)
        images, captions = self.prepare_images(regions), self.prepare_captions(words, mask)
        return self.score(regions, images, words, mask, captions, jnp.zeros(len(words)))[0]


def build(config: Any, *, dtype: Any = jnp.float32) -> MatchingModel:
    """The model that `config` describes (see `validate`, which may raise UserError)."""
    return MatchingModel(validate(config), dtype)


def init(model: MatchingModel, key: Key) -> dict[str, PyTree]:
    """Freshly initialised variables {"params", "batch_stats" (if there are any)}."""
    image = model.config["image"]
    features = jnp.zeros((1, image["regions"], image["width"]))
    return jax.jit(model.init)(key, features, jnp.ones((1, 3), jnp.int32))


def in_blocks(
    function: Callable[..., tuple[Array, Array]],
    images: tuple[Array, ...],
    captions: tuple[Array, ...],
    *,
    block: int,
    image_block: int = 0,
) -> tuple[Float[Array, "n m"], Float[Array, "m s"]]:
    """Scores of all images with all captions, so many at a time; the gradient scores them again.

    Args:
      function: (*images, *captions) of two blocks -> (scores [a, b], statistics [b, s]). It gets
        regions and words prepared, each once: blocks do not prepare them anew.
      images: regions [n, r, d], then other arrays [n, ...].
      captions: words [m, T, d], mask [m, T], then other arrays [m, ...].
      block: captions of a block, 0 for all at once. The last one is filled up with zeros.
      image_block: the same of images; only for a function without statistics (s = 0), which would
        be those of a block.

    Returns:
      (scores [n, m], statistics [m, s]).
    """
    count, texts = images[0].shape[0], captions[0].shape[0]
    every_image = _cut(images, image_block)
    words, mask, *caption_parts = _cut(captions, block)
    every_caption = (jax.vmap(attention.prepare_words)(words, mask), mask, *caption_parts)
    several = every_image[0].shape[0] > 1

    def of_images(part: tuple) -> tuple[Array, Array]:
        part = (attention.prepare(part[0]), *part[1:])
        scores, statistics = _each(lambda other: function(*part, *other), every_caption, True)
        if several and statistics.size:
            raise ValueError("statistics over the images need image_block=0")
        scores = scores.swapaxes(0, 1).reshape(scores.shape[1], -1)[:, :texts]
        width = statistics.shape[-1]  # which may be 0
        return scores, statistics.reshape(math.prod(statistics.shape[:2]), width)[:texts]

    scores, statistics = _each(of_images, every_image, False)
    return scores.reshape(-1, texts)[:count], statistics[0]


def _cut(arrays: tuple[Array, ...], size: int) -> tuple[Array, ...]:
    """Arrays [n, ...] as [blocks, size, ...], filled up with zeros; 0 is one block."""
    count = arrays[0].shape[0]
    size = min(size or count, count)
    number = -(-count // size)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, number * size - count), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(number, size, *x.shape[1:])

    return tuple(map(cut, arrays))


def _each(function: Callable, parts: PyTree, again: bool) -> PyTree:
    """`function` of every part, stacked, in a loop if there are several; `again`: the gradient
    computes them anew."""
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        found = function(jax.tree.map(lambda x: x[0], parts))
        return jax.tree.map(lambda x: x[None], found)
    body = jax.checkpoint(function, prevent_cse=False) if again else function
    return jax.lax.map(body, parts)


def _scorer(config: Mapping[str, Any]) -> nn.Module:
    scorer = dict(config["scorer"])
    if config["kind"] == "scan":
        for name in ("attention_scale", "lse_scale"):
            scorer[name] = scorer[name] or None
        return Scan(**scorer)
    if config["kind"] == "naaf":
        del scorer["threshold_update"]  # of the state, see methods/pair_models.py
        return Naaf(**scorer)
    return Sgraf(**scorer, num_regions=config["image"]["regions"])

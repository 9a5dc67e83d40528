"""SGRAF: similarity vectors of the words and of the whole, reasoned over (SGR) or filtered (SAF).

Source: Diao et al., "Similarity Reasoning and Filtration for Image-Text Matching", AAAI 2021. Where
paper and public program differ, this is the program. Left out are the biases of logits that a
softmax or a batch norm cancels, and the division of SAF's gates by their sum, which the unit norm
after it cancels. The table of NAPReg has the mean of two models, one of each module.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from trm_jax.losses.cosine import normalize
from trm_jax.models import AnyArray
from trm_jax.models.matching.attention import (
    Prepared,
    attention,
    prepare,
    prepare_words,
    similarities,
    squared_norms,
)
from trm_jax.types import PyTree, UserError

_EPSILON = 1e-5
_MOMENTUM = 0.9
_XAVIER = nn.initializers.xavier_uniform()
_TINY = 1e-12
MODULES = ("sgr", "saf")


def fold_statistics(
    running: Float[AnyArray, " 2"],
    statistics: Float[AnyArray, "m 2"],
    where: Bool[AnyArray, " m"] | None = None,
) -> Float[Array, "2"]:
    """Running statistics after the captions of a batch: r <- 0.9 r + 0.1 s for each, in order.

    Args:
      running: mean and variance before the batch.
      statistics: of each caption, in the order of the batch, from `Sgraf`.
      where: captions that count (all); those without words must not.
    """
    statistics = jnp.asarray(statistics)
    where = jnp.ones(statistics.shape[0], bool) if where is None else jnp.asarray(where)
    after = jnp.cumsum(where[::-1])[::-1] - where  # captions that count, later than this one
    shares = jnp.where(where, (1.0 - _MOMENTUM) * _MOMENTUM**after, 0.0)
    kept = _MOMENTUM ** where.sum()
    new = jnp.sum(jnp.where(where[:, None], shares[:, None] * statistics, 0.0), axis=0)
    return kept * jnp.asarray(running) + new


def with_statistics(
    batch_stats: Mapping[str, PyTree],
    statistics: Float[AnyArray, "m 2"],
    where: Bool[AnyArray, " m"] | None = None,
) -> dict[str, PyTree]:
    """A copy of the module's collection "batch_stats" with SAF's statistics folded in."""
    running = batch_stats["filtration"]["running"]
    new = {**batch_stats["filtration"], "running": fold_statistics(running, statistics, where)}
    return {**batch_stats, "filtration": new}


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but one, as torch has it.

    The batch is normalised by its biased variance; the running one (rate 0.1) is unbiased.

    Attributes:
      size: of the axis that is kept.
      axis: that axis.
    """

    size: int
    axis: int

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "n *rest"], train: bool, where: Bool[AnyArray, " n"] | None = None
    ) -> Float[Array, "n *rest"]:
        """Normalised x; in training the rows `where` count, and "batch_stats" must be mutable."""
        x = jnp.asarray(x)
        shape = [1] * x.ndim
        shape[self.axis] = self.size
        scale = self.param("scale", nn.initializers.ones, (self.size,))
        bias = self.param("bias", nn.initializers.zeros, (self.size,))
        running = self.variable("batch_stats", "mean", jnp.zeros, (self.size,))
        spread = self.variable("batch_stats", "var", jnp.ones, (self.size,))
        mean, var = running.value, spread.value
        if train:
            axes = tuple(i for i in range(x.ndim) if i != self.axis)
            rows = jnp.ones(x.shape[0], bool) if where is None else jnp.asarray(where)
            rows = rows.reshape(-1, *[1] * (x.ndim - 1))
            count = jnp.maximum(rows.sum(), 1) * (x.size // (x.shape[0] * self.size))
            mean = jnp.sum(x, axes, where=rows) / count
            var = jnp.sum((x - mean.reshape(shape)) ** 2, axes, where=rows) / count
            if not self.is_initializing():
                unbiased = var * (count / jnp.maximum(count - 1, 1))
                running.value = _MOMENTUM * running.value + (1 - _MOMENTUM) * mean
                spread.value = _MOMENTUM * spread.value + (1 - _MOMENTUM) * unbiased
        factor = scale * jax.lax.rsqrt(var + _EPSILON)
        return (x - mean.reshape(shape)) * factor.reshape(shape) + bias.reshape(shape)


class GlobalVector(nn.Module):
    """One vector of a set: its members' weighted sum, weighed against their mean; unit norm.

    Attributes:
      dropout: of both projections, in training.
      slots: the number of members if they are regions, whose projections are batch-normalised
        for each place in the set; 0 for words.
    """

    dropout: float
    slots: int = 0

    @nn.compact
    def __call__(
        self,
        members: Float[AnyArray, "n k d"],
        mask: Bool[AnyArray, "n k"] | None = None,
        *,
        train: bool = False,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> Float[Array, "n d"]:
        """The vectors; zero where `mask` has no member."""
        width = members.shape[-1]
        mask = jnp.ones(members.shape[:2], bool) if mask is None else jnp.asarray(mask)
        mean = members.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)[:, None]
        local = nn.Dense(width, kernel_init=_XAVIER, name="local")(members)
        whole = nn.Dense(width, kernel_init=_XAVIER, name="whole")(mean)
        if self.slots:
            local = BatchNorm(self.slots, 1, name="local_norm")(local, train, where)
            whole = BatchNorm(width, 1, name="whole_norm")(whole, train, where)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        product = drop(jnp.tanh(local)) * drop(jnp.tanh(whole))[:, None]
        logits = nn.Dense(1, use_bias=False, kernel_init=_XAVIER, name="logit")(product)[..., 0]
        weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(logits.dtype).min), axis=1)
        return normalize(jnp.sum(weights[..., None] * members, axis=1))


class GraphStep(nn.Module):
    """Similarity vectors look at each other, by an unscaled softmax, and are mapped on.

    Attributes:
      width: of the vectors.
    """

    width: int

    @nn.compact
    def __call__(
        self, nodes: Float[AnyArray, "n m k s"], mask: Bool[AnyArray, "m k"], readers: int
    ) -> Float[Array, "n m readers s"]:
        """The first `readers` nodes after the step, which saw all nodes of `mask`."""
        query, key = (self.param(x, _XAVIER, (self.width, self.width)) for x in ("query", "key"))
        query_bias = self.param("query_bias", nn.initializers.zeros, (self.width,))
        # (W_q x_i + b_q)(W_k x_j + b_k): one product instead of two when W_k is folded into W_q.
        # What depends on i alone, b_k, falls out of the softmax.
        asking = nodes[:, :, :readers] @ (query @ key.T) + (query_bias @ key.T)[None, None, None]
        edges = jnp.einsum("nmis,nmjs->nmij", asking, nodes)
        lowest = jnp.finfo(edges.dtype).min
        edges = jax.nn.softmax(jnp.where(mask[None, :, None], edges, lowest), axis=-1)
        seen = jnp.einsum("nmij,nmjs->nmis", edges, nodes)
        return nn.relu(nn.Dense(self.width, kernel_init=_XAVIER, name="out")(seen))


class Filtration(nn.Module):
    """A gate for each similarity vector, their gated sum, unit norm.

    The gate's batch norm takes its statistics from each caption alone: all images and real words.
    """

    @nn.compact
    def __call__(
        self,
        nodes: Float[AnyArray, "n m k s"],
        mask: Bool[AnyArray, "m k"],
        train: bool,
        where: Bool[AnyArray, " n"] | None,
    ) -> tuple[Float[Array, "n m s"], Float[Array, "m 2"] | None]:
        """(vectors, statistics: mean and unbiased variance of each caption, if it is training)."""
        running = self.variable(
            "batch_stats", "running", lambda: jnp.asarray([0.0, 1.0], jnp.float32)
        )
        scale = self.param("scale", nn.initializers.ones, ())
        bias = self.param("bias", nn.initializers.zeros, ())
        logits = nn.Dense(1, use_bias=False, kernel_init=_XAVIER, name="gate")(nodes)[..., 0]
        mean, var = running.value
        statistics = None
        if train:
            counted = mask[None] if where is None else mask[None] & where[:, None, None]
            counted = jnp.broadcast_to(counted, logits.shape)
            count = jnp.maximum(counted.sum(axis=(0, 2)), 1)
            mean = (jnp.sum(logits, axis=(0, 2), where=counted) / count)[None, :, None]
            var = jnp.sum((logits - mean) ** 2, axis=(0, 2), where=counted) / count
            unbiased = var * (count / jnp.maximum(count - 1, 1))
            statistics = jax.lax.stop_gradient(jnp.stack([mean[0, :, 0], unbiased], axis=1))
            var = var[None, :, None]
        gates = nn.sigmoid((logits - mean) * jax.lax.rsqrt(var + _EPSILON) * scale + bias)
        gates = jnp.where(mask[None], gates, 0.0)
        return normalize(jnp.einsum("nmk,nmks->nms", gates, nodes)), statistics


@jax.custom_vjp
def _contexts(weights, regions):
    """sum_r weights [n, r, k] regions [n, r, d]: [n, k, d]."""
    return jnp.einsum("nrk,nrd->nkd", weights, regions)


def _contexts_forward(weights, regions):
    return _contexts(weights, regions), (weights, regions)


def _contexts_backward(operands, cotangent):
    weights, regions = operands
    # In both products the cotangent lies as it is: transposing the largest array is slow on a CPU.
    to_weights = jnp.einsum("nkd,nrd->nkr", cotangent, regions).swapaxes(1, 2)
    return to_weights, jnp.einsum("nrk,nkd->nrd", weights, cotangent)


_contexts.defvjp(_contexts_forward, _contexts_backward)


class Sgraf(nn.Module):
    """Scores of all pairs of images and captions, in (0, 1).

    Every word and the caption as a whole get a similarity vector with the image, (a - b)^2 W of
    unit norm: of the word and what it attends to (SCAN's text-to-image attention), and of both
    sides' global vectors. "sgr" lets them look at each other and reads the global one; "saf" sums
    them with gates. A linear map and a sigmoid make the score.

    What no pair needs is computed once for a batch: `prepare_images` and `prepare_captions`, with
    all randomness and the images' batch statistics. The rest is a function of a block of captions.

    Attributes:
      num_regions: r; the batch norm of the images' global vectors has a scale for each region.
      module: "sgr" or "saf".
      sim_dim: width of the similarity vectors.
      steps: of SGR.
      dropout: in the global vectors.
      attention_scale: of the softmax over regions.
      precision: of the products on an accelerator: "highest" is float32, as torch's default is;
        "high" and "default" are faster there. Similarities of words and regions are always exact.
    """

    num_regions: int
    module: str = "sgr"
    sim_dim: int = 256
    steps: int = 3
    dropout: float = 0.4
    attention_scale: float = 9.0
    precision: str = "highest"

    def setup(self):
        if self.module not in MODULES:
            raise UserError(f"scorer.module = {self.module!r} must be one of {', '.join(MODULES)}")
        self.image_global = GlobalVector(self.dropout, self.num_regions)
        self.caption_global = GlobalVector(self.dropout)
        self.local_similarity = nn.Dense(self.sim_dim, kernel_init=_XAVIER)
        self.global_similarity = nn.Dense(self.sim_dim, kernel_init=_XAVIER)
        self.score = nn.Dense(1, kernel_init=_XAVIER)
        if self.module == "sgr":
            self.reasoning = [GraphStep(self.sim_dim) for _ in range(self.steps)]
        else:
            self.filtration = Filtration()

    def prepare_images(
        self,
        regions: Float[AnyArray, "n r d"],
        train: bool = False,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> Float[Array, "n d"]:
        """Global vectors of images, of unit norm.

        In training the images `where` make the batch statistics (mutable=["batch_stats"]), and the
        random stream "dropout" is read.

        Raises:
          UserError: an image has another number of regions than the model was built for.
        """
        if regions.shape[1] != self.num_regions:
            raise UserError(
                f"images have {regions.shape[1]} regions, the model was built for "
                f"{self.num_regions}; set image.regions to the number of the data"
            )
        with jax.default_matmul_precision(self.precision):
            return self.image_global(regions, train=train, where=where)

    def prepare_captions(
        self,
        words: Float[AnyArray, "m T d"],
        mask: Bool[AnyArray, "m T"],
        train: bool = False,
    ) -> Float[Array, "m d"]:
        """Global vectors of captions, of unit norm; zero without words. Random as for images."""
        words = jnp.where(mask[..., None], words, 0.0)
        with jax.default_matmul_precision(self.precision):
            return self.caption_global(words, mask, train=train)

    def __call__(
        self,
        regions: Float[AnyArray, "n r d"] | Prepared,
        image_global: Float[AnyArray, "n d"] | None,
        words: Float[AnyArray, "m T d"] | Prepared,
        mask: Bool[AnyArray, "m T"],
        *,
        caption_global: Float[AnyArray, "m d"] | None = None,
        train: bool = False,
        where: Bool[AnyArray, " n"] | None = None,
    ) -> tuple[Float[Array, "n m"], Float[Array, "m 2"] | None]:
        """Scores of all images and a block of captions; 0 for a caption without words.

        Args:
          regions: of unit norm; these and words may be prepared, once for many pairs.
          image_global: from `prepare_images`; None: computed here.
          words: of unit norm; padding is never read.
          mask: true at the real words of a caption.
          caption_global: from `prepare_captions`; None: computed here.
          train: whether SAF's gates are normalised by the captions' own statistics.
          where: [n], images that count in those (all).

        Returns:
          (scores, SAF's statistics of each caption in training, for `with_statistics`, else None).
        """
        mask = jnp.asarray(mask)
        images, captions = prepare(regions), prepare_words(words, mask)
        if image_global is None:
            image_global = self.prepare_images(images.vectors, train, where)
        if caption_global is None:
            caption_global = self.prepare_captions(captions.vectors, mask, train)
        with jax.default_matmul_precision(self.precision):
            nodes = self._similarity_vectors(images, image_global, captions, caption_global)
            present = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
            statistics = None
            if self.module == "sgr":
                for step in self.reasoning[:-1]:
                    nodes = step(nodes, present, nodes.shape[2])
                vectors = self.reasoning[-1](nodes, present, 1)[:, :, 0]
            else:
                vectors, statistics = self.filtration(nodes, present, train, where)
            scores = nn.sigmoid(self.score(vectors))[..., 0]
        return jnp.where(mask.any(axis=1)[None], scores, 0.0), statistics

    def _similarity_vectors(
        self,
        images: Prepared,
        image_global: AnyArray,
        captions: Prepared,
        caption_global: AnyArray,
    ) -> Array:
        """[n, m, 1 + T, sim_dim] of unit norm: the global one, then the words'."""
        similarity = similarities(images.vectors, captions.columns)
        weights = attention(similarity, self.attention_scale)
        # The contexts' norm by the Gram matrix: no further sum over their d numbers.
        norms = jnp.maximum(squared_norms(weights, images.gram), _TINY)
        weights = (weights * jax.lax.rsqrt(norms)[:, None]).swapaxes(2, 3)  # [n, r, m, T]
        n, r, m, length = weights.shape
        contexts = _contexts(weights.reshape(n, r, m * length), images.vectors)
        local = (contexts.reshape(n, m, length, -1) - captions.vectors[None]) ** 2
        whole = (image_global[:, None] - caption_global[None]) ** 2
        local, whole = self.local_similarity(local), self.global_similarity(whole)
        return normalize(jnp.concatenate([whole[:, :, None], local], axis=2))

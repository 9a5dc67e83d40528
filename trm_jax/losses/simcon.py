"""SimCon and MV-SimCon: contrastive losses for captions that may not match, with any batch size.

An anchor's positives are the examples whose embeddings of its own modality are similar to its own
("self-guided semantic alignment"). InfoNCE is the case without intra-modal terms. `simcon_loss` has
two implementations with one meaning: the dense formula, and a streaming one (simcon_streaming.py)
that never holds a B x B matrix and shares the work among the devices of a mesh.

Source: "Self-guided semantic alignment for text supervised segmentation" (SimCon), Eq. 1 to 9.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from trm_jax.losses import simcon_streaming
from trm_jax.losses.simcon_tiles import LOG_ZERO, Settings
from trm_jax.types import Array

# Up to this batch the dense matrices are small and quick to compile.
_DENSE_BATCH = 512


class PairStats(NamedTuple):
    """What a run should watch, [B] each, 0 for pairs that do not count; no gradient.

    positives_image, positives_text: |P^I_i| and |P^T_i| (paper, Fig. 10-11), means over views.
    own_weight: the share of an anchor's pull that goes to the other half of its own pair, mean
        over the pair's anchors; near 0 where the similarity of an anchor with itself swamps it.
    """

    positives_image: Array
    positives_text: Array
    own_weight: Array


def simcon_loss(
    images: tuple[Float[Array, "n d"], ...],
    text: Float[Array, "n d"],
    *,
    logit_scale: Float[Array, ""] | float,
    threshold: Float[Array, ""] | float | None,
    joint_positives: bool = True,
    self_similarity: str = "exclude",
    where: Bool[Array, " n"] | None = None,
    implementation: str = "auto",
    columns: str = "gather",
    block: int = 0,
    mesh: Any = None,
) -> tuple[Float[Array, " n"], PairStats]:
    """SimCon of a global batch, or MV-SimCon without its L_NCS, or InfoNCE.

    Per image anchor i (Eq. 3), with E = exp(logit_scale * cosine):

        -1/|P_i| sum_{p in P_i} log (E^IT_ip + E^II_ip) / sum_j (E^IT_ij + E^II_ij)

    and the same for text anchors with the modalities exchanged (Eq. 4). With two views the text
    anchors count once per view (Eq. 6-7). The mean over the batch is the loss of the paper.

    Args:
      images: one or two views [n, d], unit norm.
      text: [n, d], unit norm; text[i] belongs to images[:][i]. Similarities of bfloat16 vectors
        are computed in bfloat16 with float32 sums, of others in full precision.
      logit_scale: [], 1 / temperature, > 0.
      threshold: [], lambda: pairs whose intra-modal cosine is at least this are positive; the
        own pair always is. May be traced. Above 1 nothing else is positive; infinity is InfoNCE:
        no intra-modal terms at all. None is InfoNCE too, and computes none.
      joint_positives: with two views, images are positive if they are similar in either view
        (Eq. 8); otherwise each view has its own positives.
      self_similarity: "include" or "exclude" an anchor's similarity with itself, which is 1 and
        at a low temperature outweighs everything else.
      where: [n], pairs that count; the others are neither anchors nor candidates.
      implementation: "dense", "streaming", or "auto": dense up to 512 pairs.
      columns: how a device of the streaming form gets the columns: "gather" (all at once) or
        "ring" (a piece at a time: less memory, more than twice the bytes, since XLA keeps the
        gathered columns from the forward to the backward pass).
      block: side of the streaming tiles, 0 for a default.
      mesh: over whose devices the rows are shared, default that of the context (jax.set_mesh).

    Returns:
      ([n] sum of the pair's two, with two views four, anchors, float32 or wider, 0 where a pair
      does not count; PairStats).

    Raises:
      ValueError: an argument is none of those named here.
    """
    _check(images, self_similarity, implementation, columns, block)
    size, dtype = text.shape[0], jnp.promote_types(text.dtype, jnp.float32)
    if where is None:
        where = jnp.ones(size, bool)
    # Zeroed, since 0 * NaN of a padded row would reach the gradients of the valid rows.
    images = tuple(jnp.where(where[:, None], x, 0.0) for x in images)
    text = jnp.where(where[:, None], text, 0.0)
    settings = Settings(
        intra=threshold is not None,
        joint=joint_positives,
        exclude=self_similarity == "exclude",
    )
    scale = jnp.asarray(logit_scale, dtype)
    limit = jnp.asarray(2.0 if threshold is None else threshold, dtype)
    if implementation == "dense" or (implementation == "auto" and size <= _DENSE_BATCH):
        losses, counts = _dense(settings, images, text, where, scale, limit)
    else:
        losses, counts = _streaming(
            settings, images, text, where, scale, limit, columns=columns, block=block, mesh=mesh
        )
    views = len(images)
    counts = jnp.where(where[None], jax.lax.stop_gradient(counts), 0.0)
    stats = PairStats(
        counts[:views].mean(0),
        counts[views:].mean(0),
        jnp.where(where, _own_weight(settings, images, text, scale, limit, counts), 0.0),
    )
    return losses.sum(0), stats


def negative_cosine_similarity(
    predicted: tuple[Float[Array, "n d"], Float[Array, "n d"]],
    images: tuple[Float[Array, "n d"], Float[Array, "n d"]],
    *,
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """L_NCS between two views: -1/2 (p(z1).sg(z2) + p(z2).sg(z1)); Eq. 9.

    Args:
      predicted: the predictor's outputs for both views, [n, d], unit norm.
      images: the embeddings of both views, [n, d], unit norm; they get no gradient.
      where: [n], pairs that count.

    Returns:
      [n] in [-1, 1]; 0 where a pair does not count.
    """
    dtype = jnp.promote_types(images[0].dtype, jnp.float32)
    first, second = (jax.lax.stop_gradient(z.astype(dtype)) for z in images)
    p1, p2 = (p.astype(dtype) for p in predicted)
    values = -0.5 * ((p1 * second).sum(-1) + (p2 * first).sum(-1))
    return values if where is None else jnp.where(where, values, 0.0)


def multi_label_loss(
    images: Float[Array, "n d"],
    texts: Float[Array, "n m d"],
    *,
    logit_scale: Float[Array, ""] | float,
    where: Bool[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """GroupViT's multi-label contrastive loss: m texts per image (its nouns in prompts).

    Half of: the cross entropy of an image against the texts of all images with the target 1/m on
    its own, and the mean over its texts of theirs against all images; what GroupViT's program
    computes (Xu et al., CVPR 2022), but for its second temperature. Holds [n, n, m] logits.

    Args:
      images: [n, d], unit norm.
      texts: [n, m, d], unit norm; texts[i] belong to images[i].
      logit_scale: [], 1 / temperature.
      where: [n], images that count.

    Returns:
      [n], float32 or wider; 0 where an image does not count.
    """
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    if where is None:
        where = jnp.ones(images.shape[0], bool)
    images = jnp.where(where[:, None], images.astype(dtype), 0.0)
    texts = jnp.where(where[:, None, None], texts.astype(dtype), 0.0)
    logits = logit_scale * jnp.einsum("nd,kmd->nkm", images, texts, precision="highest")
    own = jnp.diagonal(logits, axis1=0, axis2=1).T  # [n, m]
    of_image = jax.nn.logsumexp(jnp.where(where[None, :, None], logits, LOG_ZERO), axis=(1, 2))
    of_text = jax.nn.logsumexp(jnp.where(where[:, None, None], logits, LOG_ZERO), axis=0)
    values = 0.5 * (of_image + of_text.mean(1)) - own.mean(1)
    return jnp.where(where, values, 0.0)


def _check(images, self_similarity: str, implementation: str, columns: str, block: int) -> None:
    if len(images) not in (1, 2):
        raise ValueError(f"images holds {len(images)} views; one or two are possible")
    for name, value, choices in (
        ("self_similarity", self_similarity, ("include", "exclude")),
        ("implementation", implementation, ("auto", "dense", "streaming")),
        ("columns", columns, ("gather", "ring")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is none of {', '.join(choices)}")
    if block < 0:
        raise ValueError(f"block={block}; it is the side of a tile, or 0 for the default")


def _streaming(settings, images, text, where, scale, limit, *, columns, block, mesh):
    """`_dense` without its matrices; fills the batch up so that the devices share it evenly."""
    if mesh is None:
        context = jax.sharding.get_abstract_mesh()
        mesh = None if context.empty else context
    plan = simcon_streaming.Plan(settings, 1, columns, mesh)
    size = text.shape[0]
    missing = -size % plan.devices
    share = (size + missing) // plan.devices
    plan = plan._replace(block=min(block or simcon_streaming.default_block(), share))
    if missing:
        images = tuple(jnp.pad(x, ((0, missing), (0, 0))) for x in images)
        text, where = jnp.pad(text, ((0, missing), (0, 0))), jnp.pad(where, (0, missing))
    both: Any = simcon_streaming.anchor_losses(plan, images, text, where, scale, limit)
    losses, counts = both
    return losses[:, :size], counts[:, :size]


def _dense(settings: Settings, images, text, where, scale, limit) -> tuple[Array, Array]:
    """(losses [K, n], numbers of positives [K, n]) by the formula, in O(n^2) memory.

    The anchors are the images of each view, then the texts as seen against each view.
    """
    counts = where[:, None] & where[None]
    own = counts & jnp.eye(text.shape[0], dtype=bool)
    cross = [_similarities(z, text) for z in images]
    texts = _similarities(text, text)
    near = [own] * len(images)
    near_text = own
    inner: list[Any] = [None] * len(images)
    if settings.intra:
        inner = [_similarities(z, z) for z in images]
        near = [own | (counts & (s >= limit)) for s in inner]  # Eq. 5
        near = [near[0] | near[-1]] * len(images) if settings.joint else near  # Eq. 8
        near_text = own | (counts & (texts >= limit))
    # (S^IT or S^TI, S^II or S^TT, positives) of each kind of anchors.
    kinds: list[Any] = list(zip(cross, inner, near, strict=True))
    kinds += [(s.T, texts if settings.intra else None, near_text) for s in cross]
    losses, numbers = [], []
    for other, same, positive in kinds:
        logits = jnp.where(counts, scale * other, LOG_ZERO)
        candidates, pulled = logits, logits
        if same is not None:
            allowed = counts & jnp.isfinite(limit)
            allowed = allowed & ~own if settings.exclude else allowed
            same = jnp.where(allowed, scale * same, LOG_ZERO)
            candidates = jnp.concatenate([logits, same], axis=1)
            pulled = jnp.logaddexp(logits, same)
        number = positive.sum(1).astype(scale.dtype)
        mean = jnp.where(positive, pulled, 0.0).sum(1) / jnp.maximum(number, 1.0)
        losses.append(jnp.where(where, jax.nn.logsumexp(candidates, axis=1) - mean, 0.0))
        numbers.append(number)
    return jnp.stack(losses), jnp.stack(numbers)


def _similarities(x: Array, y: Array) -> Array:
    """Dot products [n, m] in float32 or wider."""
    return jnp.einsum(
        "nd,md->nm",
        x,
        y,
        precision="highest",
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )


def _own_weight(settings: Settings, images, text, scale, limit, counts) -> Array:
    if not settings.intra:
        return jnp.ones(text.shape[0], scale.dtype)
    images, text, scale = jax.lax.stop_gradient((images, text, scale))
    weights = []
    for view, z in enumerate(images):
        z, words = z.astype(scale.dtype), text.astype(scale.dtype)
        cross = (z * words).sum(-1)
        for kind, anchor in ((view, z), (len(images) + view, words)):
            share = jnp.ones_like(cross)
            if not settings.exclude:
                same = (anchor * anchor).sum(-1)
                share = jax.nn.sigmoid(scale * (cross - same))
                share = jnp.where(jnp.isfinite(limit), share, 1.0)
            weights.append(share / jnp.maximum(counts[kind], 1.0))
    return jnp.stack(weights).mean(0)

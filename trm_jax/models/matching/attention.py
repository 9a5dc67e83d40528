"""Attention between the words of captions and the regions of images.

Source: Lee et al., "Stacked Cross Attention for Image-Text Matching" (SCAN), ECCV 2018, section
3.1. Queries attend to a context: words to regions (text to image), or regions to words.

Arrays of all pairs are laid out [a, i, j, b]: vector i of context a, vector j of query set b. Both
the norm (over j) and the softmax (over i) are then sums of whole rows of b numbers, which XLA
turns into vector code on a CPU. The attended contexts themselves, [a, j, b, d], are never built to
find their cosine with the query: with weights e, similarities s and the Gram matrix G of the
context,

    <query, sum_i e_i v_i> = sum_i e_i s_i    and    |sum_i e_i v_i|^2 = e' G e.

What pairs share, the Gram matrices and the vectors with d as the first axis (as the product of
matrices reads its second operand), is made by `prepare`, outside of loops over pairs.

Gradients are written out where the automatic ones make XLA transpose arrays of all pairs, which
takes a CPU several times longer than the products.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from trm_jax.losses.cosine import normalize
from trm_jax.models import AnyArray

_EXACT = jax.lax.Precision.HIGHEST
_NEGATIVE_SLOPE = 0.1
_TINY = 1e-12


def _product(left: Array, right: Array, over: tuple, batch: tuple = ((), ())) -> Array:
    return jax.lax.dot_general(left, right, (over, batch), precision=_EXACT)


class Prepared(NamedTuple):
    """Vectors of images or captions and what all their pairs share; jit drops what is not read.

    vectors: [n, k, d] of unit norm, or zero.
    columns: [d, k, n], the same.
    gram: [n, k, k] inner products of the vectors of an image or caption.
    """

    vectors: Array
    columns: Array
    gram: Array


def prepare(vectors: Float[AnyArray, "n k d"] | Prepared) -> Prepared:
    """Vectors [n, k, d] with what their pairs share; what is prepared stays as it is."""
    if isinstance(vectors, Prepared):
        return vectors
    vectors = jnp.asarray(vectors)
    return Prepared(vectors, columns(vectors), gram(vectors))


def prepare_words(
    words: Float[AnyArray, "m T d"] | Prepared, mask: Bool[AnyArray, "m T"]
) -> Prepared:
    """The same of words, zero where `mask` is false; prepared words must be so already."""
    if isinstance(words, Prepared):
        return words
    return prepare(jnp.where(jnp.asarray(mask)[..., None], words, 0.0))


def columns(vectors: Float[AnyArray, "b j d"]) -> Float[Array, "d j b"]:
    """Vectors as `similarities` reads its queries."""
    return jnp.asarray(vectors).transpose(2, 1, 0)


def gram(context: Float[AnyArray, "a i d"]) -> Float[Array, "a i i"]:
    """Inner products of the vectors of each context."""
    context = jnp.asarray(context)
    return _product(context, context, ((2,), (2,)), ((0,), (0,)))


@jax.custom_vjp
def _similarities(context, queries):
    return _product(context, queries, ((2,), (0,)))


def _similarities_forward(context, queries):
    return _similarities(context, queries), (context, queries)


def _similarities_backward(operands, cotangent):
    context, queries = operands
    to_context = _product(cotangent, queries, ((2, 3), (1, 2)))
    # The cotangent comes second: of the two operands, XLA transposes the first, the small one.
    return to_context, _product(context, cotangent, ((0, 1), (0, 1)))


_similarities.defvjp(_similarities_forward, _similarities_backward)


def similarities(
    context: Float[AnyArray, "a i d"], queries: Float[AnyArray, "d j b"]
) -> Float[Array, "a i j b"]:
    """Inner products of all vectors of all contexts with all vectors of all query sets.

    Args:
      context: [a, i, d].
      queries: [d, j, b], from `columns`.
    """
    return _similarities(jnp.asarray(context), jnp.asarray(queries))


def relevance(similarity: Float[AnyArray, "a i j *b"]) -> Float[Array, "a i j *b"]:
    """LeakyReLU(0.1), then unit norm over the queries j, in [-1, 1].

    Padded queries must have similarity 0; they add nothing to the norm.
    """
    return normalize(jnp.where(similarity > 0, similarity, _NEGATIVE_SLOPE * similarity), axis=2)


def attention(
    similarity: Float[AnyArray, "a i j *b"],
    scale: float,
    keep: Bool[AnyArray, "a i"] | None = None,
) -> Float[Array, "a i j *b"]:
    """What each query sees of the context, up to a factor: a softmax over i that is not divided.

    Args:
      similarity: [a, i, j, b], or [a, i, j] of matched pairs.
      scale: lambda, the inverse temperature.
      keep: [a, i], the vectors of the context that may be seen (all).

    Returns:
      exp(lambda x - max_i lambda x) of the relevance x: in [0, 1], 1 at the most relevant vector,
      0 where `keep` is false. A cosine needs no more; weights are this over its sum.
    """
    logits = relevance(similarity)
    if keep is not None:
        keep = jnp.asarray(keep).reshape(*keep.shape, *(1,) * (similarity.ndim - 2))
        logits = jnp.where(keep, logits, -jnp.inf)
    # The greatest cancels in what follows, so it needs no gradient; -1 is for empty contexts.
    greatest = jax.lax.stop_gradient(logits.max(axis=1, keepdims=True, initial=-1.0))
    return jnp.exp(scale * (logits - greatest))


@jax.custom_vjp
def _squared_norms(weights, gram):
    return _squared_norms_forward(weights, gram)[0]


def _squared_norms_forward(weights, gram):
    mixed = _product(gram, weights, ((2,), (1,)), ((0,), (0,)))
    return jnp.sum(weights * mixed, axis=1), (weights, mixed)


def _squared_norms_backward(saved, cotangent):
    weights, mixed = saved
    cotangent = cotangent[:, None]
    to_gram = _product(weights * cotangent, weights, ((2, 3), (2, 3)), ((0,), (0,)))
    return 2.0 * cotangent * mixed, to_gram


_squared_norms.defvjp(_squared_norms_forward, _squared_norms_backward)


def squared_norms(
    weights: Float[AnyArray, "a i j b"], gram: Float[AnyArray, "a i i"]
) -> Float[Array, "a j b"]:
    """|sum_i weights_i context_i|^2, by the Gram matrix of the context.

    Rounding may leave it slightly below zero where the context cancels out.
    """
    return _squared_norms(jnp.asarray(weights), jnp.asarray(gram))


def attended_cosine(
    weights: Float[AnyArray, "a i j b"],
    similarity: Float[AnyArray, "a i j b"],
    gram: Float[AnyArray, "a i i"],
) -> Float[Array, "a j b"]:
    """Cosine of each query with sum_i weights_i context_i.

    Args:
      weights: as from `attention`: the greatest over i is 1, or all are 0.
      similarity: from `similarities`, of queries of unit norm (or zero, at padding).
      gram: [a, i, i] of the context, whose vectors have unit norm.

    Returns:
      [a, j, b] in [-1, 1]; 0 where the query or what it attends to is zero.
    """
    product = jnp.sum(weights * similarity, axis=1)
    square = squared_norms(weights, gram)
    # At least the product's square: where a context nearly cancels out, rounding must not make a
    # cosine beyond 1.
    square = jnp.maximum(jnp.maximum(square, product * product), _TINY)
    return product * jax.lax.rsqrt(square)


def matched_attention(
    regions: Float[AnyArray, "n r d"],
    words: Float[AnyArray, "n T d"],
    mask: Bool[AnyArray, "n T"],
    *,
    scale: float = 9.0,
) -> tuple[Float[Array, "n T r"], Float[Array, "n T d"]]:
    """What the words of caption i see in image i: text-to-image attention of matched pairs.

    Args:
      regions: [n, r, d] of unit norm.
      words: [n, T, d] of unit norm.
      mask: [n, T], true at real words.
      scale: lambda of the softmax over regions.

    Returns:
      (weights [n, T, r] that sum to 1 over the regions, attended contexts [n, T, d] of unit norm);
      both are 0 at padding.
    """
    regions, words = jnp.asarray(regions), jnp.where(mask[..., None], words, 0.0)
    similarity = jnp.einsum("nrd,ntd->nrt", regions, words, precision=_EXACT)
    weights = attention(similarity, scale)
    weights = jnp.where(mask[:, None], weights / weights.sum(axis=1, keepdims=True), 0.0)
    contexts = jnp.einsum("nrt,nrd->ntd", weights, regions, precision=_EXACT)
    return weights.swapaxes(1, 2), normalize(contexts)

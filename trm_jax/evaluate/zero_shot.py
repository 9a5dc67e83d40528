"""Zero-shot multi-label recognition: template ensembles of class names against image features."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from trm_jax.evaluate import multilabel
from trm_jax.types import Array, Batch, UserError

TEMPLATES = (
    "a photo of a {name}.",
    "a photo of the {name}.",
    "a photo of one {name}.",
    "a photo of many {name}.",
    "itap of a {name}.",
    "a bad photo of a {name}.",
    "a photo of the small {name}.",
    "a photo of the large {name}.",
)
POOLS = ("global", "max", "softmax")


def class_embeddings(
    embed_text: Callable[[np.ndarray], Any],
    tokenizer: Callable[[Sequence[str], int], np.ndarray],
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    length: int = 77,
    normalize_first: bool = True,
) -> np.ndarray:
    """One unit vector per class: the normalised mean over its templates (CLIP, 3.1.4).

    Args:
        embed_text: tokens [m, length] int32 -> [m, d]; called once per template with m = C, so a
            jitted function compiles once.
        tokenizer: (texts, length) -> tokens.
        class_names: C names as they are written into the templates.
        templates: texts with one "{name}" (or "{}") each.
        length: tokens per text, at most the tower's context length.
        normalize_first: the mean is of unit vectors, as OpenAI's notebook has it. False: of the
            vectors as `embed_text` gives them, as GroupViT and SimCon have it; then `embed_text`
            must give projections that are not normalised, or it makes no difference.

    Returns:
        [C, d] float32.

    Raises:
        UserError: no class, no template or a template without a place for the name.
    """
    if not class_names or not templates:
        raise UserError("zero-shot scores need at least one class name and one template")
    total = 0.0
    for template in templates:
        # Not str.format: a class name or template may hold other braces.
        place = "{name}" if "{name}" in template else "{}"
        if place not in template:
            raise UserError(f"the template '{template}' has no {{name}}")
        tokens = tokenizer([template.replace(place, name) for name in class_names], length)
        vectors = np.asarray(jax.device_get(embed_text(tokens)), np.float32)
        total = total + (_unit(vectors) if normalize_first else vectors)
    return _unit(np.asarray(total))


def scores(
    classes: ArrayLike,
    embedding: ArrayLike | None = None,
    dense: ArrayLike | None = None,
    *,
    pool: str = "global",
    scale: float = 20.0,
) -> Array:
    """Zero-shot scores [n, C] in [-1, 1]: cosines, to be ranked within a class.

    Args:
        classes: [C, d].
        embedding: [n, d], the pooled image embedding; pool "global" needs it.
        dense: [n, hw, d], one embedding per position; the other pools need it.
        pool: "global": cosine with `embedding`. "max": the highest cosine over the positions.
            "softmax": the positions' cosines averaged with weights softmax(scale * cosine), as
            DualCoOp and TaI-DPT aggregate; scale 0 is the mean, a large one "max".
        scale: the inverse temperature of "softmax".

    Raises:
        UserError: an unknown pool, or its features are missing.
    """
    if pool not in POOLS:
        raise UserError(f"evaluate.pool '{pool}' is unknown; choose one of {', '.join(POOLS)}")
    features = embedding if pool == "global" else dense
    if features is None:
        missing = "embedding" if pool == "global" else "dense"
        raise UserError(f"evaluate.pool '{pool}' needs the image features '{missing}'")
    cosines = _unit_jnp(features) @ _unit_jnp(classes).T  # [n, C] or [n, hw, C]
    if pool == "global":
        return cosines
    if pool == "max":
        return cosines.max(axis=1)
    return (jax.nn.softmax(scale * cosines, axis=1) * cosines).sum(axis=1)


def evaluate(
    embed_image: Callable[[Batch], dict[str, Any]],
    classes: ArrayLike,
    batches: Iterable[Batch],
    *,
    pool: str = "global",
    scale: float = 20.0,
    to_host: Callable[[Any], Any] = jax.device_get,
) -> dict[str, float]:
    """Zero-shot mAP (per cent) and classes_without_positive over `batches`.

    Args:
        embed_image: batch -> {"embedding": [n, d]} and, for the dense pools, "dense" [n, hw, d].
        classes: [C, d], of `class_embeddings`.
        batches, to_host: see `evaluate.multilabel.evaluate`.
        pool, scale: see `scores`.
    """
    score = jax.jit(functools.partial(scores, pool=pool, scale=scale))

    def scores_fn(batch: Batch) -> dict[str, Array]:
        image = embed_image(batch)
        wanted = "embedding" if pool == "global" else "dense"
        return {"scores": score(classes, **{wanted: image.get(wanted)})}

    return multilabel.evaluate(scores_fn, batches, to_host=to_host, threshold=None)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [.., d] at length 1; a zero row (a name of unknown words) stays zero."""
    return vectors / np.sqrt(np.square(vectors).sum(axis=-1, keepdims=True) + 1e-12)


def _unit_jnp(vectors: ArrayLike) -> Array:
    """`_unit` on the device, in float32; the epsilon is inside the root, for the gradient."""
    vectors = jnp.asarray(vectors, jnp.float32)
    return vectors * jax.lax.rsqrt(jnp.square(vectors).sum(axis=-1, keepdims=True) + 1e-12)

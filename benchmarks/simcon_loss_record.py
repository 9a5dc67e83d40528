"""One run of SimCon at a very large batch, and what it should have given on some of the rows.

The oracle is the formula in float64 on the same rounded vectors: the normaliser and the number of
positives of every anchor by a chunk of rows at a time (JAX), then losses and gradients of the
sampled rows against all columns (numpy). It shares no code with the streaming form.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import simcon_loss_programs as programs
from benchmarks.simcon_loss_programs import LOSSES, SCALE, THRESHOLD, Task

SAMPLES = 64
# Bytes of one float64 chunk of similarities; several of them live at a time.
_CHUNK_BYTES = 2**31


class Run(NamedTuple):
    """Losses of all pairs and the gradients of all vectors, on the device, and figures."""

    values: Any
    gradients: Any
    facts: dict[str, float]


class Anchors(NamedTuple):
    """Of the image and the text of every pair, float64 [B]: log of the summed candidates, number
    of positives; how near an intra-modal cosine comes to the threshold."""

    lse: tuple[np.ndarray, np.ndarray]
    count: tuple[np.ndarray, np.ndarray]
    margin: float


def run_once(task: Task, loss: str) -> Run:
    """Runs loss and gradient once behind the compilation; memory where the device tells it."""
    arguments = programs.arguments(task, LOSSES[loss][0])
    compiled = programs.compiled(task, loss)
    before = jax.local_devices()[0].memory_stats()
    started = time.perf_counter()
    (_, values), gradients = jax.block_until_ready(compiled(*arguments))
    seconds = time.perf_counter() - started
    facts = {"seconds": seconds, "program_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6}
    after = jax.local_devices()[0].memory_stats()
    if before and after:
        facts["peak_extra_mb"] = (after["peak_bytes_in_use"] - before["bytes_in_use"]) / 1e6
    return Run(values, gradients, facts)


def record(task: Task) -> dict[str, float]:
    """Seconds and memory of one run, and its errors on the sampled rows.

    Returns:
      facts of `run_once`; loss_error (relative, largest), gradient_cosine (least, over the images
      and texts of the rows), threshold_margin, mean_positives (of an image).
    """
    rows = _sample(task)
    facts, values, *gradients = _measured(task, rows)
    (images,), text = programs.embeddings(task, 1)
    images, text = (x.astype(jnp.dtype(task.dtype)) for x in (images, text))
    known = anchors(images, text)
    wanted, *of_vectors = row_oracle(images, text, known, rows)
    cosines = [
        (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        for a, b in zip(gradients, of_vectors, strict=True)
    ]
    return facts | {
        "loss_error": float(np.abs(values / wanted - 1).max()),
        "gradient_cosine": float(np.min(cosines)),
        "threshold_margin": known.margin,
        "mean_positives": float(known.count[0].mean()),
    }


def _measured(task: Task, rows: np.ndarray) -> tuple[Any, ...]:
    """(facts, losses, gradients of images and of texts) of the rows; frees the rest."""
    run = run_once(task, "SimCon")
    (of_images,), of_text, _ = run.gradients
    found = (np.asarray(x[rows]).astype(np.float64) for x in (run.values, of_images, of_text))
    return run.facts, *found


def anchors(images: np.ndarray, text: np.ndarray) -> Anchors:
    """The normalisers of all anchors, on JAX's device in float64."""
    size = len(text)
    step = min(size, max(1, _CHUNK_BYTES // (8 * size)))

    @jax.jit
    def of_rows(x, y, start):
        """Anchors x[start:start + step] against their own kind and against y."""
        ids = start + jnp.arange(step)
        anchor = jax.lax.dynamic_slice_in_dim(x, start, step)
        own = ids[:, None] == jnp.arange(size)[None]
        inner = jnp.dot(anchor, x.T, precision="highest")
        cross = SCALE * jnp.dot(anchor, y.T, precision="highest")
        same = jnp.where(own, -jnp.inf, SCALE * inner)
        lse = jnp.logaddexp(jax.nn.logsumexp(cross, 1), jax.nn.logsumexp(same, 1))
        margin = jnp.where(own, jnp.inf, jnp.abs(inner - THRESHOLD)).min()
        return lse, (own | (inner >= THRESHOLD)).sum(1), margin

    lse, count, margin = np.zeros((2, size)), np.zeros((2, size)), np.inf
    with jax.enable_x64(True):
        x, y = (jnp.asarray(part).astype(jnp.float64) for part in (images, text))
        for kind, (one, other) in enumerate(((x, y), (y, x))):
            for begin in range(0, size, step):
                start = min(begin, size - step)  # the last chunk overlaps the one before
                here = slice(start, start + step)
                lse[kind, here], count[kind, here], near = of_rows(one, other, start)
                margin = min(margin, float(near))
    return Anchors((lse[0], lse[1]), (count[0], count[1]), margin)


def row_oracle(
    images: np.ndarray, text: np.ndarray, known: Anchors, rows: np.ndarray, step: int = 65_536
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(losses [n], gradients of the mean loss by the images [n, d] and texts [n, d]) of the rows.

    A vector takes part as an anchor, and as a candidate of every other anchor.
    """
    x, t = images[rows].astype(np.float64), text[rows].astype(np.float64)
    (lse_i, lse_t), (count_i, count_t) = known.lse, known.count
    losses = lse_i[rows] + lse_t[rows]
    of_x, of_t = np.zeros_like(x), np.zeros_like(t)
    for start in range(0, len(images), step):
        cols = np.arange(start, min(start + step, len(images)))
        xs, ts = images[cols].astype(np.float64), text[cols].astype(np.float64)
        own = rows[:, None] == cols[None]
        image_text, text_image = SCALE * x @ ts.T, SCALE * t @ xs.T
        image_image, text_text = x @ xs.T, t @ ts.T
        near_i, near_t = own | (image_image >= THRESHOLD), own | (text_text >= THRESHOLD)
        image_image = np.where(own, -np.inf, SCALE * image_image)
        text_text = np.where(own, -np.inf, SCALE * text_text)
        for cross, inner, near, count in (
            (image_text, image_image, near_i, count_i),
            (text_image, text_text, near_t, count_t),
        ):
            losses -= np.where(near, np.logaddexp(cross, inner), 0.0).sum(1) / count[rows]
        by_rows = (lse_i[rows, None], count_i[rows, None]), (lse_t[rows, None], count_t[rows, None])
        by_cols = (lse_i[cols], count_i[cols]), (lse_t[cols], count_t[cols])
        # The image anchors of the rows and of the columns, then the text anchors.
        cross_1, inner_1 = _slopes(image_text, image_image, near_i, *by_rows[0])
        cross_2, inner_2 = _slopes(text_image, image_image, near_i, *by_cols[0])
        cross_3, inner_3 = _slopes(text_image, text_text, near_t, *by_rows[1])
        cross_4, inner_4 = _slopes(image_text, text_text, near_t, *by_cols[1])
        of_x += (cross_1 + cross_4) @ ts + (inner_1 + inner_2) @ xs
        of_t += (cross_3 + cross_2) @ xs + (inner_3 + inner_4) @ ts
    factor = SCALE / len(images)
    return losses, factor * of_x, factor * of_t


def _slopes(cross, inner, near, lse, count) -> tuple[np.ndarray, np.ndarray]:
    """d loss / d logits of anchors."""
    share = np.exp(cross - np.logaddexp(cross, inner))
    target = np.where(near, 1 / count, 0.0)
    return np.exp(cross - lse) - target * share, np.exp(inner - lse) - target * (1 - share)


def _sample(task: Task) -> np.ndarray:
    """Half of the rows among the near-copies and their like, half anywhere."""
    rng = np.random.default_rng(1)
    count = min(SAMPLES, task.batch // 4) // 2
    copies = rng.choice(task.batch // 8, min(count, task.batch // 8), replace=False)
    others = rng.choice(np.arange(task.batch // 8, task.batch), count, replace=False)
    return np.concatenate([copies, others])

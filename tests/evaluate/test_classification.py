"""Zero-shot classification against a sort per image and hand-worked ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trm_jax.evaluate import classification
from trm_jax.types import UserError


def _embed(batch):
    return {"embedding": batch["x"]}


def _problem(n=60, classes=11, d=4, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n, d)) * rng.uniform(0.1, 9, (n, 1))  # of any length
    return images, rng.normal(size=(classes, d)) * 3, rng.integers(0, classes, n)


def _slow(images, classes, truth, k):
    """Per cent of the images with their class among the k highest cosines."""
    right = 0
    for image, c in zip(images, truth, strict=True):
        cosines = [image @ row / np.linalg.norm(image) / np.linalg.norm(row) for row in classes]
        right += c in np.argsort(cosines)[::-1][:k]
    return 100 * right / len(images)


def _batches(images, truth, size):
    """Padded batches; the padding would be wrong, and not finite."""
    for start in range(0, len(images), size):
        x, t = images[start : start + size], truth[start : start + size]
        pad = size - len(x)
        yield {
            "x": np.pad(x, ((0, pad), (0, 0)), constant_values=np.nan).astype(np.float32),
            "truth": np.pad(t, ((0, pad),) + ((0, 0),) * (t.ndim - 1)),
            "valid": np.arange(size) < len(x),
        }


@pytest.mark.parametrize("one_hot", [False, True])
def test_equals_a_sort_of_each_image(one_hot):
    images, classes, truth = _problem()
    given = np.where(np.eye(11)[truth], 1, -1).astype(np.int8) if one_hot else truth
    got = classification.evaluate(_embed, classes, _batches(images, given, 16))
    assert got == pytest.approx({f"top{k}": _slow(images, classes, truth, k) for k in (1, 5)})
    assert 5 < got["top1"] < 95 and got["top1"] < got["top5"] < 95


def test_sharded_rows_give_the_same(shard):
    images, classes, truth = _problem(n=16)
    x, t = shard(images.astype(np.float32), truth.astype(np.int32))
    got = classification.evaluate(jax.jit(_embed), classes, [{"x": x, "truth": t}])
    assert got["top1"] == pytest.approx(_slow(images, classes, truth, 1))


def test_equal_classes_give_chance_order():
    images = np.ones((4, 3), np.float32)
    truth = np.array([0, 1, 4, 5])  # of six equal classes: ranks 0, 1, 4 and 5
    batch = {"x": images, "truth": truth}
    got = classification.evaluate(_embed, np.ones((6, 3)), [batch])
    assert got == {"top1": 25.0, "top5": 75.0}


def test_several_true_classes_count_by_the_nearest():
    classes = np.eye(3)
    x = np.array([[3.0, 2, 1], [1, 3, 2]], np.float32)
    truth = np.array([[-1, 1, 1], [0, 1, -1]], np.int8)
    assert classification.evaluate(_embed, classes, [{"x": x, "truth": truth}])["top1"] == 50.0


def test_low_precision_embeddings_are_accepted():
    images, classes, truth = _problem(seed=1)
    half = jnp.asarray(images, jnp.bfloat16)
    got = classification.evaluate(_embed, classes, [{"x": half, "truth": truth}])
    exact = np.asarray(half).astype(np.float64)
    assert got["top1"] == pytest.approx(_slow(exact, classes, truth, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": np.array([0, 3])}, "1 images of the evaluation set have no class"),
        ({"truth": np.full((2, 3), -1)}, "2 images of the evaluation set have no class"),
        ({"truth": np.ones((2, 4))}, "3 class embeddings for the 4 classes"),
        ({"x": np.full((2, 3), np.nan)}, "2 image embeddings are not finite"),
        ({"valid": np.zeros(2, bool)}, "no valid row"),
    ],
)
def test_refusals(change, message):
    batch = {"x": np.ones((2, 3)), "truth": np.array([0, 1])}
    with pytest.raises(UserError, match=message):
        classification.evaluate(_embed, np.eye(3), [batch | change])
    with pytest.raises(UserError, match="no 'truth'"):
        classification.evaluate(_embed, np.eye(3), [{"x": batch["x"]}])

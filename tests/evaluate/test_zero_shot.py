"""Template ensembles and dense pooling against numpy."""

import numpy as np
import pytest

from trm_jax.evaluate import multilabel, zero_shot
from trm_jax.types import UserError


def _tokenizer(texts, length):
    """One number per character: a text is its own tokens."""
    codes = [[ord(letter) for letter in text][:length] for text in texts]
    return np.array([code + [0] * (length - len(code)) for code in codes], np.int32)


def _embed_text(tokens):
    """A fixed random projection of the character counts; different texts, different lengths."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(128, 6))
    return (table[tokens] * (tokens > 0)[..., None]).sum(axis=1)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_class_embeddings_are_the_normalised_mean_of_unit_vectors():
    names, templates = ("cat", "dog {x}"), ("a {name}.", "the {} photo", "{name} {name}")
    got = zero_shot.class_embeddings(_embed_text, _tokenizer, names, templates, length=20)
    for row, name in zip(got, names, strict=True):
        texts = [f"a {name}.", f"the {name} photo", f"{name} {name}"]
        vectors = _unit(_embed_text(_tokenizer(texts, 20)))
        np.testing.assert_allclose(row, _unit(vectors.mean(axis=0)), atol=1e-6)
    assert got.dtype == np.float32
    assert all("{name}" in template for template in zero_shot.TEMPLATES)


def test_class_embeddings_of_projections_averaged_before_they_are_normalised():
    names, templates = ("cat", "dog"), ("a {name}.", "a very long photo of the {}")
    got = zero_shot.class_embeddings(
        _embed_text, _tokenizer, names, templates, length=40, normalize_first=False
    )
    for row, name in zip(got, names, strict=True):
        vectors = _embed_text(_tokenizer([f"a {name}.", f"a very long photo of the {name}"], 40))
        np.testing.assert_allclose(row, _unit(vectors.mean(axis=0)), atol=1e-6)
        # Texts of other lengths have other norms: the two ensembles differ.
        assert abs(row - _unit(_unit(vectors).mean(axis=0))).max() > 1e-2
    single = [
        zero_shot.class_embeddings(
            _embed_text, _tokenizer, names, templates[:1], normalize_first=first
        )
        for first in (True, False)
    ]
    np.testing.assert_allclose(*single, atol=1e-6)


def test_scores_against_numpy():
    rng = np.random.default_rng(1)
    classes, pooled = rng.normal(size=(3, 6)), rng.normal(size=(4, 6))
    dense = rng.normal(size=(4, 5, 6))
    cosines = np.einsum("nrd,cd->nrc", _unit(dense), _unit(classes))
    weights = np.exp(20 * cosines)
    expected = {
        "global": _unit(pooled) @ _unit(classes).T,
        "max": cosines.max(axis=1),
        "softmax": (weights * cosines).sum(axis=1) / weights.sum(axis=1),
    }
    for pool, values in expected.items():
        got = zero_shot.scores(classes, pooled, dense, pool=pool)
        np.testing.assert_allclose(got, values, atol=2e-6)
    mean = zero_shot.scores(classes, dense=dense, pool="softmax", scale=0.0)
    np.testing.assert_allclose(mean, cosines.mean(axis=1), atol=2e-6)
    sharp = zero_shot.scores(classes, dense=dense, pool="softmax", scale=1e5)
    np.testing.assert_allclose(sharp, expected["max"], atol=2e-6)


def test_a_zero_embedding_scores_zero():
    got = zero_shot.scores(np.zeros((2, 4)), np.ones((3, 4)))
    np.testing.assert_array_equal(got, np.zeros((3, 2)))


@pytest.mark.parametrize("pool", ["global", "max"])
def test_evaluate_is_the_map_of_the_scores(pool):
    rng = np.random.default_rng(2)
    classes, dense = rng.normal(size=(3, 6)), rng.normal(size=(8, 5, 6))
    truth = np.where(rng.random((8, 3)) < 0.5, 1, -1).astype(np.int8)
    batches = [
        {"dense": dense[i : i + 4], "truth": truth[i : i + 4], "index": np.arange(i, i + 4)}
        for i in (0, 4)
    ]
    got = zero_shot.evaluate(
        lambda batch: {"embedding": batch["dense"].mean(axis=1), "dense": batch["dense"]},
        classes,
        batches,
        pool=pool,
    )
    scores = zero_shot.scores(classes, dense.mean(axis=1), dense, pool=pool)
    assert got["mAP"] == pytest.approx(multilabel.mean_average_precision(scores, truth))
    assert set(got) == {"mAP", "classes_without_positive"}


def test_refusals():
    with pytest.raises(UserError, match="has no {name}"):
        zero_shot.class_embeddings(_embed_text, _tokenizer, ("cat",), ("a photo",))
    with pytest.raises(UserError, match="at least one"):
        zero_shot.class_embeddings(_embed_text, _tokenizer, ())
    with pytest.raises(UserError, match="choose one of global, max, softmax"):
        zero_shot.scores(np.ones((1, 2)), np.ones((1, 2)), pool="mean")
    with pytest.raises(UserError, match="needs the image features 'dense'"):
        zero_shot.scores(np.ones((1, 2)), np.ones((1, 2)), pool="max")

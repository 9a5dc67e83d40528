"""Losses by name: which function each name is, and what an epoch changes."""

import jax.numpy as jnp
import numpy as np
import pytest

from trm_jax.losses import classification, partial_labels
from trm_jax.losses.classification import classification_loss

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.standard_normal((4, 5))).astype(np.float32)
LABELS = RNG.integers(-1, 2, (4, 5)).astype(np.int8)
ARRAYS = jnp.asarray(LOGITS), jnp.asarray(LABELS)
WHERE = jnp.array([True, True, True, False])


def _loss(name, **options):
    return np.asarray(classification_loss(name, *ARRAYS, **options))


@pytest.mark.parametrize("name", ["partial_bce", "hill", "weighted_assume_negative"])
def test_names_are_the_functions(name):
    wanted = getattr(partial_labels, name)(*ARRAYS)
    np.testing.assert_array_equal(_loss(name), wanted)


def test_asl_by_hand():
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    shifted = np.maximum(p - 0.1, 0)
    wanted = np.where(LABELS == 1, -((1 - p) ** 2) * np.log(p), 0)
    wanted = np.where(LABELS == -1, -(shifted**3) * np.log(1 - shifted), wanted)
    found = _loss("asl", gamma_pos=2.0, gamma_neg=3.0, shift=0.1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


def test_splc_corrects_from_the_second_epoch():
    before, first = _loss("splc", epoch=0.0), _loss("splc", epoch=0.99)
    later = _loss("splc", epoch=1.0)
    np.testing.assert_array_equal(before, first)
    missed = (LABELS == 0) & (1 / (1 + np.exp(-LOGITS)) > 0.6)
    assert missed.any()
    assert (later[missed] < before[missed]).all()
    np.testing.assert_array_equal(later[~missed], before[~missed])


def test_large_loss_rejects_more_with_every_epoch():
    unknown = (LABELS == 0).sum()
    for epoch, dropped in ((0.5, 0), (1.0, 0.3), (2.5, 0.6), (9.0, 1.0)):
        values = _loss("large_loss", epoch=epoch, rejection_rate=0.3)
        assert (values[LABELS == 0] == 0).sum() == np.ceil(dropped * unknown)
    corrected = _loss("large_loss_correction", epoch=9.0, rejection_rate=0.3)
    positive = np.log1p(np.exp(-LOGITS))
    np.testing.assert_allclose(corrected[LABELS == 0], positive[LABELS == 0], rtol=1e-5)


def test_eprs_penalty_adds_up_over_classes():
    values = _loss("epr", expected_positives=1.5, where=WHERE)
    known, penalty = partial_labels.epr(*ARRAYS, expected_positives=1.5, where=WHERE)
    per_image = values.sum(1)[:3].mean()
    np.testing.assert_allclose(
        per_image, np.asarray(known).sum(1)[:3].mean() + 5 * penalty, rtol=1e-5
    )


def test_unknown_names_are_told():
    assert "asl" in classification.NAMES
    with pytest.raises(ValueError, match="'focal' is none of asl"):
        _loss("focal")

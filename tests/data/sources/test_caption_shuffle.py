"""Shuffled captions: how many, never their own, and nothing else changed."""

import pickle

import numpy as np
import pytest

from trm_jax.data.sources.base import Source
from trm_jax.data.sources.caption_shuffle import ShuffledCaptions
from trm_jax.data.sources.subset import Subset
from trm_jax.types import UserError


class _Photos:
    """Every fifth photo has no caption, the others have two."""

    ids = tuple(f"photo{i}" for i in range(100))
    class_names = ()
    labels = np.zeros((100, 0), np.int8)

    def __len__(self):
        return 100

    def read(self, index):
        return {"image": np.full((1, 1, 3), index, np.uint8)}

    def captions(self, index):
        return () if index % 5 == 0 else (f"{index} a", f"{index} b")


_PHOTOS = _Photos()


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.5, 0.83, 1.0])
def test_the_chosen_exchange_all_their_captions(fraction):
    noisy = ShuffledCaptions(_PHOTOS, fraction, seed=3)
    assert isinstance(noisy, Source) and len(noisy) == 100 and noisy.ids == _PHOTOS.ids
    moved = [i for i in range(100) if noisy.captions(i) != _PHOTOS.captions(i)]
    assert moved == [i for i in range(100) if noisy.is_noisy(i)]
    assert len(moved) == round(fraction * 80) and not any(i % 5 == 0 for i in moved)
    # A permutation: each pair of captions is somewhere exactly once.
    assert sorted(noisy.captions(i) for i in range(100)) == sorted(
        _PHOTOS.captions(i) for i in range(100)
    )
    assert all(noisy.read(i)["image"][0, 0, 0] == i for i in range(100))
    assert np.array_equal(noisy.captioned, [i for i in range(100) if i % 5])


def test_seeds_and_pickles():
    def taken(source):
        return [source.captions(i) for i in range(100)]

    first = ShuffledCaptions(_PHOTOS, 0.5, seed=0)
    assert taken(first) == taken(ShuffledCaptions(_PHOTOS, 0.5, seed=0))
    assert taken(first) == taken(pickle.loads(pickle.dumps(first)))
    others = [taken(ShuffledCaptions(_PHOTOS, 0.5, seed=seed)) for seed in (1, -1)]
    assert taken(first) != others[0] != others[1] != taken(first)


def test_the_chosen_are_any():
    # 400 draws of 20 of 80: each image is expected 100 times, standard deviation 8.7.
    hits = np.zeros(100)
    for seed in range(400):
        noisy = ShuffledCaptions(_PHOTOS, 0.25, seed)
        hits += [noisy.is_noisy(i) for i in range(100)]
    hits = hits[[i for i in range(100) if i % 5]]
    assert hits.sum() == 400 * 20 and abs(hits - 100).max() < 5 * 8.7


def test_nothing_to_do():
    noisy = ShuffledCaptions(_PHOTOS, 0.0, seed=0)
    assert [noisy.captions(i) for i in range(100)] == [_PHOTOS.captions(i) for i in range(100)]
    assert not any(noisy.is_noisy(i) for i in range(100))
    assert noisy.fingerprint() == "\n".join(_PHOTOS.ids)


def test_a_part_of_a_source():
    part = Subset(_PHOTOS, [1, 2, 5, 7])
    noisy = ShuffledCaptions(part, 1.0, seed=0)
    assert noisy.captions(2) == () and noisy.is_noisy(0) and not noisy.is_noisy(2)
    assert {noisy.captions(i)[0] for i in (0, 1, 3)} == {"1 a", "2 a", "7 a"}


@pytest.mark.parametrize("fraction", [-0.1, 1.01, float("nan")])
def test_fractions_outside_are_refused(fraction):
    with pytest.raises(UserError, match=r"data.caption_shuffle=.* must be in \[0, 1\]"):
        ShuffledCaptions(_PHOTOS, fraction, seed=0)


def test_one_image_has_nobody_to_exchange_with():
    with pytest.raises(UserError, match="0.01 is one of 80 images"):
        ShuffledCaptions(_PHOTOS, 0.01, seed=0)

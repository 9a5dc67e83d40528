"""NAAF: scores of both phases against torch and by hand; the thresholds' two ways to move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.models.matching.pairs import least_gap, padded, pairs
from trm_jax.models.matching import naaf

NAAF = naaf.Naaf()
# A batch in which most captions rank their image first, with more than 200 words.
LENGTHS = [4 + i % 7 for i in range(40)]
BATCH = {"images": 40, "regions": 3, "width": 8, "related": 0.8}


def _scores(train, threshold, regions, words, mask):
    return NAAF.apply({}, regions, words, mask, threshold=jnp.asarray(threshold), train=train)


SCORES = jax.jit(_scores, static_argnums=0)
BATCHED = jax.jit(naaf.update_batch)


@pytest.mark.parity
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_scores_match_torch(train, threshold):
    import torch

    from tests.oracles import matching

    regions, words, mask = pairs((7, 3, 1, 6, 5, 2), images=5, regions=4, width=8)
    captions = matching.captions_of(words, mask)
    expected = matching.naaf(torch.tensor(regions), captions, threshold, train)
    found = SCORES(train, threshold, regions, words, mask)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parity
def test_sequential_thresholds_match_torch():
    import torch

    from tests.oracles import matching

    regions, words, mask = pairs(LENGTHS, **BATCH)
    arguments = torch.tensor(regions), matching.captions_of(words, mask)
    used, threshold, safe = matching.naaf_sequence(*arguments, 0.4, 0.3)
    assert len(set(used)) > 5 and min(threshold, safe) > 0.1  # no trivial case
    state = naaf.initial_state()._replace(
        threshold=jnp.asarray(0.4), safe_threshold=jnp.asarray(0.3), count=jnp.asarray(77.0)
    )
    found, state = jax.jit(naaf.update_sequential)(state, regions, words, mask)
    np.testing.assert_allclose(found, used, atol=1e-5)
    np.testing.assert_allclose(state[:2], [threshold, safe], atol=1e-5)
    expected = [
        matching.naaf_caption(arguments[0], w, t, True)
        for w, t in zip(arguments[1], used, strict=True)
    ]
    scores = SCORES(True, found, regions, words, mask)
    np.testing.assert_allclose(scores, torch.stack(expected, 1), atol=3e-5)


def test_two_similar_words_by_hand():
    # Similarities 0.9 and 0.5 with the only region. Below t = 0.8, the second word outweighs the
    # first when words are mixed by softmax(5 (1, 0.8)) = (0.731, 0.269): -0.008 and -0.192.
    y = (0.5 - 0.72) / 0.6
    regions = np.array([[[0.9, y, (1 - 0.81 - y * y) ** 0.5]]], np.float32)
    words = np.array([[[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]]], np.float32)
    mask = np.ones((1, 2), bool)
    there, seen = 0.9 + 0.0, 0.9 + 0.5
    for train, missing in ((True, 0.0 - 0.3), (False, 0.1 - 0.3)):
        expected = (missing + there + seen) / 2
        found = SCORES(train, 0.8, regions, words, mask)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_padding_blocks_and_thresholds_of_captions(train):
    regions, words, mask = pairs((4, 2, 3), images=3, regions=4, width=6)
    scores = SCORES(train, 0.2, regions, words, mask)
    more = SCORES(train, 0.2, regions, *padded(words, mask))
    np.testing.assert_allclose(more, scores, atol=1e-6)
    block = SCORES(train, 0.2, regions[1:], words[:1], mask[:1])
    np.testing.assert_allclose(block, scores[1:, :1], atol=1e-6)
    several = SCORES(train, np.array([0.2, 0.5, 0.2], np.float32), regions, words, mask)
    np.testing.assert_allclose(several[:, ::2], scores[:, ::2], atol=1e-6)
    other = SCORES(train, 0.5, regions, words, mask)
    np.testing.assert_allclose(several[:, 1], other[:, 1], atol=1e-6)
    assert np.abs(other - scores).max() > 1e-2


@pytest.mark.parametrize("train", [True, False])
def test_captions_without_words_and_images_of_zeros(train):
    regions, words, mask = pairs((4, 0, 3), images=3, regions=4, width=6)
    regions[1] = 0.0
    words[2, 1] = 0.0

    def total(regions, words, threshold):
        scores = _scores(train, threshold, regions, words, mask)
        return (scores**2).sum() + scores.sum(), scores

    function = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    for threshold in (0.0, 1.0):  # at 1 no word is there
        (_, scores), gradients = function(regions, words, threshold)
        np.testing.assert_array_equal(scores[:, 1], 0.0)
        assert np.isfinite(scores).all()
        for gradient in gradients:
            assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradients[1][~mask], 0.0)
        assert gradients[2] == 0.0


def test_gradients_by_finite_differences():
    regions, words, mask = pairs((3, 2), images=2, regions=3, width=4, seed=4, dtype=np.float64)
    assert min(least_gap(regions, words, mask, level) for level in (0.0, 0.2)) > 1e-2
    with jax.enable_x64(True):
        check_grads(
            jax.jit(lambda v, w: _scores(True, 0.2, v, w, mask)),
            (jnp.asarray(regions), jnp.asarray(words)),
            order=1,
            modes=("rev",),
        )


def _density(x, mean, deviation):
    return np.exp(-((x - mean) ** 2) / (2 * deviation**2)) / deviation


@pytest.mark.parametrize("deviations", [(0.1, 0.06), (0.05, 0.09), (0.08, 0.08), (0.08, 0.0800001)])
def test_at_the_boundary_one_density_is_alpha_times_the_other(deviations):
    means = np.array([0.6, 0.3], np.float32)
    t, exists = naaf.boundary(means, np.array(deviations, np.float32), alpha=2.0)
    assert exists and 0.3 < t < 0.6
    matched, mismatched = (_density(t, m, s) for m, s in zip(means, deviations, strict=True))
    np.testing.assert_allclose(matched, 2.0 * mismatched, rtol=1e-3)


@pytest.mark.parametrize("deviations", [(0.0, 0.1), (0.1, 0.0), (0.0, 0.0), (0.09, 0.1)])
def test_no_boundary(deviations):
    # Equal means: the narrower one is twice as dense nowhere.
    t, exists = naaf.boundary(np.float32([0.5, 0.5]), np.array(deviations, np.float32))
    assert not exists and t == 0.0


def _values(scores, regions, words, mask):
    """Greatest similarities of right captions' words, with their own and the last image."""
    own, last = [], []
    for j in range(len(mask)):
        if scores[:, j].argmax() == j:
            own.append((words[j, mask[j]] @ regions[j].T).max(1))
            last.append((words[j, mask[j]] @ regions[scores[:, j].argmin()].T).max(1))
    return np.concatenate(own), np.concatenate(last)


def _fitted(own, last):
    """(mean - 3 deviations, root between the means) in float64, by numpy's own root finder."""
    (m, s), (o, q) = (
        (x.astype(np.float64).mean(), x.astype(np.float64).std(ddof=1)) for x in (own, last)
    )
    constant = (o * s) ** 2 - (m * q) ** 2 + 2 * (s * q) ** 2 * np.log(q / (2 * s))
    roots = np.roots([s**2 - q**2, 2 * (m * q**2 - o * s**2), constant])
    return m - 3 * s, next(x for x in roots if o < x < m)


def test_a_batch_moves_the_thresholds_once():
    regions, words, mask = pairs(LENGTHS, **BATCH)
    scores = np.asarray(SCORES(True, 0.1, regions, words, mask))
    own, last = _values(scores, regions, words, mask)
    assert 200 < own.size < mask.sum()  # enough words, and some captions are wrong
    safe, root = _fitted(own, last)
    state = naaf.initial_state()._replace(
        threshold=jnp.asarray(0.1), safe_threshold=jnp.asarray(0.5)
    )
    found = BATCHED(state, scores, regions, words, mask)
    np.testing.assert_allclose(found.threshold, 0.7 * root + 0.3 * 0.1, atol=1e-5)
    np.testing.assert_allclose(found.safe_threshold, 0.7 * max(safe, 0) + 0.3 * 0.5, atol=1e-5)
    np.testing.assert_allclose(found.fitted_mean, [own.mean(), last.mean()], atol=1e-6)
    deviations = [own.std(ddof=1), last.std(ddof=1)]
    np.testing.assert_allclose(found.fitted_deviation, deviations, atol=1e-5)
    assert found.count == 0 and not found.mean.any() and not found.moment.any()


@pytest.mark.parametrize("deviations, exists", [((0.3, 0.1), True), ((0.0, 0.1), False)])
def test_a_threshold_below_zero_counts_as_zero(deviations, exists):
    regions, words, mask = pairs(LENGTHS, **BATCH)
    moment = 249.0 * np.square(deviations)
    state = naaf.initial_state()._replace(
        threshold=jnp.asarray(0.5),
        safe_threshold=jnp.asarray(0.4),
        count=jnp.asarray(250.0),
        mean=jnp.asarray([0.6, 0.2]),
        moment=jnp.asarray(moment, jnp.float32),
    )
    # Every caption ranks its own image last: nothing is added to what was collected.
    state = BATCHED(state, -np.eye(40, dtype=np.float32), regions, words, mask)
    root = np.roots([0.08, 2 * (0.6 * 0.01 - 0.2 * 0.09), 0.0036 - 0.0036 + 0.0018 * np.log(1 / 6)])
    new = 0.7 * root.max() + 0.3 * 0.5, 0.3 * 0.4  # 0.6 - 0.9 < 0
    np.testing.assert_allclose(state[:2], new if exists else (0.5, 0.4), rtol=1e-5)
    np.testing.assert_allclose(state.fitted_deviation, deviations, rtol=1e-5)


def test_small_batches_are_collected_until_there_are_enough_words():
    regions, words, mask = pairs(LENGTHS, **BATCH)
    state, seen = naaf.initial_state(), []
    for start in range(0, 40, 8):
        part = [x[start : start + 8] for x in (regions, words, mask)]
        scores = np.asarray(SCORES(True, 0.0, *part))
        seen.append(_values(scores, *part))
        before, state = state, BATCHED(state, scores, *part)
        count = sum(len(own) for own, _ in seen)
        if count > 200:
            break
        assert state.count == count and state.threshold == 0.0
    assert before.count > 150 and state.count == 0
    safe, root = _fitted(*(np.concatenate(x) for x in zip(*seen, strict=True)))
    np.testing.assert_allclose(state.threshold, 0.7 * root, atol=1e-5)
    np.testing.assert_allclose(state.safe_threshold, 0.7 * max(safe, 0), atol=1e-5)


def test_pairs_that_do_not_count_change_nothing():
    regions, words, mask = pairs(LENGTHS[:9], **BATCH | {"images": 9})
    where = np.arange(9) < 6
    state = naaf.initial_state()._replace(threshold=jnp.asarray(0.2))
    scores = np.array(SCORES(True, 0.2, regions, words, mask))
    cut = [x[:6] for x in (regions, words, mask)]
    expected = BATCHED(state, scores[:6, :6], *cut)
    scores[6], scores[7:], scores[:, 6:] = 9.0, -9.0, 5.0
    found = BATCHED(state, scores, regions, words, mask, where=where)
    assert found.count > 10
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    sequential = jax.jit(naaf.update_sequential)
    used, expected = sequential(state, *cut)
    regions[6:] = regions[0]
    found_used, found = sequential(state, regions, words, mask, where=where)
    np.testing.assert_allclose(found_used[:6], used, atol=1e-6)
    assert found.count > 10 and found.threshold == 0.0  # too few words
    _, nobody = sequential(state, regions, words, mask, where=np.zeros(9, bool))
    assert nobody.threshold == state.threshold
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)

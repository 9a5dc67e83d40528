"""Running and exact prototypes against hand-worked cases, float64 loops and exact sums."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trm_jax.memory import knowledge as knowledge_lib
from trm_jax.memory.knowledge import Prototypes

K, S, Z = 5, 16, 3
update = jax.jit(knowledge_lib.update, static_argnames="decay")
accumulate = jax.jit(knowledge_lib.accumulate)
finish = jax.jit(knowledge_lib.finish)
draw = jax.jit(knowledge_lib.draw)


def batches(seed, count=3, size=S, absent=-1):
    """Some (mu, word, where); the word `absent` occurs nowhere, -1 does."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        mu = rng.normal(size=(size, Z)).astype(np.float32) * 10 ** rng.uniform(-3, 3)
        word = rng.integers(-1, K, size).astype(np.int32)
        word[word == absent] = -1
        where = rng.random(size) < 0.8
        mu[~where] = np.nan
        yield jnp.asarray(mu), jnp.asarray(word), jnp.asarray(where)


def test_update_hand_worked():
    before = Prototypes(
        jnp.array([[2.0, 4.0], [0.1, -0.3], [0.0, 0.0]]), jnp.array([3, 5, 0], jnp.int32)
    )
    # Word 0 has the mean (2, 0), word 2 is new; a masked region of word 1 and two without a word.
    mu = jnp.array([[3, 5], [4, 0], [jnp.nan] * 2, [0, 0], [5, 9], [9, 9], [7, 7]], jnp.float32)
    word = jnp.array([2, 0, 1, 0, 2, -1, 3], jnp.int32)
    where = jnp.array([True, True, False, True, True, True, True])
    after = update(before, mu, word, decay=0.75, where=where)
    np.testing.assert_array_equal(after.vectors[0], [2.0, 3.0])
    np.testing.assert_array_equal(after.vectors[1], before.vectors[1])
    np.testing.assert_array_equal(after.vectors[2], [4.0, 7.0])
    assert after.counts.tolist() == [3, 5, 2]
    # The second sight moves what the first has set, by the default decay.
    again = update(after, jnp.array([[104.0, 7.0]]), jnp.array([2]))
    np.testing.assert_allclose(again.vectors[2], [0.99 * 4 + 0.01 * 104, 7.0], rtol=1e-6)
    assert again.counts.tolist() == [3, 5, 2]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), absent=st.integers(0, K - 1))
def test_update_follows_the_loop(seed, absent):
    state = knowledge_lib.create(K, Z)
    expected: dict[int, np.ndarray] = {}
    counts, largest = np.zeros(K, int), 0.0
    for mu, word, where in batches(seed, absent=absent):
        state = update(state, mu, word, decay=0.9, where=where)
        largest = max(largest, float(np.nanmax(np.abs(mu))))
        for k in set(np.asarray(word[where]).tolist()) - {-1}:
            members = np.asarray(mu, np.float64)[np.asarray((word == k) & where)]
            mean = members.mean(0)
            counts[k] = counts[k] or len(members)
            expected[k] = 0.9 * expected[k] + 0.1 * mean if k in expected else mean
    for k in range(K):
        np.testing.assert_allclose(
            state.vectors[k], expected.get(k, np.zeros(Z)), rtol=1e-6, atol=1e-6 * largest
        )
    np.testing.assert_array_equal(state.counts, counts)
    assert counts[absent] == 0


def test_no_gradient_flows_into_the_prototypes():
    mu, word, _ = next(batches(0))
    value = lambda mu: update(knowledge_lib.create(K, Z), mu, word).vectors.sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(value)(jnp.ones_like(mu)), 0.0)


def passed(stream, num_words=K, width=Z):
    sums = knowledge_lib.create_sums(num_words, width)
    for mu, word, where in stream:
        sums = accumulate(sums, mu, word, where=where)
    return sums


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_exact_pass_is_the_mean_of_all_regions(seed):
    stream = list(batches(seed, absent=1))
    sums = passed(stream)
    previous = Prototypes(jnp.full((K, Z), 7.0), jnp.full(K, 9, jnp.int32))
    means = finish(sums, previous)
    mu, word, where = (np.concatenate(parts) for parts in zip(*stream, strict=True))
    for k in range(K):
        members = mu[(word == k) & where]
        if not len(members):
            assert (means.vectors[k].tolist(), int(means.counts[k])) == ([7.0] * Z, 9)
            continue
        exact = np.array([math.fsum(column) for column in members.T.tolist()])
        total = np.asarray(sums.high[k], np.float64) + np.asarray(sums.low[k], np.float64)
        scale = np.abs(members.astype(np.float64)).sum(0)
        assert (np.abs(total - exact) <= len(members) * 2.0**-46 * scale).all()
        np.testing.assert_array_max_ulp(
            np.asarray(means.vectors[k]), (total / len(members)).astype(np.float32), 1
        )
        assert int(means.counts[k]) == len(members)
    assert int(means.counts[1]) == 9


def test_rebuilt_from_scratch_equals_the_running_prototypes_after_the_pass():
    stream = list(batches(3))
    running = knowledge_lib.create(K, Z)
    for mu, word, where in stream * 2:
        running = update(running, mu, word, where=where)
    scratch = finish(passed(stream), knowledge_lib.create(K, Z))
    assert np.abs(running.vectors - scratch.vectors).max() > 0.1  # the running ones have drifted
    refreshed = finish(passed(stream), running)
    for a, b in zip(scratch, refreshed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_and_a_half_million_regions_lose_nothing():
    # Column 0 is all alike; column 1 nearly cancels; in column 2 what is left hides behind 3e7.
    # Every sum fits in two floats, so it must be exact.
    count, size = 320, 8192
    rng = np.random.default_rng(0)
    mu = np.empty((count, size, 3), np.float32)
    mu[..., 0] = 0.1
    mu[..., 1] = np.resize([1e6, -1e6], size) + rng.uniform(0, 2, (count, size))
    mu[..., 2] = np.resize([3e7, 1, -3e7, 1], size)
    word = np.repeat(rng.random((count, size // 4)) < 0.05, 4, axis=1).astype(np.int32)

    @jax.jit
    def whole_pass(mu, word):
        add = lambda sums, batch: (knowledge_lib.accumulate(sums, *batch), None)  # noqa: E731
        return jax.lax.scan(add, knowledge_lib.create_sums(2, 3), (mu, word))[0]

    sums = whole_pass(mu, word)
    means = finish(sums, knowledge_lib.create(2, 3))
    for k in range(2):
        members = mu[word == k]
        assert int(means.counts[k]) == len(members)
        for column in range(3):
            exact = math.fsum(members[:, column].tolist())
            assert float(sums.high[k, column]) + float(sums.low[k, column]) == exact
            np.testing.assert_array_max_ulp(
                np.asarray(means.vectors[k, column]), np.float32(exact / len(members)), 1
            )
            if k == 0:  # what a float32 sum in the order of the data would give
                naive = np.cumsum(members[:, column], dtype=np.float32)[-1]
                assert abs(naive / exact - 1) > 1e-5, column


def test_the_same_bits_on_any_number_of_devices(shard):
    def step(state, key, mu, word, where):
        running, sums, regions = state
        return (
            update(running, mu, word, where=where),
            accumulate(sums, mu, word, where=where),
            draw(regions, key, mu, word, where=where),
        )

    one = many = (
        knowledge_lib.create(K, Z),
        knowledge_lib.create_sums(K, Z),
        knowledge_lib.create_random_regions(K, Z),
    )
    assert jax.device_count() > 1
    for number, batch in enumerate(batches(5, size=64)):
        key, placed = jax.random.key(number), shard(*batch)
        assert len(placed[0].sharding.device_set) == jax.device_count()
        one, many = step(one, key, *batch), step(many, key, *placed)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [8, 24, 48])
def test_the_cut_into_batches_hardly_matters(size):
    mu, word, where = next(batches(7, size=48))
    parts = [tuple(x[i : i + size] for x in (mu, word, where)) for i in range(0, 48, size)]
    means = finish(passed(parts), knowledge_lib.create(K, Z))
    whole = finish(passed([(mu, word, where)]), knowledge_lib.create(K, Z))
    np.testing.assert_array_max_ulp(np.asarray(means.vectors), np.asarray(whole.vectors), 1)
    np.testing.assert_array_equal(means.counts, whole.counts)


def test_every_region_of_a_word_is_drawn_equally_often():
    # Word 0 has regions 0..7 in batches of 3 and 5, word 1 one region, word 2 a masked one.
    mu = jnp.arange(11, dtype=jnp.float32)[:, None]
    word = jnp.array([0, 0, 0, 1, 0, 0, 0, 0, 0, 2, -1], jnp.int32)
    where = jnp.arange(11) != 9

    @jax.jit
    @jax.vmap
    def drawn(key):
        regions = knowledge_lib.create_random_regions(3, 1)
        for number, part in enumerate((slice(0, 4), slice(4, 11))):
            batch_key = jax.random.fold_in(key, number)
            regions = knowledge_lib.draw(
                regions, batch_key, mu[part], word[part], where=where[part]
            )
        return regions

    keys = jax.random.split(jax.random.key(0), 4000)
    regions = drawn(keys)
    values, times = np.unique(np.asarray(regions.vectors[:, 0, 0]), return_counts=True)
    assert values.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert np.abs(times - 500).max() < 5 * math.sqrt(4000 * 1 / 8 * 7 / 8)
    np.testing.assert_array_equal(regions.vectors[:, 1, 0], 3.0)
    np.testing.assert_array_equal(regions.vectors[:, 2, 0], 0.0)
    np.testing.assert_array_equal(regions.numbers[:, 2], -1)
    np.testing.assert_array_equal(drawn(keys).vectors, regions.vectors)

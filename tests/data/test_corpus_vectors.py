"""Word vectors of texts: counts and information by hand and by loops, neighbours, the interface."""

import numpy as np
import pytest
from scipy import sparse

from trm_jax.data import corpus_vectors, word_vectors
from trm_jax.data.caption_words import usable
from trm_jax.types import UserError


def test_counts_and_information_by_hand():
    # Words a, b, c; texts "a b", "a b", "c a".
    occurrences = sparse.csr_array(np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1]]))
    counts = corpus_vectors.cooccurrences(occurrences)
    np.testing.assert_array_equal(counts.toarray(), [[0, 2, 1], [2, 0, 0], [1, 0, 0]])
    # a is in 3 of 6 pairs, b in 2, c in 1: each pair is twice as frequent as by chance.
    plain = corpus_vectors.positive_pmi(counts, smoothing=1.0).toarray()
    np.testing.assert_allclose(plain, np.log(2) * np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]]))
    chance = np.array([3, 2, 1]) ** 0.75 / (3**0.75 + 2**0.75 + 1)
    smooth = corpus_vectors.positive_pmi(counts).toarray()
    expected = np.array([[1, 2 / 3, 1 / 3], [1, 1, 1], [1, 1, 1]]) / chance
    np.testing.assert_allclose(smooth, np.log(expected) * (plain > 0))
    assert smooth[0, 2] < smooth[0, 1] and smooth[2, 0] != smooth[0, 2]
    shifted = corpus_vectors.positive_pmi(counts, shift=2.0)
    np.testing.assert_allclose(shifted.toarray(), np.maximum(smooth - np.log(2), 0))
    assert shifted.nnz == 2
    # "a a a b": each of three a is beside two others.
    repeated = corpus_vectors.cooccurrences(sparse.csr_array(np.array([[3, 1]])))
    np.testing.assert_array_equal(repeated.toarray(), [[6, 3], [3, 0]])


LETTERS = list("abcdefghijkl")


def _texts(seed=0, count=60):
    rng = np.random.default_rng(seed)
    chances = np.linspace(3, 1, len(LETTERS)) / np.linspace(3, 1, len(LETTERS)).sum()
    return [" ".join(rng.choice(LETTERS, rng.integers(1, 7), p=chances)) for _ in range(count)]


def _information(texts, words):
    """PPMI with loops over the places of a text."""
    counts = np.zeros((len(words), len(words)))
    for text in texts:
        parts = text.split()
        for i, word in enumerate(parts):
            for j, context in enumerate(parts):
                if i != j:
                    counts[words.index(word), words.index(context)] += 1
    smooth = counts.sum(0) ** 0.75
    information = np.zeros_like(counts)
    for w, c in np.argwhere(counts):
        joint, of_word = counts[w, c] / counts.sum(), counts[w].sum() / counts.sum()
        information[w, c] = max(np.log(joint / (of_word * smooth[c] / smooth.sum())), 0)
    return information


def test_vectors_are_the_best_of_their_width():
    texts = _texts()
    found = corpus_vectors.fit(texts, width=5, min_count=1)
    times = [sum(text.split().count(word) for text in texts) for word in found.words]
    assert sorted(found.words) == LETTERS and times == sorted(times, reverse=True)
    left, singular, _ = np.linalg.svd(_information(texts, found.words))
    expected = left[:, :5] * np.sqrt(singular[:5])
    expected *= np.sign(expected[np.abs(expected).argmax(0), np.arange(5)])
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    again = corpus_vectors.fit(iter(texts[::-1]), width=5, min_count=1)
    assert again.words == found.words
    np.testing.assert_array_equal(again.vectors, found.vectors)


def test_words_of_the_same_contexts_are_near():
    rng = np.random.default_rng(0)
    groups = {
        ("dog", "cat", "horse"): ("barks", "sleeps", "eats", "runs", "fur"),
        ("bus", "car", "train"): ("drives", "stops", "wheels", "road", "engine"),
    }
    # Two words of one group are never in one text; every text has the words of all texts.
    texts = [
        f"A {noun} " + " ".join(rng.choice(contexts, 2, replace=False)) + ", the end."
        for nouns, contexts in groups.items()
        for noun in nouns
        for _ in range(25)
    ]
    found = corpus_vectors.fit(texts, width=6)
    vectors, has = found.read(["dog", "cat", "horse", "bus", "car", "train"])
    assert has.all()
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = units @ units.T
    assert cosines[:3, :3].min() > 0.8 and cosines[3:, 3:].min() > 0.8
    assert np.abs(cosines[:3, 3:]).max() < 0.3


def test_rare_and_lonely_words_have_no_vector():
    texts = [*_texts(), "zebra a", "zebra b", "alone", "alone", "alone", "Fox 12 ! fox", "fox a-b"]
    found = corpus_vectors.fit(texts, width=4, min_count=3)
    assert "fox" in found and "Fox" not in found  # in lower case, with a letter
    assert not any(word in found for word in ("zebra", "alone", "12", "!", ""))
    # A rare word is no context either: the others' vectors are as if it were not there.
    without = corpus_vectors.fit(
        [text.replace("zebra ", "") for text in texts], width=4, min_count=3
    )
    assert found.words == without.words
    np.testing.assert_array_equal(found.vectors, without.vectors)


def test_a_matrix_of_lower_rank_fills_up_with_zeros():
    # "a" with each other word: two directions, "a" and what the others have in common.
    texts = [f"a {leaf}" for leaf in "bbcdddde"]
    found = corpus_vectors.fit(texts, width=4, min_count=1)
    singular = np.linalg.svd(_information(texts, found.words), compute_uv=False)
    assert singular[2] < 1e-12 and len(found) == 5
    np.testing.assert_allclose((found.vectors**2).sum(0), [*singular[:2], 0, 0], rtol=1e-5)
    # Three pairs that never meet: the rarest tells most, and takes all of the width.
    lost = corpus_vectors.fit(["a b"] * 2 + ["c d"] * 5 + ["e f"] * 9, width=2, min_count=1)
    assert lost.words == ("a", "b")


def test_it_stands_in_the_place_of_a_file(tmp_path):
    found = corpus_vectors.fit(_texts(), width=4, min_count=1)
    path = tmp_path / "vectors.txt"
    rows = (
        f"{word} {' '.join(map(repr, row.tolist()))}\n"
        for word, row in zip(found.words, found.vectors, strict=True)
    )
    path.write_text("".join(rows))
    file = word_vectors.open_file(path)
    words = ["c", "", "C", "missing", "a", "c"]
    for ours, theirs in zip(found.read(words), file.read(words), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(found.has(words), file.has(words))
    assert (len(found), found.width) == (len(file), file.width)
    assert [word in found for word in words] == [word in file for word in words]
    assert found.read([])[0].shape == file.read([])[0].shape == (0, 4)
    captions = usable(["C b missing a b"], {"b"}, found.__contains__)
    assert captions.of(0) == ("c", "b", "a", "b") and captions.dropped == {"missing": 1}


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (_texts(), {"width": 12}, "have 12 words .* vectors of width 12 need more: take a smaller"),
        ([], {}, "have 0 words that occur 5 times"),
        (["12 !", ""], {"min_count": 1}, "have 0 words"),
        (_texts(), {"width": 0}, "width=0, min_count=5, .* must be positive"),
        (_texts(), {"min_count": 0}, "min_count=0"),
        (_texts(), {"smoothing": float("nan")}, "smoothing=nan"),
        (_texts(), {"shift": 0.0}, "shift=0.0"),
    ],
)
def test_what_cannot_be_is_refused(texts, settings, message):
    with pytest.raises(UserError, match=message):
        corpus_vectors.fit(texts, **settings)

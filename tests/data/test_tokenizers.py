"""Tokenizers: ids against CLIP's published ones, padding, truncation, round trips."""

import pickle

import numpy as np
import pytest

from trm_jax.data import tokenizers
from trm_jax.data.tokenizers import ClipTokenizer, WordTokenizer
from trm_jax.types import UserError


def test_clip_ids_are_those_of_the_published_tokenizer():
    tokenizer = ClipTokenizer()
    assert tokenizer.encode("a photo of a dog") == [320, 1125, 539, 320, 1929]
    assert tokenizer.encode("A  photo of a DOG") == [320, 1125, 539, 320, 1929]
    assert tokenizer.encode("cat &amp; dog") == tokenizer.encode("cat & dog")
    row = tokenizer(["a photo of a dog"], 77)[0]
    assert row[:8].tolist() == [49406, 320, 1125, 539, 320, 1929, 49407, 0]
    assert row.dtype == np.int32 and not row[8:].any()


def test_truncation_keeps_the_end_token():
    rows = ClipTokenizer()(["a photo of a dog", "a"], 5)
    assert rows.tolist() == [[49406, 320, 1125, 539, 49407], [49406, 320, 49407, 0, 0]]
    with pytest.raises(UserError, match="length 1"):
        ClipTokenizer()(["a"], 1)


def test_words_are_ranked_by_count_then_alphabet():
    captions = ["A dog, a cat.", "the dog's dog"]
    tokenizer = WordTokenizer.from_captions(captions)
    assert tokenizer.words == ("a", "dog", ",", ".", "cat", "dog's", "the")
    assert WordTokenizer.from_captions(captions, min_count=2).words == ("a", "dog")
    assert tokenizer.vocab_size == 11
    assert tokenizer.encode("A zebra, a dog!") == [4, 1, 6, 4, 5]  # "!" is in no caption: dropped
    assert tokenizer(["the cat"], 6).tolist() == [[2, 10, 8, 3, 0, 0]]


def test_split_words_keeps_apostrophes_and_accents():
    assert tokenizers.split_words("Café's 2 dogs--ran!") == ["café's", "2", "dogs", "-", "-"] + [
        "ran",
        "!",
    ]


@pytest.mark.parametrize("tokenizer", [ClipTokenizer(), WordTokenizer(["dog", "a"])])
def test_config_and_pickle_round_trip(tokenizer):
    expected = tokenizer(["a dog"], 6)
    for copy in (
        tokenizers.from_config(tokenizer.to_config()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        np.testing.assert_array_equal(copy(["a dog"], 6), expected)
        assert copy.vocab_size == tokenizer.vocab_size


def test_names_that_the_tower_cannot_read_are_listed():
    words = tokenizers.WordTokenizer(("traffic", "light", "cat"))
    names = ["traffic_light", "cat", "giraffe", "traffic cone"]
    assert tokenizers.names_with_unknown_words(words, names) == ["giraffe", "traffic cone"]
    assert tokenizers.names_with_unknown_words(tokenizers.ClipTokenizer(), names) == []


def test_bad_configs_are_refused():
    with pytest.raises(UserError, match="'bpe' is unknown"):
        tokenizers.from_config({"kind": "bpe"})
    with pytest.raises(UserError, match="duplicates"):
        WordTokenizer(["a", "a"])

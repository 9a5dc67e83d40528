"""Pairs of captions and images: one example a caption, batches cut to a few lengths."""

import pickle

import numpy as np
import pytest

from trm_jax.data import pipeline
from trm_jax.data.caption_pairs import CaptionPairs, CaptionTexts
from trm_jax.data.tokenizers import WordTokenizer
from trm_jax.types import BadSampleError, UserError

_WORDS = ("a", "dog", "cat", "runs", "on", "grass", "and", "barks")
BUCKETS = (5, 7, 10)
_SIZES = ((3,), (1, 5), (2, 12, 3), (2,), (8, 3), (2, 4, 6))  # words of the captions


class _Scenes:
    """6 images with 1 to 3 captions of 1 to 12 words; image 4 cannot be read."""

    class_names = ()
    labels = np.zeros((6, 0), np.int8)
    ids = tuple("abcdef")

    def __len__(self):
        return 6

    def read(self, index):
        if index == 4:
            raise BadSampleError("e: broken")
        return {"features": np.full((2, 3), index, np.float16)}

    def captions(self, index):
        rng = np.random.default_rng(index)
        return tuple(" ".join(rng.choice(_WORDS, size)) for size in _SIZES[index])


class _Nouns:
    """The nouns dog (0), cat (1) and grass (2) wherever they stand."""

    def __init__(self, source):
        self.captions = [text.split() for i in range(6) for text in source.captions(i)]

    def ids(self, number, length):
        row = np.full(length, -1, np.int32)
        words = self.captions[number][: length - 2]
        row[1 : 1 + len(words)] = [_PROXIES.get(word, -1) for word in words]
        return row

    def of_caption(self, number):
        found = {_PROXIES[word] for word in self.captions[number] if word in _PROXIES}
        return np.asarray(sorted(found), np.int32)


_PROXIES = {"dog": 0, "cat": 1, "grass": 2}
TOKENIZER = WordTokenizer(_WORDS)


@pytest.fixture(scope="module")
def source():
    return _Scenes()


def _pairs(source, **options):
    return CaptionPairs(source, TOKENIZER, BUCKETS, nouns=_Nouns(source), **options)


def test_an_epoch_has_every_caption_once_with_its_own_image(source):
    pairs = _pairs(source)
    texts = [(i, text) for i in range(6) for text in source.captions(i)]
    assert len(pairs) == len(texts) == 12
    for position, (image, text) in enumerate(texts):
        if image == 4:
            with pytest.raises(BadSampleError):
                pairs.sample(position, np.random.default_rng(0))
            continue
        sample = pairs.sample(position, np.random.default_rng(0))
        assert sample["index"] == image and sample["valid"]
        np.testing.assert_array_equal(sample["features"], np.full((2, 3), image, np.float32))
        np.testing.assert_array_equal(sample["tokens"], TOKENIZER([text], 10)[0])
        # The token of every marked noun is that noun's, and the positives are just these.
        marked = np.flatnonzero(sample["noun_ids"] >= 0)
        words = [_WORDS[token - 4] for token in sample["tokens"][marked]]
        assert [_PROXIES[word] for word in words] == sample["noun_ids"][marked].tolist()
        wanted = {_PROXIES[word] for word in text.split() if word in _PROXIES}
        assert set(sample["nouns"].tolist()) - {-1} == wanted


def test_all_captions_of_an_image_may_share_their_nouns(source):
    own, shared = _pairs(source), _pairs(source, all_captions=True)
    positions = [p for p in range(12) if p not in (7, 8)]  # image 4 is broken
    draws = np.random.default_rng(0)
    for position in positions:
        a, b = (pairs.sample(position, draws) for pairs in (own, shared))
        siblings = [p for p in positions if own.sample(p, draws)["index"] == a["index"]]
        union = {k for p in siblings for k in own.sample(p, draws)["nouns"].tolist()} - {-1}
        assert set(b["nouns"].tolist()) - {-1} == union
        np.testing.assert_array_equal(a["noun_ids"], b["noun_ids"])


@pytest.mark.parametrize("processes", [1, 2])
def test_all_processes_cut_a_batch_by_the_longest_text_of_all(source, processes):
    pairs = _pairs(source)
    whole = list(pipeline.train_batches(pairs, batch_size=4, seed=3, num_steps=6))
    seen = set()
    for rank in range(processes):
        parts = pipeline.train_batches(
            pairs, batch_size=4, seed=3, num_steps=6, process_index=rank, process_count=processes
        )
        for batch, part in zip(whole, parts, strict=True):
            size = 4 // processes
            for name, array in batch.items():
                np.testing.assert_array_equal(array[rank * size : (rank + 1) * size], part[name])
            longest = int((batch["tokens"] != 0).sum(1).max())
            width = part["tokens"].shape[1]
            # The text of an image that could not be read counts all the same; here it is a blank.
            assert width in BUCKETS and longest <= width == part["noun_ids"].shape[1]
            if batch["valid"].all():
                assert width == next(b for b in BUCKETS if b >= longest)
            seen.add(width)
    assert len(seen) > 1
    later = list(pipeline.train_batches(pairs, batch_size=4, seed=3, start_step=4, num_steps=2))
    for a, b in zip(whole[4:], later, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_texts_come_sorted_so_that_little_padding_is_computed(source):
    texts = CaptionTexts(source, TOKENIZER, BUCKETS)
    batches = list(pipeline.eval_batches(texts, batch_size=5))
    widths = [batch["tokens"].shape[1] for batch in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1] == 10
    rows = {}
    for batch in batches:
        for tokens, number, image, valid in zip(
            batch["tokens"], batch["index"], batch["image_index"], batch["valid"], strict=True
        ):
            if valid:
                rows[int(number)] = (np.pad(tokens, (0, 10 - len(tokens))), int(image))
    listed = [(i, text) for i in range(6) for text in source.captions(i)]
    assert sorted(rows) == list(range(12))
    for number, (image, text) in enumerate(listed):
        np.testing.assert_array_equal(rows[number][0], TOKENIZER([text], 10)[0])
        assert rows[number][1] == image


def test_a_blank_has_no_noun_and_no_word(source):
    blank = _pairs(source).blank(7)
    assert not blank["valid"] and not blank["tokens"].any() and not blank["features"].any()
    assert (blank["noun_ids"] == -1).all() and (blank["nouns"] == -1).all()


@pytest.mark.parametrize("buckets", [(), (7, 5), (5, 5), (2, 9)])
def test_buckets_that_cannot_be_are_refused(source, buckets):
    with pytest.raises(UserError, match="data.length_buckets"):
        CaptionTexts(source, TOKENIZER, buckets)


def test_pairs_reach_worker_processes(source):
    pairs = pickle.loads(pickle.dumps(_pairs(source)))
    assert len(pairs) == 12

"""Words of captions: hand-worked captions, what is kept in which form, the tags, real captions."""

import gzip
import json
import time

import numpy as np
import pytest
from nltk.tokenize import NLTKWordTokenizer

from tests.data.taggers import TAGS, write_pickle
from trm_jax.data import caption_words, word_vectors
from trm_jax.data.caption_words import usable
from trm_jax.data.tagger import open_tagger
from trm_jax.types import UserError

KNOWN = ("man", "light", "traffic light", "light pole", "women's hat", "New York", "stop sign")


def _none(word):
    return False


def _rows(words):
    return [words.of(caption) for caption in range(len(words.indptr) - 1)]


def test_tokens_of_hand_worked_captions():
    for text, expected in {
        "A man's dog doesn't bark.": "A|man|'s|dog|does|n't|bark|.",
        "A man sits. He reads (a book), 20% of.": "A|man|sits|.|He|reads|(|a|book|)|,|20|%|of|.",
        'The "red" t-shirt': "The|``|red|''|t-shirt",
        "  ": "",
    }.items():
        assert caption_words.tokens(text) == [part for part in expected.split("|") if part]
    # Of one sentence they are NLTK's own.
    text = "Two men, one of them can't swim; they cannot be gonna-be heroes!"
    assert caption_words.tokens(text) == NLTKWordTokenizer().tokenize(text)


def test_words_are_looked_up_in_the_knowledge_first_and_then_in_lower_case():
    vectors = {"Man", "Paris", "dog", "a", "'s", "café"}
    texts = ["A Man, a MAN's dog in Paris 2", "DOG dog Dog CAFÉ paris", "Zebra zebra 12 ?!"]
    got = usable(texts, KNOWN, vectors.__contains__)
    assert _rows(got) == [
        ("a", "man", "a", "man", "'s", "dog", "Paris"),
        ("dog", "dog", "dog", "café"),
        (),
    ]
    assert got.words == ("a", "man", "'s", "dog", "Paris", "café")
    assert got.known.tolist() == [False, True, False, False, False, False]
    assert got.indptr.tolist() == [0, 7, 11, 11]
    assert got.indices.tolist() == [0, 1, 0, 1, 2, 3, 4, 3, 3, 3, 5]
    assert got.indptr.dtype == np.int64 and got.indices.dtype == np.int32
    assert got.dropped == {"in": 1, "paris": 1, "Zebra": 1, "zebra": 1} and got.unusable == 1
    assert got.describe() == (
        "3 captions: 2 words of the knowledge, 9 outside it with a vector, 4 dropped without one; "
        "1 captions without a usable word"
    )


def test_concepts_are_taken_longest_first():
    known = (*KNOWN, "red traffic light", "in front of the", "cannot", "7 eleven", "a")
    for text, expected in {
        "traffic light pole": "traffic light",  # what was taken is no part of another
        "A light pole": "a|light pole",
        "the red Traffic Light": "red traffic light",
        "red traffic, light": "light",
        "a traffic. Light": "a|light",
        "women's hat": "women's hat",
        "Women's hat, women's hats": "women's hat",
        "in front of the man": "man",  # four tokens
        "7 eleven 7": "7 eleven",
        "New York, new york": "New York",  # the knowledge has no lower case of it
        "it cannot stop": "cannot",
        "stop sign stop sign": "stop sign|stop sign",
    }.items():
        assert _rows(usable([text], known, _none)) == [tuple(expected.split("|"))], text
    single = usable(["a red traffic light"], known, _none, longest=1)
    assert _rows(single) == [("a", "light")]
    assert _rows(usable(["in front of the man"], known, _none, longest=4)) == [
        ("in front of the", "man")
    ]


def test_only_words_of_the_chosen_tags_are_used(tmp_path):
    # What has no tag here is VBZ.
    tags = TAGS | {"hot": "JJ", "light": "NN", "man": "NN", "bigger": "JJR", "tallest": "JJS"}
    classes = set(tags.values()) | {"VBZ"}
    place = write_pickle(tmp_path / "tagger.pickle", ({}, tags, classes))
    texts = [
        "The red man eats a hot dog in Paris. Bigger, bigger kids stop light",
        "red",
        "stop it",
    ]
    known = (*KNOWN, "hot dog", "red", "stop light", "light red", "eats")
    vectors = {"a", "kids", "bigger", "Paris"}.__contains__

    def rows(choice):
        got = usable(
            [*texts, "a light red box"], known, vectors, caption_words=choice, tagger=place
        )
        return _rows(got), got.words, got.dropped

    both = ("red", "man", "hot dog", "Paris", "bigger", "kids", "stop light")
    found, words, dropped = rows("nouns_adjectives")
    assert found == [both, ("red",), (), ("light red",)]
    assert words == (*both, "light red") and dropped == {"box": 1}
    found, words, dropped = rows("nouns")
    noun = ("man", "hot dog", "Paris", "kids", "stop light")
    assert found == [noun, (), (), ()] and words == noun and dropped == {"box": 1}
    # The tagger sees the tokens that all words are taken from.
    found = open_tagger(place)(texts[0])
    assert [texts[0][start:end] for start, end, _ in found] == caption_words.tokens(texts[0])


def test_mistakes_are_one_line():
    for change, message in {
        ("texts", ("a", " \t")): "captions.txt: line 2 is empty; give it a text or take it out",
        ("caption_words", "verbs"): "caption_words is 'verbs'; it is one of all, nouns_adjectives,",
        ("longest", 0): "concepts of 0 tokens cannot be looked for",
    }.items():
        given = {"texts": ["a"], "source": "captions.txt", **dict([change])}
        with pytest.raises(UserError, match=message):
            usable(given.pop("texts"), KNOWN, _none, **given)
    nothing = usable([], KNOWN, _none)
    assert nothing.indptr.tolist() == [0] and nothing.words == () and nothing.unusable == 0


@pytest.mark.realdata
def test_real_captions(data_root):
    captions = json.loads((data_root / "captions" / "coco_captions_val2017.json").read_text())
    texts = [entry["caption"] for entry in captions["annotations"]][::5]
    source = word_vectors.open_file(data_root / "words" / "glove.twitter.25d.12k.txt", 25)
    known = {"person", "traffic light", "dog", "man", "fire hydrant", "teddy bear", "red"}
    caption_words.tokens("")  # imports NLTK
    start = time.process_time()
    got = usable(texts, known, source.__contains__)
    assert time.process_time() - start < 2.5  # 0.5 when it was written
    assert len(got.indptr) == 5_004 and got.unusable == 0
    # Counted in another way: single words without a hyphen or an apostrophe.
    lowered = [f" {text.lower().replace('.', ' ').replace(',', ' ')} " for text in texts]
    for word in ("dog", "traffic light", "fire hydrant"):
        number = got.words.index(word)
        split = sum(text.count(f" {word} ") for text in lowered)
        assert split > 10
        assert abs((got.indices == number).sum() - split) <= 0.01 * split, word
        assert got.known[number]
    # Every token with a letter is used or dropped, and a concept has two.
    letters = sum(any(map(str.isalpha, t)) for text in texts for t in caption_words.tokens(text))
    two = sum(" " in got.words[index] for index in got.indices)
    assert letters == len(got.indices) + two + sum(got.dropped.values())
    found = word_vectors.read_any_case(source, got.words)
    assert found.found[~got.known].all() and not found.composed[~got.known].any()


@pytest.mark.realdata
def test_nouns_of_real_captions(data_root):
    with gzip.open(data_root / "captions" / "flickr30k_test_2016.1.en.gz", "rt") as file:
        texts = [line.rstrip("\n") for line in file][:300]
    source = word_vectors.open_file(data_root / "words" / "glove.twitter.25d.12k.txt", 25)
    sizes = []
    for choice in caption_words.CHOICES:
        got = usable(
            texts,
            ("man", "dog", "hat"),
            source.__contains__,
            caption_words=choice,
            tagger=data_root / "nltk_data",
        )
        sizes.append(len(got.indices))
        if choice == "nouns":
            # The man with pierced ears is wearing glasses and an orange hat.
            assert got.of(0) == ("man", "ears", "glasses", "orange", "hat")
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * 1.1 * sizes[2]

"""Nouns of captions and their prompts: hand-worked captions, the draws, a tiny training."""

import collections
import math
import pickle

import nltk
import numpy as np
import pytest

from configs import simcon_glyphs
from tests import tiny
from tests.data.taggers import JSON, TABLES, TAGS, write_json, write_pickle
from trm_jax.data import nouns, tagger
from trm_jax.data.sources import glyph_captions
from trm_jax.data.sources.glyphs import GlyphScenes
from trm_jax.data.tokenizers import ClipTokenizer, WordTokenizer
from trm_jax.types import UserError


class _Source:
    """One image of one caption."""

    ids = ("a",)
    class_names = ()
    labels = np.zeros((1, 0), np.int8)

    def __len__(self):
        return 1

    def read(self, index):
        return {"image": np.zeros((4, 4, 3), np.uint8)}

    def captions(self, index):
        return ("a dog",)


class _Named(_Source):
    """It knows the nouns of its captions."""

    def noun_words(self):
        return {"sun", "cloud", "cup"}


@pytest.fixture
def data_path(tmp_path, monkeypatch):
    """The one folder in which NLTK looks for data; what it read before is forgotten."""

    def forget():
        nouns.nouns.cache_clear()
        tagger._open.cache_clear()

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    forget()
    yield tmp_path
    forget()


def _prompts(count, tokenizer=None):
    return nouns.NounPrompts(count, _Named(), tokenizer or ClipTokenizer())


def test_nouns_are_what_is_tagged_so(data_path):
    tags = TAGS | {"%": "NN", "//x.y/z": "NN", "U.S.": "NNP", "x": "NN"}
    write_json(data_path / "taggers" / JSON, ({}, tags, {"NN", "VBZ"}))
    assert nouns.nouns("A red dog runs, kids in Paris and the Alps") == (
        "dog", "kids", "paris", "alps",
    )  # fmt: skip
    assert nouns.nouns("A dog. Kids runs. a DOG by kids. ") == ("dog", "kids")
    assert nouns.nouns("dog of the U.S. of 20 % //x.y/z x") == ("dog", "u.s.")
    assert nouns.nouns("it runs") == () and nouns.nouns("") == ()


def test_spans_of_nouns_and_their_singulars(tmp_path):
    place = write_pickle(tmp_path / "tagger.pickle")
    caption = 'The "dogs" of Paris. A DOG in boxes, dogs by a t-shirt'
    spans = nouns.noun_spans(caption, tagger=place)
    assert spans == (
        (5, 9, "dog"), (14, 19, "paris"), (23, 26, "dog"), (30, 35, "box"), (37, 41, "dog"),
        (47, 54, "t-shirt"),
    )  # fmt: skip
    plain = nouns.noun_spans(caption, tagger=place, lemmatise="off")
    assert [noun for *_, noun in plain] == ["dogs", "paris", "dog", "boxes", "dogs", "t-shirt"]
    assert [span[:2] for span in plain] == [span[:2] for span in spans]
    # What is tagged as a singular stays: "box" has no singular, nor is "DOG" tagged as a plural.
    tables = (TABLES[0], TAGS | {"dogs": "NN"}, TABLES[2])
    place = write_pickle(tmp_path / "other.pickle", tables)
    assert nouns.noun_spans("dogs", tagger=place) == ((0, 4, "dogs"),)
    with pytest.raises(UserError, match="nouns.lemmatise is 'all'; it is one of plurals, off"):
        nouns.noun_spans(caption, tagger=place, lemmatise="all")


def test_singulars():
    singulars = {
        "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot",
        "teeth": "tooth", "geese": "goose", "leaves": "leaf", "shelves": "shelf", "dishes": "dish",
        "dresses": "dress", "boxes": "box", "prizes": "prize", "skies": "sky", "skis": "ski",
        "cookies": "cookie", "canoes": "canoe", "heroes": "hero", "buses": "bus", "waves": "wave",
        "hula-hoops": "hula-hoop", "snowmen": "snowman", "clothes": "clothes", "sheep": "sheep",
        "grass": "grass", "dog": "dog",
    }  # fmt: skip
    assert {word: nouns.singular(word) for word in singulars} == singulars


@pytest.mark.realdata
def test_the_published_tagger_on_hand_worked_captions(monkeypatch, data_path, data_root):
    monkeypatch.setattr(nltk.data, "path", [str(data_root / "nltk_data")])
    for caption, expected in {
        "A man is riding a horse on the beach.": "man horse beach",
        "Two dogs run through the grass": "dogs grass",
        "The Eiffel Tower in Paris, France at night.": "eiffel tower paris france night",
        "a horse and two dice near some scissors": "horse dice scissors",
        "A MAN AND A DOG": "man dog",
        "A black-and-white cat . Two kids play .": "cat kids",
        "A man in a hat. He walks his dog.": "man hat dog",
        "Running fast": "",
        "???": "",
    }.items():
        assert nouns.nouns(caption) == tuple(expected.split()), caption


def test_missing_or_broken_tagger_data_is_one_line_with_the_remedy(data_path):
    remedy = "run python -m nltk.downloader averaged_perceptron_tagger_eng, or set NLTK_DATA"
    for problem in ("is not on this machine", "cannot be read"):
        for use in (
            lambda: nouns.nouns("a dog"),
            lambda: nouns.NounPrompts(3, _Source(), ClipTokenizer()),
        ):
            with pytest.raises(UserError, match=problem) as error:
                use()
            assert remedy in str(error.value) and "\n" not in str(error.value)
        if problem == "is not on this machine":
            write_json(data_path / "taggers" / JSON)
            (weights,) = data_path.rglob("*.weights.json")
            weights.write_text("{")


def test_prompts_hold_each_noun_and_template_equally_often():
    prompts, caption = _prompts(2), "The sun, a cup and a cloud: the Sun!"
    filled = {t.format(n): (t, n) for t in nouns.TEMPLATES for n in ("sun", "cloud", "cup")}
    counts, orders = collections.Counter(), collections.Counter()
    for seed in range(1200):
        texts = prompts(caption, np.random.default_rng(seed))
        drawn = [filled[text] for text in texts]
        orders[tuple(noun for _, noun in drawn)] += 1
        counts.update(template for template, _ in drawn)
    # Two of three nouns without replacement: six orders, 200 times each (sd 13).
    assert len(orders) == 6 and all(abs(count - 200) < 52 for count in orders.values())
    assert len(counts) == len(nouns.TEMPLATES) == 12
    assert all(abs(count - 200) < 56 for count in counts.values())
    assert prompts(caption, np.random.default_rng(3)) == prompts(caption, np.random.default_rng(3))


def test_few_nouns_are_repeated_and_none_gives_the_caption():
    prompts = _prompts(3, WordTokenizer(["cup"]))
    # Of no template all words are known: then it is the first.
    assert prompts("a CUP", np.random.default_rng(0)) == ["a photo of a cup."] * 3
    counts = collections.Counter(
        sum("sun" in text for text in prompts("sun above cup", np.random.default_rng(seed)))
        for seed in range(800)
    )
    # The draws with replacement are independent: binomial counts, 1 3 3 1 of 8.
    np.testing.assert_allclose([counts[k] for k in range(4)], [100, 300, 300, 100], atol=60)
    assert prompts("Nothing here", np.random.default_rng(0)) == ["Nothing here"] * 3
    again = pickle.loads(pickle.dumps(prompts))
    assert again("sun cup", np.random.default_rng(5)) == prompts(
        "sun cup", np.random.default_rng(5)
    )


def test_nouns_of_glyph_captions_are_categories_of_the_scene():
    scenes = GlyphScenes(seed=3, size=150)
    tokenizer = WordTokenizer(scenes.vocabulary())
    prompts = nouns.NounPrompts(3, scenes, tokenizer)
    assert nouns.known_nouns("two Dice near some scissors", scenes.noun_words()) == (
        "dice", "scissors",
    )  # fmt: skip
    assert {"a photo of a {}.", "a photo of the {}."} < set(prompts.templates)
    assert not any("itap" in template for template in prompts.templates)
    category, rng = glyph_captions.category_words(), np.random.default_rng(0)
    for index in range(len(scenes)):
        caption = scenes.captions(index)[0]
        for text in prompts(caption, rng):
            assert tokenizer.unknown_id not in tokenizer.encode(text)
            noun = text.rstrip(".").split()[-1]
            assert noun in caption.split() and scenes.labels[index, category[noun]] == 1


def test_a_training_with_the_multi_label_loss(tmp_path):
    config = simcon_glyphs.get_config("infonce")
    config.loss.multi_label_weight = 1.0
    tiny.shrink_clip(config.model.clip)
    config.model.update({"initial_from": "", "initial_params": ()})
    config.data.update({"image_size": 32, "train_size": 16, "test_size": 4, "batch_size": 8})
    config.train.update({"epochs": 1, "log_every": 1, "eval_every": 2, "checkpoint_every": 2})
    config.evaluate.update({"kinds": (), "pictures": 0})
    config.data.workers = 0
    tiny.run(tiny.build(config, tmp_path / "cache").job, tmp_path / "run")
    lines = tiny.lines(tmp_path / "run")
    values = [line["loss_multi_label"] for line in lines if "loss_multi_label" in line]
    assert len(values) == 2 and all(0 < value < 10 for value in values)
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    # The total is both losses: no weight is lost on the way.
    for line in lines:
        if "loss_multi_label" in line:
            total = line["loss_contrastive"] + line["loss_multi_label"]
            assert line["loss"] == pytest.approx(total, rel=1e-5)

"""The tagger beside NLTK's own, its data in all forms, and what is refused."""

import collections
import os
import pickle
import random

import nltk
import numpy as np
import pytest
from nltk.tag.perceptron import PerceptronTagger
from nltk.tokenize import NLTKWordTokenizer

from tests.data.taggers import JSON, PICKLE, TABLES, write_json, write_pickle, write_zip
from trm_jax.data import tagger
from trm_jax.data.tagger import Tagger, open_tagger
from trm_jax.types import UserError


@pytest.fixture(autouse=True)
def _forget():
    """Files of the same name differ between these tests."""
    tagger._open.cache_clear()
    yield
    tagger._open.cache_clear()


def _nltk(tables):
    """NLTK's own tagger."""
    reference = PerceptronTagger(load=False)
    reference.decode_json_params(tables)
    return reference


def _tags(found, caption):
    return [(caption[start:end], tag) for start, end, tag in found]


def test_tags_are_nltks_for_any_weights():
    rng = np.random.default_rng(0)
    words, tags = ["a", "Dog", "runs", "t-shirt", "1999", "20", "."], ["DT", "NN", "VBZ", "NNS"]
    features = ["bias", "i tag+i-2 tag NN DT", "i-1 tag NN", "i-2 tag -START-", "i+2 word !YEAR"]
    features += [f"i word {word.lower()}" for word in words]
    features += [f"i-1 word {word.lower()}" for word in words]
    features += [f"i+1 suffix {word[-3:]}" for word in words]
    for _ in range(30):
        # Few values, so that scores are often equal; "X" is no tag of the tagger.
        weights = {
            name: {tag: int(rng.integers(-2, 3)) / 2 for tag in rng.choice([*tags, "X"], 2)}
            for name in features
        }
        tables = (weights, {"a": "DT"}, set(tags))
        mine, reference = Tagger(*tables, "sha"), _nltk(tables)
        for _ in range(10):
            tokens = [str(word) for word in rng.choice(words[:-1], 6)] + ["."]
            caption = " ".join(tokens)
            assert _tags(mine(caption), caption) == reference.tag(tokens)


def test_places_are_those_of_the_tokens():
    find = Tagger(*TABLES, "sha")
    caption = "He cannot say \"a dog's ``life\"; kids do. Can't they? In the U.S. too."
    places = [(start, end) for start, end, _ in find(caption)]
    assert " ".join(caption[start:end] for start, end in places) == (
        "He can not say \" a dog 's `` life \" ; kids do . Ca n't they ? In the U.S. too ."
    )
    random.seed(0)
    signs = "ab\"'`''\"``.,()-«’“”?! s\n\tn'tdogs é--İ\u3000$%"
    reference = NLTKWordTokenizer()
    for _ in range(3000):
        text = "".join(random.choice(signs) for _ in range(random.randint(0, 14)))
        places = [(start, end) for start, end, _ in find(text)]
        if not tagger._FULL_STOP.search(text):  # NLTK's takes it for one sentence
            assert places == list(reference.span_tokenize(text)), repr(text)
        starts = [start for start, _ in places]
        assert starts == sorted(starts) and all(text[a:b].strip() == text[a:b] for a, b in places)


def test_all_forms_of_the_data_are_the_same_tagger(tmp_path, monkeypatch):
    folder = write_json(tmp_path / "json" / JSON)
    file = write_pickle(tmp_path / "pickle" / PICKLE / f"{PICKLE}.pickle")
    forms = {
        "json": [folder, write_zip(tmp_path / f"{JSON}.zip", folder), tmp_path / "json"],
        "pickle": [file, file.parent, write_zip(tmp_path / "old.zip", file.parent)],
    }
    forms["pickle"].append(file.parents[1])
    write_zip(tmp_path / "nltk_data" / "taggers" / f"{PICKLE}.zip", file.parent)
    forms["pickle"].append(tmp_path / "nltk_data")
    caption, hashes = "A red dog runs.", collections.defaultdict(set)
    expected = [("A", "NNP"), ("red", "JJ"), ("dog", "NN"), ("runs", "VBZ"), (".", ".")]
    for form, places in forms.items():
        for place in places:
            found = open_tagger(place)
            assert _tags(found(caption), caption) == expected, place
            hashes[form].add(found.sha256)
    # The hash is that of the contents, wherever they lie.
    assert [len(found) for found in hashes.values()] == [1, 1]
    assert not hashes["json"] & hashes["pickle"]
    # NLTK's own place; the newer form is taken where both are.
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "none"), str(tmp_path / "nltk_data")])
    assert {open_tagger().sha256} == hashes["pickle"]
    write_json(tmp_path / "nltk_data" / "taggers" / JSON)
    tagger._open.cache_clear()
    assert {open_tagger("").sha256} == hashes["json"]


class _Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_a_pickle_that_asks_for_more_is_refused_before_it_runs(tmp_path):
    witness = tmp_path / "ran"
    weights, tags, classes = TABLES
    for number, (value, reason) in enumerate(
        {
            "system": (_Calls(os.system, f"touch {witness}"), "asks for posix.system"),
            "eval": (_Calls(eval, "1"), "asks for __builtin__.eval"),
            "ordered": (collections.OrderedDict(), "asks for collections.OrderedDict"),
            "numpy": ({"bias": {"NN": np.float64(1)}}, "asks for numpy"),
            "none": (None, "weights are not numbers"),
            "bytes": ({"bias": {"NN": b"1"}}, "asks for _codecs.encode"),
            "nan": ({"bias": {"NN": float("nan")}}, "weights are not numbers"),
        }.values()
    ):
        path = write_pickle(tmp_path / f"{number}.pickle", (value, tags, classes))
        with pytest.raises(UserError, match=reason) as error:
            open_tagger(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not witness.exists()
    outside = tmp_path / "outside.pickle"
    with outside.open("wb") as file:
        pickler = pickle.Pickler(file)
        pickler.persistent_id = lambda value: 7 if value is tags else None
        pickler.dump((weights, tags, classes))
    with pytest.raises(UserError, match="an object from outside"):
        open_tagger(outside)


def test_what_is_no_tagger_is_one_line(tmp_path, monkeypatch):
    whole = write_pickle(tmp_path / "whole.pickle").read_bytes()
    (tmp_path / "cut.pickle").write_bytes(whole[: len(whole) // 2])
    write_pickle(tmp_path / "two.pickle", TABLES[:2])
    write_pickle(tmp_path / "tagdict.pickle", ({}, {"dog": 1}, {"NN"}))
    write_pickle(tmp_path / "classes.pickle", ({}, {}, "NN"))
    write_pickle(tmp_path / "empty.pickle", ({}, {}, set()))
    (tmp_path / "noise.zip").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "text.txt").write_text("a tagger")
    folder = write_json(tmp_path / "part")
    next(folder.glob("*.tagdict.json")).unlink()
    (tmp_path / "nothing").mkdir()
    for name, reason in {
        "cut.pickle": "cannot be read",
        "two.pickle": "not enough values",
        "tagdict.pickle": "tagdict is not a tag by word",
        "classes.pickle": "classes are not a list",
        "empty.pickle": "has no tags",
        "noise.zip": "cannot be read",
        "text.txt": "none of the files",
        "part": "none of the files",
        "nothing": "holds no tagger; give a folder",
        "missing": "holds no tagger; give a folder",
    }.items():
        with pytest.raises(UserError, match=reason) as error:
            open_tagger(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(tagger, "_LARGEST", 100)
    with pytest.raises(UserError, match="bytes is none of a tagger"):
        open_tagger(tmp_path / "whole.pickle")
    with pytest.raises(UserError, match="bytes is none of a tagger"):
        open_tagger(write_zip(tmp_path / "large.zip", write_json(tmp_path / "large")))


@pytest.mark.realdata
def test_the_published_tagger_tags_as_nltks_does(data_root):
    mine = open_tagger(data_root / "nltk_data")
    tables = tagger._tables(tagger._read(data_root / "nltk_data/taggers" / f"{PICKLE}.zip"))
    reference, tokenizer = _nltk(tables), NLTKWordTokenizer()
    captions = (data_root / "flickr8k_precomp/test_caps.txt").read_text().split("\n")[:400]
    compared = 0
    for caption in captions:
        if not tagger._FULL_STOP.search(caption):
            tokens = tokenizer.tokenize(caption)
            assert [tag for *_, tag in mine(caption)] == [tag for _, tag in reference.tag(tokens)]
            assert [place[:2] for place in mine(caption)] == list(tokenizer.span_tokenize(caption))
            compared += 1
    assert compared > 380

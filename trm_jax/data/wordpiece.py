"""BERT's WordPiece vocabulary: text to token ids, and where in the text each token lies.

Source: Devlin et al., "BERT", NAACL 2019. The splitting is that of the `tokenizers` library.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trm_jax.data.token_rows import token_rows
from trm_jax.types import UserError

_PAD, _UNKNOWN, _START, _END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
_FILES = ("tokenizer.json", "vocab.txt")
_CONFIG = "tokenizer_config.json"
# What BERT's tokenizers share; of the normalizer `lowercase` and `strip_accents` are free.
_MODEL = {
    "type": "WordPiece",
    "unk_token": _UNKNOWN,
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}
_NORMALIZER = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
_SURROGATES = re.compile("[\ud800-\udfff]")


class WordpieceTokenizer:
    """Words of a BERT and their pieces; [CLS] is SOS, [SEP] is EOS, [PAD] is 0.

    Ids equal those of transformers' BertTokenizer for all texts but those that spell a marker:
    "[SEP]" in a text is a bracket, a word and a bracket here, so that no text can end early.
    Half surrogates, which transformers refuses, are dropped as other characters without meaning.

    Args:
      words: of the vocabulary by id; pieces within a word start with "##".
      lowercase: whether texts are put in lower case.
      strip_accents: whether accents are taken off; None does as `lowercase` says.

    Raises:
      UserError: words occur twice, a marker is missing, or [PAD] is not the first.
    """

    def __init__(
        self, words: Sequence[str], lowercase: bool = True, strip_accents: bool | None = None
    ):
        self.words = tuple(words)
        self.lowercase = lowercase
        self.strip_accents = strip_accents
        ids = {word: number for number, word in enumerate(self.words)}
        if len(ids) != len(self.words):
            twice = next(word for number, word in enumerate(self.words) if ids[word] != number)
            raise UserError(f"the vocabulary of the tokenizer has {twice!r} twice")
        missing = [word for word in (_PAD, _UNKNOWN, _START, _END) if word not in ids]
        if missing:
            raise UserError(
                f"the vocabulary of the tokenizer lacks {', '.join(missing)}; take that of a BERT"
            )
        if ids[_PAD]:
            raise UserError(
                f"{_PAD} has the id {ids[_PAD]} in the vocabulary of the tokenizer, and padding is "
                "0 here; take another BERT"
            )
        self.vocab_size = len(self.words)
        self.unknown_id, self.sos_id, self.eos_id = (ids[w] for w in (_UNKNOWN, _START, _END))
        self._made: Any = None

    @classmethod
    def from_folder(cls, path: Path) -> "WordpieceTokenizer":
        """The tokenizer of a folder that holds a tokenizer.json or a vocab.txt, or of such a file.

        Beside a vocab.txt, tokenizer_config.json says whether texts are put in lower case; without
        it they are if no word has an upper-case letter. A length that a file cuts or pads texts to
        is passed over: the caller gives it.

        Raises:
          UserError: the file is missing, unreadable, or of a tokenizer that this one is not.
        """
        if path.is_dir():
            found = [path / name for name in _FILES if (path / name).exists()]
            if not found:
                raise UserError(f"{path} holds none of {', '.join(_FILES)}")
            path = found[0]
        return cls(**(_read_json(path) if path.suffix == ".json" else _read_words(path)))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without [CLS] and [SEP]."""
        return self._encoding(text).ids

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) in characters of each id that `encode` gives; pieces divide their word."""
        return self._encoding(text).offsets

    def __call__(self, texts: Sequence[str], length: int) -> np.ndarray:
        """int32 [n, length]; see `Tokenizer`."""
        return token_rows(self, texts, length)

    def to_config(self) -> dict[str, Any]:
        """{"kind": "wordpiece", "words": [...], "lowercase": ..., "strip_accents": ...}."""
        return {
            "kind": "wordpiece",
            "words": list(self.words),
            "lowercase": self.lowercase,
            "strip_accents": self.strip_accents,
        }

    def __getstate__(self) -> dict[str, Any]:
        # The backend is a native object: each worker process makes its own.
        return {**self.__dict__, "_made": None}

    def _encoding(self, text: str) -> Any:
        # One character for one, so that spans stay true; the backend drops it.
        return self._backend().encode(_SURROGATES.sub("\ufffd", text), add_special_tokens=False)

    def _backend(self) -> Any:
        if self._made is None:
            from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

            ids = {word: number for number, word in enumerate(self.words)}
            made = Tokenizer(models.WordPiece(ids, unk_token=_UNKNOWN))
            made.normalizer = normalizers.BertNormalizer(
                lowercase=self.lowercase, strip_accents=self.strip_accents
            )
            made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            self._made = made
        return self._made


def _read_words(path: Path) -> dict[str, Any]:
    # Some words are line separators of Unicode, so only "\n" may divide lines.
    words = _text(path).removesuffix("\n").split("\n")
    if any(not word for word in words):
        raise UserError(f"{path}: line {words.index('') + 1} is empty; fetch the file again")
    config = path.with_name(_CONFIG)
    stated = _json(config) if config.exists() else {}
    has_case = any(word != word.lower() for word in words if not re.fullmatch(r"\[.*\]", word))
    return {
        "words": words,
        "lowercase": bool(stated.get("do_lower_case", not has_case)),
        "strip_accents": stated.get("strip_accents"),
    }


def _read_json(path: Path) -> dict[str, Any]:
    content = _json(path)
    model, normalizer = _section(content, "model"), _section(content, "normalizer")
    splitter = _section(content, "pre_tokenizer")
    for section, found, wanted in (
        ("model", model, _MODEL),
        ("normalizer", normalizer, _NORMALIZER),
        ("pre_tokenizer", splitter, {"type": "BertPreTokenizer"}),
    ):
        for field, value in wanted.items():
            if found.get(field) != value:
                raise UserError(
                    f"{path}: {section}.{field} is {found.get(field)!r}, a BERT has {value!r}; "
                    "take the tokenizer of a BERT"
                )
    vocabulary = _section(model, "vocab")
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    if [vocabulary[word] for word in words] != list(range(len(words))):
        raise UserError(f"{path}: the ids of model.vocab are not 0, 1, 2, ...; fetch it again")
    return {
        "words": words,
        "lowercase": bool(normalizer.get("lowercase")),
        "strip_accents": normalizer.get("strip_accents"),
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what transformers writes; fetch it again")
    return content


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); fetch it again") from None

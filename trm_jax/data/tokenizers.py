"""Text to fixed-length token ids: CLIP's byte-pair vocabulary, and plain words.

BERT's word pieces are in wordpiece.py.

Both give rows [SOS] tokens [EOS] 0 0 ..., truncated so that EOS is always there.
"""

import collections
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np

from trm_jax.data.token_rows import Tokenizer, token_rows
from trm_jax.data.wordpiece import WordpieceTokenizer
from trm_jax.types import UserError

_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")


# OpenAI's markers count at the start of a word only: a run of punctuation swallows them.
_MARKERS = re.compile(r"(?<![^\s\w]|_)((?:<\|startoftext\|>|<\|endoftext\|>)+)")


def clean(text: str) -> str:
    """What OpenAI's CLIP does to a text before it splits words: repair, HTML entities, lower case.

    ftfy is the repair: curly quotes, ligatures, full-width letters, control characters, accents
    (NFC), and text that was decoded in a wrong encoding.
    """
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip().lower()


class ClipTokenizer:
    """OpenAI CLIP's lower-cased byte-pair encoding, 49,408 ids (offline, no download).

    Ids equal those of OpenAI's tokenizer for every character that Unicode 14 assigns, between
    letters, at the start and behind an apostrophe, but for U+017F, U+0345 and U+FB05 (old forms of
    s, and a combining iota), whose case is folded there. transformers' tokenizer differs: it
    neither repairs nor unescapes, and a Greek capital sigma at the end of a word has another lower
    case.
    """

    vocab_size = 49408
    sos_id = 49406
    eos_id = 49407

    def __init__(self):
        self._backend = None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, cleaned as by `clean`, without SOS and EOS.

        As in OpenAI's tokenizer, "<|startoftext|>" and "<|endoftext|>" in a text are ids of their
        own, and the text ends for the tower at the latter.
        """
        if self._backend is None:
            from instant_clip_tokenizer import Tokenizer as Backend  # pyright: ignore (native)

            self._backend = Backend()
        text = clean(text)
        if "<" not in text:
            return list(self._backend.encode(text))
        ids = []
        for number, part in enumerate(_MARKERS.split(text)):
            if number % 2:
                markers = part.removesuffix("|>").split("|>")
                ids += [self.sos_id if "start" in marker else self.eos_id for marker in markers]
            else:
                # The backend has two markers of other names; a space splits them and no word.
                part = part.replace("<start_of", "< start_of").replace("<end_of", "< end_of")
                ids += self._backend.encode(part)
        return ids

    def __call__(self, texts: Sequence[str], length: int = 77) -> np.ndarray:
        """int32 [n, length]; see `Tokenizer`."""
        return token_rows(self, texts, length)

    def to_config(self) -> dict[str, Any]:
        """{"kind": "clip"}."""
        return {"kind": "clip"}

    def __getstate__(self) -> dict[str, Any]:
        # The backend is a native object: each worker process makes its own.
        return {"_backend": None}


class WordTokenizer:
    """Lower-cased words and punctuation marks; 0 pad, 1 unknown, 2 SOS, 3 EOS, then `words`."""

    sos_id = 2
    eos_id = 3
    unknown_id = 1

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self._ids = {word: number for number, word in enumerate(self.words, start=4)}
        if len(self._ids) != len(self.words):
            raise UserError("the word list of the tokenizer has duplicates")
        self.vocab_size = len(self.words) + 4

    @classmethod
    def from_captions(cls, captions: Iterable[str], min_count: int = 1) -> "WordTokenizer":
        """Words seen at least `min_count` times, the most frequent first, ties by the alphabet."""
        counts = collections.Counter(word for text in captions for word in split_words(text))
        kept = [word for word, count in counts.items() if count >= min_count]
        return cls(sorted(kept, key=lambda word: (-counts[word], word)))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without SOS and EOS.

        Words outside the list become 1; punctuation outside it is dropped, so that the full stop
        of a prompt does no harm to a tower that never saw one.
        """
        words = [word for word in split_words(text) if self._kept(word)]
        return [self._ids.get(word, self.unknown_id) for word in words]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) in characters of each id that `encode` gives."""
        known = [place for place in word_spans(text) if self._kept(place[0])]
        return [(start, end) for _, start, end in known]

    def _kept(self, word: str) -> bool:
        return word in self._ids or word[0].isalnum()

    def __call__(self, texts: Sequence[str], length: int) -> np.ndarray:
        """int32 [n, length]; see `Tokenizer`."""
        return token_rows(self, texts, length)

    def to_config(self) -> dict[str, Any]:
        """{"kind": "words", "words": [...]}."""
        return {"kind": "words", "words": list(self.words)}


def names_with_unknown_words(tokenizer: Tokenizer, names: Sequence[str]) -> list[str]:
    """The `names` with a word that is not in the tokenizer's list, in their order.

    All such words are one token, so these classes may share one text. CLIP's byte pairs know every
    word: the list is then empty.
    """
    unknown = getattr(tokenizer, "unknown_id", None)
    return [name for name in names if unknown in tokenizer.encode(name.replace("_", " "))]


def scan_words(path: str | Path) -> tuple[str, ...]:
    """The words of a vocabulary file of SCAN (JSON with word2idx), in its order, without markers.

    Raises UserError for a file that is missing or no such vocabulary.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))["word2idx"]
        ordered = sorted(given, key=given.__getitem__)
    except OSError as error:
        field = "model.matching.text.vocabulary"
        raise UserError(f"{path}: {error.strerror}; check {field}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no vocabulary of SCAN: JSON with 'word2idx'") from None
    return tuple(word for word in ordered if word not in ("<pad>", "<start>", "<end>", "<unk>"))


def split_words(text: str) -> list[str]:
    """Lower-cased words (an apostrophe stays inside its word) and single punctuation marks."""
    return _WORD.findall(text.lower())


def word_spans(text: str) -> list[tuple[str, int, int]]:
    """(word, start, end) of each of `split_words`, in characters of `text`."""
    lowered = text.lower()
    places = range(len(text))
    if len(lowered) != len(text):  # the lower case of some letters is two characters
        places = [place for place, letter in enumerate(text) for _ in letter.lower()]
    return [
        (found.group(), places[found.start()], places[found.end() - 1] + 1)
        for found in _WORD.finditer(lowered)
    ]


def from_config(config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_config` described; UserError for an unknown kind."""
    kind = config.get("kind")
    if kind == "clip":
        return ClipTokenizer()
    if kind == "words":
        return WordTokenizer(config["words"])
    if kind == "wordpiece":
        return WordpieceTokenizer(config["words"], config["lowercase"], config["strip_accents"])
    raise UserError(f"tokenizer kind '{kind}' is unknown; it is one of clip, words, wordpiece")

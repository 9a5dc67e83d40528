"""OpenAI's CLIP tokenizer from its definition, in plain Python, and transformers' from its files.

Radford et al. 2021 published the vocabulary as a list of merges (bpe_simple_vocab_16e6.txt.gz):
ids 0 .. 255 are bytes, 256 .. 511 bytes that end a word, then come 48,894 merges in their order
and the two markers.
"""

import gzip
import html
import json

import regex

MARKERS = ("<|startoftext|>", "<|endoftext|>")
_NUM_MERGES = 49408 - 2 * 256 - len(MARKERS)
_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def byte_names():
    """The printable character that stands for each byte, in the order of the ids."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + number) for number, byte in enumerate(hidden)
    }


def read_vocabulary(path):
    """(token -> id, merges as pairs) of the published file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 1 + _NUM_MERGES]
    merges = [tuple(line.split()) for line in lines]
    units = list(byte_names().values())
    tokens = [*units, *(unit + "</w>" for unit in units), *map("".join, merges), *MARKERS]
    return {token: number for number, token in enumerate(tokens)}, merges


def transformers_tokenizer(path, folder):
    """transformers' CLIPTokenizer from vocab.json and merges.txt, which are written to `folder`."""
    import transformers

    ids, merges = read_vocabulary(path)
    (folder / "vocab.json").write_text(json.dumps(ids))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


class OpenAITokenizer:
    """Splits, then applies the lowest merge until none applies.

    repair: what OpenAI does first, ftfy.fix_text. Without it the oracle is right for texts that
    ftfy leaves alone.
    """

    def __init__(self, path, repair=lambda text: text):
        self._ids, merges = read_vocabulary(path)
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._names, self._repair, self._known = byte_names(), repair, {}

    def encode(self, text):
        """Token ids without the markers around."""
        text = html.unescape(html.unescape(self._repair(text))).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        return [number for word in _WORDS.findall(text) for number in self._word(word)]

    def _word(self, word):
        if word in MARKERS:
            return [self._ids[word]]
        if word not in self._known:
            units = [self._names[byte] for byte in word.encode()]
            units[-1] += "</w>"
            self._known[word] = [self._ids[unit] for unit in self._merged(units)]
        return self._known[word]

    def _merged(self, units):
        while len(units) > 1:
            pairs = zip(units, units[1:], strict=False)
            first, second = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if (first, second) not in self._ranks:
                break
            merged = []
            for unit in units:
                if merged and merged[-1] == first and unit == second:
                    # A unit that was just merged is longer than `first` and cannot match again.
                    merged[-1] = first + second
                else:
                    merged.append(unit)
            units = merged
        return units

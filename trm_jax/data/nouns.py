"""The nouns of captions, and prompts of them.

`noun_spans` finds the nouns that NAPReg (Khanna et al., WACV 2023) makes proxies of, with their
places. `NounPrompts` are the extra texts of GroupViT's multi-label loss. Source: Xu et al.,
"GroupViT: Semantic segmentation emerges from text supervision", Sec. 3.3: of each caption some
nouns are drawn, and each is set into a prompt that is drawn from CLIP's. A source that knows the
nouns of its captions says so with `noun_words()`; for all others NLTK's tagger finds them.
"""

import functools
import threading
from collections.abc import Collection
from pathlib import Path

import numpy as np

from trm_jax.data.sources.base import Source
from trm_jax.data.tagger import open_tagger
from trm_jax.data.tokenizers import Tokenizer, names_with_unknown_words, split_words
from trm_jax.types import UserError

# Some of CLIP's prompts for ImageNet: those that say nothing of the thing itself, so that they do
# not contradict the caption as "a photo of many {}" or "a plastic {}" may.
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a photo of my {}.",
    "a good photo of a {}.",
    "a good photo of the {}.",
    "a bad photo of a {}.",
    "a bad photo of the {}.",
    "a close-up photo of a {}.",
    "a cropped photo of the {}.",
    "itap of a {}.",
    "itap of the {}.",
)

LEMMATISE = ("plurals", "off")

_TAGS = {"NN": False, "NNP": False, "NNS": True, "NNPS": True}  # whether a noun is a plural
_LOADING = threading.Lock()


def noun_spans(
    caption: str, *, tagger: str | Path = "", lemmatise: str = "plurals"
) -> tuple[tuple[int, int, str], ...]:
    """(start, end, noun) of each noun of an English caption, in their order.

    A noun is a token that the averaged perceptron tags NN, NNS, NNP or NNPS in the caption as it
    is written; one that starts with no letter or has one letter alone is left out.
    caption[start:end] is the token. The noun is the token in lower case, in the singular where
    `lemmatise` says so.

    Args:
      caption: the text. tagger: see `open_tagger`.
      lemmatise: "plurals" makes what is tagged NNS or NNPS singular; "off" leaves all as it is.

    Raises:
      UserError: the tagger's data is not there or cannot be used, or `lemmatise` is unknown.
    """
    if lemmatise not in LEMMATISE:
        raise UserError(f"nouns.lemmatise is '{lemmatise}'; it is one of {', '.join(LEMMATISE)}")
    found = []
    for start, end, tag in open_tagger(tagger)(caption):
        if tag in _TAGS and end - start > 1 and caption[start].isalpha():
            noun = caption[start:end].lower()
            plural = lemmatise == "plurals" and _TAGS[tag]
            found.append((start, end, singular(noun) if plural else noun))
    return tuple(found)


@functools.lru_cache(maxsize=2**14)
def singular(plural: str) -> str:
    """The singular of a plural noun in lower case; a word that is none stays as it is."""
    with _LOADING:
        engine = _inflections()
    return str(engine.singular_noun(plural) or plural)


@functools.lru_cache(maxsize=1)
def _inflections():
    import inflect  # late: a second

    engine = inflect.engine()
    engine.defnoun("clothes", "clothes")  # it knows no "clothes" without a "clothe"
    return engine


@functools.lru_cache(maxsize=2**16)
def nouns(caption: str) -> tuple[str, ...]:
    """The nouns of an English caption as `noun_spans` finds them, plurals as they are.

    Each once, in the order of the caption. Results are kept: the same captions return every epoch.

    Raises:
      UserError: the tagger's data is not on this machine, or cannot be used.
    """
    return tuple(dict.fromkeys(noun for _, _, noun in noun_spans(caption, lemmatise="off")))


def known_nouns(caption: str, known: Collection[str]) -> tuple[str, ...]:
    """The words of `caption` that are in `known`, lower-cased, each once, in their order."""
    return tuple(dict.fromkeys(word for word in split_words(caption) if word in known))


class NounPrompts:
    """Draws `count` texts for a caption, prompts of its nouns; picklable.

    Fewer nouns than texts are drawn with replacement, more without. A caption without a noun stands
    for all its texts itself. (The authors' program differs: it takes verbs for nouns too, and fills
    missing nouns up with the caption.)

    Args:
      count: m texts per caption, from 1.
      source: of the captions. If it, or the source that it is a part of, has the method
        `noun_words()` (lower-case words), the nouns of a caption are its words among those.
      tokenizer: of the texts. Only templates that it knows all words of are used; if there is none,
        the first of TEMPLATES.

    Raises:
      UserError: count is below 1, or the tagger is needed and its data is not on this machine.
    """

    def __init__(self, count: int, source: Source, tokenizer: Tokenizer):
        if count < 1:
            raise UserError(f"{count} nouns of a caption cannot be drawn; take 1 or more")
        self.count = count
        self.known = noun_words_of(source)
        strange = names_with_unknown_words(tokenizer, TEMPLATES)
        self.templates = tuple(t for t in TEMPLATES if t not in strange) or TEMPLATES[:1]
        if self.known is None:
            open_tagger()  # what is missing is said before the training starts

    def __call__(self, caption: str, rng: np.random.Generator) -> list[str]:
        """`count` texts; all randomness comes from `rng`. Raises UserError as `nouns` does."""
        found = nouns(caption) if self.known is None else known_nouns(caption, self.known)
        if not found:
            return [caption] * self.count
        chosen = rng.choice(len(found), self.count, replace=len(found) < self.count)
        templates = rng.integers(len(self.templates), size=self.count)
        return [
            self.templates[template].format(found[noun])
            for noun, template in zip(chosen, templates, strict=True)
        ]


def noun_words_of(source: Source | None) -> frozenset[str] | None:
    """`source.noun_words()`, or that of the source that it is a part or a shuffle of."""
    while source is not None:
        words = getattr(source, "noun_words", None)
        if words is not None:
            return frozenset(words())
        source = getattr(source, "source", None)
    return None

"""The nouns of a caption, set into prompts: the extra texts of GroupViT's multi-label loss.

Source: Xu et al., "GroupViT: Semantic segmentation emerges from text supervision", Sec. 3.3: of
each caption some nouns are drawn, and each is set into a prompt that is drawn from CLIP's. A source
that knows the nouns of its captions says so with `noun_words()`; for all others NLTK's tagger finds
them.
"""

import functools
import re
import threading
from collections.abc import Collection

import numpy as np

from trm_jax.data.sources.base import Source
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

_DATA = "averaged_perceptron_tagger_eng"
_TAGS = frozenset({"NN", "NNS", "NNP", "NNPS"})
_FULL_STOP = re.compile(r"(?<=\w\w)\.(?=\s)")
_LOADING = threading.Lock()


@functools.lru_cache(maxsize=2**16)
def nouns(caption: str) -> tuple[str, ...]:
    """The nouns that NLTK's averaged perceptron tags NN, NNS, NNP or NNPS in an English caption.

    Lower-cased, each once, in the order of the caption. Tokens that start with no letter or have
    one letter alone are left out. Results are kept: the same captions return every epoch.

    Raises:
      UserError: the tagger's data is not on this machine, or cannot be used.
    """
    tokenizer, tagger = _backend()
    # The tokenizer takes one sentence, and finds its full stop at the end alone.
    tagged = tagger.tag(tokenizer.tokenize(_FULL_STOP.sub(" .", caption)))
    found = (word.lower() for word, tag in tagged if tag in _TAGS)
    return tuple(dict.fromkeys(word for word in found if len(word) > 1 and word[0].isalpha()))


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
        self.known = _noun_words(source)
        strange = names_with_unknown_words(tokenizer, TEMPLATES)
        self.templates = tuple(t for t in TEMPLATES if t not in strange) or TEMPLATES[:1]
        if self.known is None:
            _backend()  # what is missing is said before the training starts

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


def _noun_words(source: Source | None) -> frozenset[str] | None:
    """`source.noun_words()`, or that of the source that it is a part or a shuffle of."""
    while source is not None:
        words = getattr(source, "noun_words", None)
        if words is not None:
            return frozenset(words())
        source = getattr(source, "source", None)
    return None


def _backend():
    """(tokenizer, tagger), read once per process."""
    with _LOADING:  # the pipeline reads in threads
        return _read_backend()


@functools.lru_cache(maxsize=1)
def _read_backend():
    # Late: NLTK takes a second to import, and most runs need no nouns.
    from nltk.tag.perceptron import PerceptronTagger
    from nltk.tokenize import NLTKWordTokenizer

    remedy = f"run python -m nltk.downloader {_DATA}, or set NLTK_DATA to the folder that has it"
    try:
        return NLTKWordTokenizer(), PerceptronTagger()
    except LookupError:
        raise UserError(
            f"loss.multi_label_weight needs NLTK's {_DATA}, which is not on this machine: {remedy}"
        ) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"NLTK's {_DATA} cannot be read ({reason}): {remedy}") from None

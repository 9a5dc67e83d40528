"""Examples of methods that score pairs: every caption with its image, in a few text lengths.

An epoch visits every caption once (SCAN, VSE++), where data/examples.py draws one for each image.
Texts are padded to the longest of `buckets`; a batch is cut to the shortest bucket that holds its
longest text, so that few shapes are compiled and little padding is computed.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from trm_jax.data.examples import ImageExamples, Sample
from trm_jax.data.sources.base import Source
from trm_jax.data.tokenizers import Tokenizer
from trm_jax.types import UserError


@runtime_checkable
class Nouns(Protocol):
    """The proxies that captions name; `number` is the caption's, in the order of the source."""

    def ids(self, number: int, length: int) -> np.ndarray:
        """int32 [length]: the proxy of the noun that begins at a token, -1 for none."""
        ...

    def of_caption(self, number: int) -> np.ndarray:
        """int32 [k] proxies of the nouns of a caption, each once."""
        ...


def caption_owners(source: Source) -> np.ndarray:
    """int32 [captions]: the image of each caption, in the order of the source."""
    counts = [len(source.captions(index)) for index in range(len(source))]
    return np.repeat(np.arange(len(source), dtype=np.int32), counts)


class CaptionTexts:
    """All captions of a source as tokens [length], for the text side of pair scores.

    Sorted by length, so that a batch of neighbours is cut to a short bucket; `index` is the
    caption's number in the order of the source.

    Args:
      source: its images may have any number of captions.
      buckets: ascending lengths T, <start> and <end> included; longer texts lose their end.

    Raises:
      UserError: no caption, or `buckets` are no ascending lengths of 3 or more.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, buckets: Sequence[int]):
        self.buckets = tuple(int(size) for size in buckets)
        if not self.buckets or list(self.buckets) != sorted({*self.buckets}) or buckets[0] < 3:
            raise UserError(f"data.length_buckets={buckets} must be ascending lengths of 3 or more")
        self.image_index = caption_owners(source)
        if not len(self.image_index):
            raise UserError("this dataset has no captions; choose another data.dataset or method")
        self.texts = tuple(text for i in range(len(source)) for text in source.captions(i))
        self.tokens = tokenizer(self.texts, self.buckets[-1])
        self.lengths = np.maximum((self.tokens != 0).sum(1), 1).astype(np.int32)
        self.order = np.argsort(self.lengths, kind="stable")

    def __len__(self) -> int:
        return len(self.texts)

    def sample(self, position: int, rng: np.random.Generator) -> Sample:
        """Tokens of the caption at `position` by length; `rng` is not used."""
        del rng
        number = self.order[position]
        return self._mark(self.tokens[number], number, self.image_index[number], valid=True)

    def blank(self, position: int) -> Sample:
        """Zeros, image_index -1, valid=False."""
        return self._mark(np.zeros_like(self.tokens[0]), position, -1, valid=False)

    def crop(self, batch: Sample, positions: Sequence[int]) -> Sample:
        """The tokens cut to the bucket of the batch's longest text."""
        return {**batch, "tokens": batch["tokens"][:, : self.bucket(self.order[list(positions)])]}

    def bucket(self, numbers: np.ndarray) -> int:
        """The shortest bucket that holds these captions."""
        longest = int(self.lengths[numbers].max(initial=1))
        return next(size for size in self.buckets if size >= longest)

    def _mark(self, tokens, index, image_index, *, valid: bool) -> Sample:
        return {
            "tokens": np.asarray(tokens),
            "index": np.asarray(index, np.int32),
            "image_index": np.asarray(image_index, np.int32),
            "valid": np.asarray(valid, np.bool_),
        }


class CaptionPairs:
    """Every caption with its image, for training.

    Keys of a sample: those of ImageExamples, where `index` is the image's position in the source,
    so that pairs of one image can be told; tokens int32 [T]; with `nouns` also noun_ids int32 [T],
    the proxy of the noun that begins at a token or -1, and nouns int32 [P], the proxies that the
    pair should be near to, filled up with -1.

    Args:
      source: of images (or features) and captions.
      tokenizer, buckets: see CaptionTexts.
      transform: of images.
      nouns: None for none.
      all_captions: `nouns` are those of all captions of the image, not of this caption alone.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        buckets: Sequence[int],
        transform=None,
        *,
        nouns: Nouns | None = None,
        all_captions: bool = False,
    ):
        self._texts = CaptionTexts(source, tokenizer, buckets)
        self._images = ImageExamples(source, transform)
        self._ids = self._positives = None
        if nouns is not None:
            self._ids = np.stack([nouns.ids(k, self._texts.buckets[-1]) for k in range(len(self))])
            self._positives = self._gather(nouns, all_captions)

    def __len__(self) -> int:
        return len(self._texts)

    def sample(self, position: int, rng: np.random.Generator) -> Sample:
        """One caption, its image and its nouns."""
        image = int(self._texts.image_index[position])
        return {**self._images.sample(image, rng), **self._text(position)}

    def blank(self, position: int) -> Sample:
        """Zeros, no nouns, valid=False."""
        image = int(self._texts.image_index[position]) if position >= 0 else -1
        text = {name: np.full_like(row, -1) for name, row in self._text(0).items()}
        return {
            **self._images.blank(image),
            **text,
            "tokens": np.zeros_like(text["tokens"]),
        }

    def crop(self, batch: Sample, positions: Sequence[int]) -> Sample:
        """What has one entry per token cut to the bucket of the batch's longest text."""
        size = self._texts.bucket(np.asarray(positions))
        cut = {name: batch[name][:, :size] for name in ("tokens", "noun_ids") if name in batch}
        return {**batch, **cut}

    def _text(self, position: int) -> Sample:
        sample = {"tokens": self._texts.tokens[position]}
        if self._ids is not None and self._positives is not None:
            sample |= {"noun_ids": self._ids[position], "nouns": self._positives[position]}
        return sample

    def _gather(self, nouns: Nouns, all_captions: bool) -> np.ndarray:
        """int32 [captions, P], -1 where a row has fewer."""
        own = [nouns.of_caption(number) for number in range(len(self))]
        if all_captions:
            owner = self._texts.image_index
            groups = np.split(np.arange(len(own)), np.flatnonzero(np.diff(owner)) + 1)
            for group in groups:
                union = np.unique(np.concatenate([own[k] for k in group]))
                for k in group:
                    own[k] = union
        rows = np.full((len(own), max(1, max(map(len, own)))), -1, np.int32)
        for row, found in zip(rows, own, strict=True):
            row[: len(found)] = found
        return rows

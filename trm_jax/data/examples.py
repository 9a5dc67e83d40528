"""Examples: a source seen as fixed-shape samples, ready to be stacked into batches.

Each class here has `__len__`, `sample(position, rng)` and `blank(position)`. A sample is a dict of
numpy arrays with the batch keys of the package, always with "index" (int32, the position in the
source) and "valid" (bool). A blank is zeros of the same shapes with valid=False: it stands for a
sample that could not be read, and pads the last batch of an evaluation (then with index -1).
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from trm_jax.data.nouns import NounPrompts
from trm_jax.data.sources.base import Source
from trm_jax.data.sources.lazy import captioned
from trm_jax.data.tokenizers import Tokenizer
from trm_jax.types import BadSampleError, UserError

Sample = dict[str, np.ndarray]
Transform = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_ARRAY_INPUTS = ("features", "dense", "global_embedding")


@runtime_checkable
class Examples(Protocol):
    """What the pipeline asks of a set of examples."""

    def __len__(self) -> int: ...

    def sample(self, position: int, rng: np.random.Generator) -> Sample:
        """One sample; all its randomness comes from `rng`. Raises BadSampleError."""
        ...

    def blank(self, position: int) -> Sample:
        """Zeros in the shapes of a sample, valid=False; `position` -1 is padding."""
        ...


class _Inputs:
    """Reads, transforms and casts the inputs of a source."""

    def __init__(self, source: Source, transform: Transform | None, views: int = 1):
        if views not in (1, 2):
            raise UserError(f"data views is {views}; it is 1 or 2")
        self.source = source
        self.transform = transform
        self.views = views
        self._zeros: Sample | None = None

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        raw = self.source.read(index)
        sample = {name: entered(raw[name]) for name in _ARRAY_INPUTS if name in raw}
        if "image" in raw:
            sample["image"] = self._view(raw["image"], rng)
            if self.views == 2:
                sample["image_2"] = self._view(raw["image"], rng)
        return sample

    def zeros(self) -> Sample:
        """Zeros in the shapes of the first example that can be read."""
        if self._zeros is None:
            self._zeros = self._find_zeros()
        return {name: array.copy() for name, array in self._zeros.items()}

    def _find_zeros(self) -> Sample:
        for index in range(len(self.source)):
            try:
                sample = self.read(index, np.random.default_rng(0))
            except BadSampleError:
                continue
            return {name: np.zeros_like(array) for name, array in sample.items()}
        raise UserError("not one example of the data can be read; check data.root")

    def _view(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return image if self.transform is None else self.transform(image, rng)


def entered(array: np.ndarray) -> np.ndarray:
    """Features as they enter the device: bfloat16 as it is, others in single precision."""
    return np.asarray(array, array.dtype if array.dtype == ml_dtypes.bfloat16 else np.float32)


def _mark(sample: Sample, index: int, *, valid: bool) -> Sample:
    sample["index"] = np.asarray(index, np.int32)
    sample["valid"] = np.asarray(valid, np.bool_)
    return sample


class MultiLabelExamples:
    """Inputs with the labels that training may see and, apart from them, the hidden truth.

    source:   N examples of C classes.
    observed: int8 [N, C] in {-1, 0, +1}, 0 unknown (see partial_labels.observe); None: all labels.
    transform: image transform; None keeps images as they are (then all of one size).
    views:    2 adds a second independent draw of the transform as "image_2".
    Keys of a sample: image | features | dense (+ global_embedding); labels, truth int8 [C].
    """

    def __init__(
        self,
        source: Source,
        observed: np.ndarray | None = None,
        transform: Transform | None = None,
        *,
        views: int = 1,
    ):
        truth = np.asarray(source.labels)
        observed = truth if observed is None else np.asarray(observed)
        if truth.shape[1:] == (0,):
            raise UserError("this dataset has no labels; choose another data.dataset or method")
        if observed.shape != truth.shape:
            raise UserError(
                f"observed labels are {list(observed.shape)}, the dataset's {list(truth.shape)}"
            )
        self.source = source
        self.truth = truth.astype(np.int8, copy=False)
        self.observed = observed.astype(np.int8, copy=False)
        self._inputs = _Inputs(source, transform, views)

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, position: int, rng: np.random.Generator) -> Sample:
        """Inputs, labels and truth of one example."""
        sample = self._inputs.read(position, rng)
        sample["labels"] = self.observed[position]
        sample["truth"] = self.truth[position]
        return _mark(sample, position, valid=True)

    def blank(self, position: int) -> Sample:
        """Zeros (labels 0 are "unknown"), valid=False."""
        sample = self._inputs.zeros()
        sample["labels"] = np.zeros_like(self.observed[0])
        sample["truth"] = np.zeros_like(self.truth[0])
        return _mark(sample, position, valid=False)


class CaptionExamples:
    """Image and caption pairs for training: each visit of an image draws one of its captions.

    Images without a caption are left out; "index" is the position in the source all the same.
    Where that is seen only when the caption is read (see sources/lazy.py), they are bad samples.
    Keys of a sample: the inputs as in MultiLabelExamples; tokens int32 [length]; with `nouns` m > 0
    also noun_tokens int32 [m, length], prompts of the caption's nouns (see data/nouns.py).
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        length: int,
        transform: Transform | None = None,
        *,
        views: int = 1,
        nouns: int = 0,
    ):
        self.source = source
        self.tokenizer = tokenizer
        self.length = length
        self.indices = captioned(source)
        if not len(self.indices):
            raise UserError("this dataset has no captions; choose another data.dataset or method")
        self._inputs = _Inputs(source, transform, views)
        self._nouns = NounPrompts(nouns, source, tokenizer) if nouns else None

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, position: int, rng: np.random.Generator) -> Sample:
        """Inputs, one caption and the prompts of its nouns, drawn by `rng`."""
        index = int(self.indices[position])
        captions = self.source.captions(index)
        if not captions:
            raise BadSampleError(f"{self.source.ids[index]}: the caption is empty")
        # Drawn before the transform: the caption does not depend on how many numbers that draws.
        caption = captions[int(rng.integers(len(captions)))]
        sample = self._inputs.read(index, rng)
        sample["tokens"] = self.tokenizer([caption], self.length)[0]
        if self._nouns is not None:
            # Drawn last: all else is the same with and without nouns.
            sample["noun_tokens"] = self.tokenizer(self._nouns(caption, rng), self.length)
        return _mark(sample, index, valid=True)

    def blank(self, position: int) -> Sample:
        """Zeros, valid=False."""
        sample = self._inputs.zeros()
        sample["tokens"] = np.zeros(self.length, np.int32)
        if self._nouns is not None:
            sample["noun_tokens"] = np.zeros((self._nouns.count, self.length), np.int32)
        return _mark(sample, int(self.indices[position]) if position >= 0 else -1, valid=False)


class ImageExamples:
    """Inputs alone, for the image side of retrieval or for prediction.

    indices: positions in the source to take, default all. Keys: the inputs as above.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
    ):
        self.indices = np.arange(len(source)) if indices is None else np.asarray(indices)
        self._inputs = _Inputs(source, transform)

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, position: int, rng: np.random.Generator) -> Sample:
        """Inputs of one example."""
        index = int(self.indices[position])
        return _mark(self._inputs.read(index, rng), index, valid=True)

    def blank(self, position: int) -> Sample:
        """Zeros, valid=False."""
        index = int(self.indices[position]) if position >= 0 else -1
        return _mark(self._inputs.zeros(), index, valid=False)


class CaptionTexts:
    """All captions of all images, in source order, for the text side of retrieval.

    Keys: tokens int32 [length]; image_index int32, the caption's image as position in the source
    (the "index" of ImageExamples); index int32, the position of the caption here.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, length: int):
        pairs = [(i, text) for i in range(len(source)) for text in source.captions(i)]
        if not pairs:
            raise UserError("this dataset has no captions; choose another data.dataset or method")
        self.image_index = np.asarray([i for i, _ in pairs], np.int32)
        self.texts = tuple(text for _, text in pairs)
        self.tokenizer = tokenizer
        self.length = length

    def __len__(self) -> int:
        return len(self.texts)

    def sample(self, position: int, rng: np.random.Generator) -> Sample:
        """Tokens of one caption; `rng` is not used."""
        del rng
        tokens = self.tokenizer([self.texts[position]], self.length)[0]
        sample = {"tokens": tokens, "image_index": self.image_index[position]}
        return _mark(sample, position, valid=True)

    def blank(self, position: int) -> Sample:
        """Zeros, image_index -1, valid=False."""
        sample = {
            "tokens": np.zeros(self.length, np.int32),
            "image_index": np.asarray(-1, np.int32),
        }
        return _mark(sample, position, valid=False)

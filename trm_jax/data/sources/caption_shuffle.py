"""Wrong captions on purpose: a share of the images exchange theirs."""

from collections.abc import Sequence

import numpy as np

from trm_jax.data.sources.base import Source
from trm_jax.data.sources.lazy import captioned
from trm_jax.types import UserError


class ShuffledCaptions:
    """`source` with the captions of a share of its images exchanged among them; a Source.

    Of the n images with captions, round(fraction * n) are drawn. They stand in a circle in the
    order of the draw and each takes all captions of the next: none keeps its own. Images, ids and
    the other captions are those of `source`.

    fraction: in [0, 1]; of round(fraction * n) = 1 there is nobody to exchange with.
    seed: of the draw.
    Raises UserError for a fraction outside [0, 1] or one that draws a single image.
    """

    def __init__(self, source: Source, fraction: float, seed: int):
        if not 0.0 <= fraction <= 1.0:
            raise UserError(f"data.caption_shuffle={fraction} must be in [0, 1]")
        self.source = source
        self.ids: Sequence[str] = source.ids
        self.class_names = source.class_names
        self.captioned = captioned(source)
        count = round(fraction * len(self.captioned))
        if count == 1:
            raise UserError(
                f"data.caption_shuffle={fraction} is one of {len(self.captioned)} images, which "
                "has nobody to exchange captions with; take 0 or a larger share"
            )
        if hasattr(source, "first_visit"):
            raise UserError("data.caption_shuffle is not for a mixture: shuffle its parts instead")
        for name in ("file_rows", "num_file_rows", "vocabulary"):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        order = np.random.default_rng(seed % 2**64).permutation(len(self.captioned))[:count]
        chosen = np.asarray(self.captioned)[order]
        # The captions of an image are those of the image at this position.
        self._taken_from = np.arange(len(source), dtype=np.int32)
        self._taken_from[chosen] = np.roll(chosen, -1)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> np.ndarray:
        """Those of the source, which may make them late."""
        return self.source.labels

    def is_noisy(self, index: int) -> bool:
        """Whether the captions of this image are those of another."""
        return int(self._taken_from[index]) != index

    def read(self, index: int):
        """The inputs of one example."""
        return self.source.read(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions that one example has now."""
        return self.source.captions(int(self._taken_from[index]))

    def fingerprint(self) -> str:
        """That of the source; its ids where it has none."""
        whole = getattr(self.source, "fingerprint", None)
        return whole() if whole else "\n".join(self.ids)

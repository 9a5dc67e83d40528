"""What a tokenizer is, and the rows of ids that all of them make."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from trm_jax.types import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """What the package asks of a tokenizer."""

    vocab_size: int
    sos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without SOS and EOS."""
        ...

    def __call__(self, texts: Sequence[str], length: int) -> np.ndarray:
        """int32 [n, length]: SOS, tokens, EOS, then zeros; too long texts lose their end."""
        ...

    def to_config(self) -> dict[str, Any]:
        """A JSON-able dict from which `from_config` makes an equal tokenizer."""
        ...


def token_rows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    """What calling a tokenizer gives, see `Tokenizer`; UserError for a length below 2."""
    if length < 2:
        raise UserError(f"text length {length} leaves no room for SOS and EOS; give 2 or more")
    rows = np.zeros((len(texts), length), np.int32)
    for row, text in zip(rows, texts, strict=True):
        ids = [tokenizer.sos_id, *tokenizer.encode(text)[: length - 2], tokenizer.eos_id]
        row[: len(ids)] = ids
    return rows

"""The nouns that NAPReg makes proxies of: those of all captions, and where each caption has them.

Source: Khanna et al., "NAPReg: Nouns As Proxies Regularization for Semantically Aware Cross-Modal
Embeddings", WACV 2023, Sec. 3: one proxy for each noun that training captions have K times.

Tagging takes a second for some thousand captions, so it is done once (`annotate`) and kept in one
file, made anew when the captions, the tagger or the settings change:

    words    uint8 [.]      all nouns, utf-8, one a line
    numbers  int32 [m]      the noun (a line of `words`) of each place, caption after caption
    places   int32 [m, 2]   start and end in the caption, in characters
    ends     int64 [n]      where in `places` each caption's nouns end
    facts    JSON           version, SHA-256 of captions and tagger, how plurals are treated
"""

import array
import collections
import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tqdm import tqdm

from trm_jax.data.nouns import noun_spans
from trm_jax.data.tagger import open_tagger
from trm_jax.data.tokenizers import word_spans
from trm_jax.types import UserError

_VERSION = 1


class CaptionNouns:
    """The nouns of n captions, in compact arrays; `CaptionNouns[i]` are those of caption i.

    Args: as the head of this file has them; `words` are the nouns themselves.
    """

    def __init__(
        self, words: Sequence[str], numbers: np.ndarray, places: np.ndarray, ends: np.ndarray
    ):
        self.words = tuple(words)
        self._numbers = numbers
        self._places = places
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[tuple[int, int, str], ...]:
        """(start, end, noun) of each noun of one caption, see `noun_spans`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        found = zip(self._places[part].tolist(), self._numbers[part].tolist(), strict=True)
        return tuple((start, end, self.words[number]) for (start, end), number in found)

    def counts(self) -> dict[str, int]:
        """Noun -> its occurrences; a caption that names it twice counts twice."""
        counts = np.bincount(self._numbers, minlength=len(self.words))
        return dict(zip(self.words, counts.tolist(), strict=True))


class NounVocabulary:
    """The nouns that have a proxy: `nouns[p]` is that of proxy p.

    Args:
      nouns: in the order of the proxies. counts: occurrences of each in the training captions.

    Attributes:
      index: noun -> proxy.

    Raises:
      UserError: there is no noun, one is there twice, or the counts are not as many.
    """

    def __init__(self, nouns: Sequence[str], counts: Sequence[int]):
        self.nouns = tuple(nouns)
        self.counts = tuple(counts)
        self.index = {noun: number for number, noun in enumerate(self.nouns)}
        if not self.nouns:
            raise UserError("the noun vocabulary is empty")
        if len(self.index) != len(self.nouns) or len(self.counts) != len(self.nouns):
            raise UserError("the noun vocabulary names a noun twice, or has not a count for each")

    @classmethod
    def from_annotations(cls, annotations: CaptionNouns, min_count: int = 2) -> "NounVocabulary":
        """The nouns with at least `min_count` (K >= 1) occurrences, the most frequent first.

        Ties are in the order of the alphabet. Raises UserError if K is below 1 or no noun is left.
        """
        if min_count < 1:
            raise UserError(f"nouns.min_count is {min_count}; nouns occur once or more")
        counts = annotations.counts()
        kept = [noun for noun, count in counts.items() if count >= min_count]
        if not kept:
            most = max(counts.values(), default=0)
            raise UserError(
                f"no noun occurs {min_count} times in the {len(annotations):,} captions (the most "
                f"frequent {most} times); lower nouns.min_count"
            )
        kept.sort(key=lambda noun: (-counts[noun], noun))
        return cls(kept, [counts[noun] for noun in kept])

    def __len__(self) -> int:
        return len(self.nouns)

    def top(self, count: int = 10) -> tuple[tuple[str, int], ...]:
        """(noun, occurrences) of the `count` most frequent."""
        return tuple(zip(self.nouns[:count], self.counts[:count], strict=True))

    def to_config(self) -> dict[str, Any]:
        """{"nouns": [...], "counts": [...]}, for a JSON file."""
        return {"nouns": list(self.nouns), "counts": list(self.counts)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NounVocabulary":
        """What `to_config` described; UserError if it describes no vocabulary."""
        try:
            nouns, counts = config["nouns"], config["counts"]
            if not all(isinstance(noun, str) for noun in nouns):
                raise TypeError
            return cls(nouns, [int(count) for count in counts])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                "the noun vocabulary is damaged; it has lists of 'nouns' and 'counts'"
            ) from None


def noun_ids(
    nouns: Sequence[tuple[int, int, str]],
    tokens: Sequence[tuple[int, int]],
    vocabulary: NounVocabulary,
    length: int,
) -> Int32[np.ndarray, "T"]:
    """The proxy of each token position that is the first piece of a kept noun, elsewhere -1.

    Args:
      nouns: (start, end, noun) of a caption's nouns, in its order.
      tokens: (start, end) in the caption of each token id, without SOS and EOS.
      vocabulary: of the proxies.
      length: T, of a row of tokens; position 0 is SOS, and token T - 2 is the last that fits.

    Returns:
      int32 [T]. Where a token holds the beginnings of two nouns it stands for the first.
    """
    ids = np.full(length, -1, np.int32)
    for start, end, noun in nouns:
        number = vocabulary.index.get(noun)
        if number is None:
            continue
        for position, (first, last) in enumerate(tokens[: max(length - 2, 0)], start=1):
            if last > start:
                if first < end and ids[position] < 0:
                    ids[position] = number
                break
    return ids


def annotate(
    texts: Sequence[str],
    *,
    tagger: str | Path = "",
    lemmatise: str = "plurals",
    cache: Path | None,
    fallback: Path,
) -> CaptionNouns:
    """The nouns of all `texts`, found once and kept.

    Args:
      texts: captions, in their order.
      tagger, lemmatise: see `noun_spans`.
      cache: the file to keep them in, beside the captions; None where those lie in no folder. It is
        not written where the folder's mode lets nobody write, though root could.
      fallback: a folder for the file where `cache` cannot be written; it is made if missing.

    Returns:
      One row of nouns a text. What is kept of other captions, of another tagger or of another
      `lemmatise` is made anew, and a line says so.

    Raises:
      UserError: the tagger's data is not there or cannot be used, or `lemmatise` is unknown.
    """
    noun_spans("", tagger=tagger, lemmatise=lemmatise)  # what is wrong is said at once
    facts = {
        "version": _VERSION,
        "list of captions": _hash(texts),
        "tagger": open_tagger(tagger).sha256,
        "lemmatise": lemmatise,
    }
    # Runs on several data may share the folder; so the file's name says what it is made of.
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    files = [*([] if cache is None else [cache]), fallback / f"nouns_{name}.npz"]
    for file in reversed(files):
        kept = _load(file, facts)
        if kept is not None:
            return kept
    shown = tqdm(texts, desc="finding nouns", unit="caption", disable=None)
    nouns = _compact(noun_spans(text, tagger=tagger, lemmatise=lemmatise) for text in shown)
    _keep(files, nouns, facts)
    return nouns


def of_known_words(texts: Sequence[str], words: Collection[str]) -> CaptionNouns:
    """The nouns of `texts` by a list of them: for sources that know theirs, without a tagger."""
    return _compact(
        [(start, end, word) for word, start, end in word_spans(text) if word in words]
        for text in texts
    )


def _hash(texts: Sequence[str]) -> str:
    """SHA-256 of the texts and of where each ends."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def _compact(rows: Iterable[Sequence[tuple[int, int, str]]]) -> CaptionNouns:
    """The nouns of all captions, put into arrays as they are found."""
    numbers: dict[str, int] = collections.defaultdict(lambda: len(numbers))
    flat, ends = array.array("i"), array.array("q")
    for row in rows:
        for start, end, noun in row:
            flat.extend((numbers[noun], start, end))
        ends.append(len(flat) // 3)
    table = np.asarray(flat, np.int32).reshape(-1, 3)
    return CaptionNouns(
        tuple(numbers), table[:, 0].copy(), table[:, 1:].copy(), np.asarray(ends, np.int64)
    )


def _load(file: Path, facts: Mapping[str, Any]) -> CaptionNouns | None:
    """What is kept, None if it is not there or not of these facts."""
    if not file.is_file():
        return None
    try:
        with file.open("rb") as data, np.load(data) as archive:
            arrays = {name: archive[name] for name in ("words", "numbers", "places", "ends")}
            known = json.loads(str(archive["facts"]))
        changed = [name for name in facts if known.get(name) != facts[name]]
        words = bytes(arrays.pop("words")).decode("utf-8", "surrogatepass")
    except Exception:  # noqa: BLE001 (damaged in whatever way: it is made anew)
        print(f"{file} is damaged; the nouns are found anew")
        return None
    if changed:
        print(f"{file} is of another {' and '.join(changed)}; the nouns are found anew")
        return None
    return CaptionNouns(words.split("\n") if words else (), **arrays)


def _keep(files: Sequence[Path], nouns: CaptionNouns, facts: Mapping[str, Any]) -> None:
    """Writes the first of `files` that can be written."""
    words = np.frombuffer("\n".join(nouns.words).encode("utf-8", "surrogatepass"), np.uint8)
    for file in files:
        temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.parent.stat().st_mode & 0o222:
                raise PermissionError(errno.EACCES, "the folder is read-only")
            with temporary.open("wb") as out:
                np.savez_compressed(
                    out,
                    words=words,
                    numbers=nouns._numbers,
                    places=nouns._places,
                    ends=nouns._ends,
                    facts=np.asarray(json.dumps(facts)),
                )
            os.replace(temporary, file)
            return
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = error.strerror
    print(f"{files[-1]} cannot be written ({reason}): the nouns are found anew in each run")

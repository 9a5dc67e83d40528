"""A knowledge set: words, each with a word vector and a prototype, as arrays and as a file (MASK).

The file is safetensors, so that any reader of that format opens it: the arrays by the names below,
`words` as UTF-8 bytes with a line end between two words, and a header that says what made them.
K words, N the width of word vectors, Z that of prototypes.
"""

import difflib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float

from trm_jax.types import UserError

_FORMAT, _VERSION = "trm_jax knowledge", "1"
_DTYPES = {
    "words": "U8",
    "word_vectors": "F32",
    "prototypes": "F32",
    "counts": "I64",
    "random_regions": "F32",
}
_OPTIONAL = {"region_map": "F32"}
_MATRICES = ("word_vectors", "prototypes", "random_regions")
_AGAIN = "build it again with launch/match.py build"
_FIT_AGAIN = "fine-tune it again with launch/match.py finetune"
_LISTED = 10


class Knowledge(NamedTuple):
    """Words with their vectors in both spaces; host arrays.

    words:          K different ones, none empty or of several lines.
    word_vectors:   [K, N] float32; N = 0 for raw prototypes, which need none.
    prototypes:     [K, Z] float32, never normalised.
    counts:         [K] int64 >= 1, the regions that a prototype is the mean of.
    random_regions: [K, Z] float32, one random region of each word.
    provenance:     what made them, in what JSON can say. Sets merge if their "encoder" is the same.
    region_map:     [Z, Z] float32 of a set that was fine-tuned, see `transform`; None of any other.
    """

    words: tuple[str, ...]
    word_vectors: np.ndarray
    prototypes: np.ndarray
    counts: np.ndarray
    random_regions: np.ndarray
    provenance: dict[str, Any]
    region_map: np.ndarray | None = None


def check(knowledge: Knowledge, name: str = "the knowledge") -> None:
    """Raises UserError unless all is as `Knowledge` says.

    Args:
      knowledge: to be checked.
      name: of the set in the message, its file perhaps.
    """
    words = knowledge.words
    if not words:
        raise UserError(f"{name} holds no word; {_AGAIN} from data with words")
    for word, times in Counter(words).items():
        if not word or "\n" in word:
            raise UserError(f"{name} has the word {word!r}, which is none; {_AGAIN} without it")
        if times > 1:
            raise UserError(f"{name} has the word {word!r} {times} times; {_AGAIN} with one of it")
    counts = knowledge.counts
    if counts.dtype != np.int64 or counts.shape != (len(words),):
        raise UserError(f"{name}: counts is {_kind(counts)}, not int64[{len(words)}]; {_AGAIN}")
    for field in _MATRICES:
        array = getattr(knowledge, field)
        if array.dtype != np.float32 or array.ndim != 2 or len(array) != len(words):
            need = f"float32[{len(words)}, width]"
            raise UserError(f"{name}: {field} is {_kind(array)}, not {need}; {_AGAIN}")
        _refuse(name, words, ~np.isfinite(array).all(axis=1), f"{field} not finite")
    if knowledge.random_regions.shape != knowledge.prototypes.shape:
        raise UserError(
            f"{name}: random_regions have width {knowledge.random_regions.shape[1]}, prototypes "
            f"{knowledge.prototypes.shape[1]}; {_AGAIN}"
        )
    _refuse(name, words, counts < 1, "no region")
    matrix, width = knowledge.region_map, knowledge.prototypes.shape[1]
    if matrix is not None and (matrix.dtype != np.float32 or matrix.shape != (width, width)):
        need = f"float32[{width}, {width}]"
        raise UserError(f"{name}: region_map is {_kind(matrix)}, not {need}; {_FIT_AGAIN}")
    if matrix is not None and not np.isfinite(matrix).all():
        raise UserError(f"{name}: region_map is not finite; {_FIT_AGAIN}")


def select(knowledge: Knowledge, keep: Bool[np.ndarray, " K"]) -> Knowledge:
    """The words where `keep` [K] holds, in their order; provenance as it is."""
    return knowledge._replace(
        words=tuple(word for word, kept in zip(knowledge.words, keep, strict=True) if kept),
        counts=knowledge.counts[keep],
        **{field: getattr(knowledge, field)[keep] for field in _MATRICES},
    )


def transform(knowledge: Knowledge, matrix: Float[np.ndarray, "Z _"]) -> Knowledge:
    """The set after fine-tuning (train/finetune.py): each prototype v becomes v W.

    So do random regions, which stand in their place. `region_map` becomes W, or its product with
    the W of earlier fine-tuning: it takes the encoder's mu to where the prototypes are now.

    Args:
      knowledge: the set; it stays as it is.
      matrix: W.

    Raises:
      UserError: W is not finite, or of another width than the prototypes.
    """
    width = knowledge.prototypes.shape[1]
    if matrix.shape != (width, width) or not np.isfinite(matrix).all():
        raise UserError(
            f"fine-tuning gave {_kind(matrix)}, the prototypes need finite numbers "
            f"[{width}, {width}]; take the knowledge that it started from"
        )
    before = np.eye(width) if knowledge.region_map is None else knowledge.region_map
    sides = (knowledge.prototypes, knowledge.random_regions, before)
    moved = [(x.astype(np.float64) @ matrix).astype(np.float32) for x in sides]
    return knowledge._replace(prototypes=moved[0], random_regions=moved[1], region_map=moved[2])


def save(knowledge: Knowledge, path: Path) -> None:
    """Writes the file, so that a reader sees the old one or the new one, never a part.

    Raises:
      UserError: the knowledge fails `check`, or the place cannot be written.
    """
    check(knowledge, f"the knowledge for {path}")
    text = np.frombuffer("\n".join(knowledge.words).encode(errors="surrogatepass"), np.uint8)
    arrays = {"words": text, "counts": knowledge.counts}
    arrays |= {field: getattr(knowledge, field) for field in _MATRICES}
    if knowledge.region_map is not None:
        arrays["region_map"] = knowledge.region_map
    arrays = {field: np.ascontiguousarray(array) for field, array in arrays.items()}
    provenance = json.dumps(knowledge.provenance, sort_keys=True)
    metadata = {"format": _FORMAT, "version": _VERSION, "provenance": provenance}
    metadata["sha256"] = _digest(arrays, provenance)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, safetensors.numpy.save(arrays, metadata))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another") from None


def load(path: Path, *, word_width: int | None = None, width: int | None = None) -> Knowledge:
    """Reads a file that `save` wrote; every bit is as it was.

    Args:
      path: of the file.
      word_width: N that the word vectors must have; None takes any.
      width: Z that the prototypes must have; None takes any.

    Raises:
      UserError: the file cannot be read, is something else, was cut off or changed, is of another
        width, or its content fails `check`.
    """
    arrays, metadata = _read(path)
    try:
        provenance = metadata["provenance"]
        if metadata["sha256"] != _digest(arrays, provenance):
            raise ValueError("another digest")
        text = arrays.pop("words").tobytes().decode(errors="surrogatepass")
        words = tuple(text.split("\n"))
        knowledge = Knowledge(words=words, provenance=json.loads(provenance), **arrays)
    except (KeyError, ValueError):
        raise UserError(f"{path} is damaged; fetch it again, or {_AGAIN}") from None
    check(knowledge, str(path))
    wanted = (("word vectors", "word_vectors", word_width), ("prototypes", "prototypes", width))
    for title, field, need in wanted:
        has = getattr(knowledge, field).shape[1]
        if need is not None and has != need:
            raise UserError(
                f"{path} has {title} of width {has}, not {need}; take the knowledge that was built "
                f"with this model and these word vectors, or {_AGAIN}"
            )
    return knowledge


def merge(a: Knowledge, b: Knowledge, *, seed: int = 0) -> Knowledge:
    """The knowledge of both sets: a word of both has the mean over the regions of both.

    Args:
      a: its words come first, in their order.
      b: its other words follow.
      seed: of the draw between two random regions, whose chances are as the counts.

    Raises:
      UserError: the sets have other widths, encoders, region maps or vectors of a word.
    """
    places = {word: place for place, word in enumerate(a.words)}
    both = [(places[word], row) for row, word in enumerate(b.words) if word in places]
    in_a, in_b = np.array(both, np.int64).reshape(-1, 2).T
    _check_alike(a, b, in_a, in_b)
    count_a, count_b = a.counts[in_a], b.counts[in_b]
    weighted = [
        count[:, None] * prototypes.astype(np.float64)
        for count, prototypes in ((count_a, a.prototypes[in_a]), (count_b, b.prototypes[in_b]))
    ]
    total = count_a + count_b
    prototypes, regions, counts = a.prototypes.copy(), a.random_regions.copy(), a.counts.copy()
    prototypes[in_a] = (weighted[0] + weighted[1]) / total[:, None]
    counts[in_a] = total
    takes_b = np.random.default_rng(seed).random(len(total)) * total < count_b
    regions[in_a[takes_b]] = b.random_regions[in_b[takes_b]]

    is_new = np.ones(len(b.words), bool)
    is_new[in_b] = False
    new = select(b, is_new)
    return Knowledge(
        words=a.words + new.words,
        word_vectors=np.concatenate([a.word_vectors, new.word_vectors]),
        prototypes=np.concatenate([prototypes, new.prototypes]),
        counts=np.concatenate([counts, new.counts]),
        random_regions=np.concatenate([regions, new.random_regions]),
        provenance={"merged": [a.provenance, b.provenance], **_encoder(a)},
        region_map=a.region_map,
    )


def describe(knowledge: Knowledge) -> dict[str, Any]:
    """What a set holds, in what JSON can say: sizes, counts, norms, fine-tuning, provenance."""
    counts = knowledge.counts
    norms = np.linalg.norm(knowledge.prototypes.astype(np.float64), axis=1)
    order = np.argsort(-counts, kind="stable")
    frequent = [(knowledge.words[k], int(counts[k])) for k in order]
    return {
        "words": len(counts),
        "words_of_several_tokens": sum(" " in word for word in knowledge.words),
        "word_width": knowledge.word_vectors.shape[1],
        "prototype_width": knowledge.prototypes.shape[1],
        "regions": int(counts.sum()),
        "regions_per_word": {
            "least": int(counts.min()),
            "median": float(np.median(counts)),
            "most": int(counts.max()),
        },
        "most_frequent": frequent[:_LISTED],
        "least_frequent": frequent[-_LISTED:],
        "prototype_norm": {
            "least": float(norms.min()),
            "mean": float(norms.mean()),
            "most": float(norms.max()),
        },
        "region_map": _stretch(knowledge.region_map),
        "provenance": knowledge.provenance,
    }


def nearest(
    knowledge: Knowledge, word: str, top: int = _LISTED
) -> dict[str, list[tuple[str, float]]]:
    """The words nearest to a word of the set, by word vectors and by prototypes.

    Args:
      knowledge: the set.
      word: one of its words.
      top: >= 0 neighbours in each space, fewer if the set has no more.

    Returns:
      {"word_vectors": [(word, cosine)] by falling cosine, "prototypes": the same}; the cosine with
      a zero vector is 0.

    Raises:
      UserError: the set lacks the word.
    """
    if word not in knowledge.words:
        near = difflib.get_close_matches(word, knowledge.words, n=1, cutoff=0.0)
        raise UserError(f"the knowledge has no word {word!r}; the likest is {near[0]!r}")
    own = knowledge.words.index(word)
    neighbours = {}
    for field in ("word_vectors", "prototypes"):
        vectors = getattr(knowledge, field).astype(np.float64)
        norms = np.linalg.norm(vectors, axis=1)
        cosines = vectors @ vectors[own] / np.where(norms * norms[own] > 0, norms * norms[own], 1.0)
        order = [k for k in np.argsort(-cosines, kind="stable") if k != own][:top]
        neighbours[field] = [(knowledge.words[k], float(cosines[k])) for k in order]
    return neighbours


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _refuse(name: str, words: tuple[str, ...], wrong: np.ndarray, what: str) -> None:
    """Raises UserError where a word has something wrong."""
    if wrong.any():
        number, first = int(wrong.sum()), words[int(np.argmax(wrong))]
        raise UserError(f"{name}: {number} words, {first!r} the first, have {what}; {_AGAIN}")


def _stretch(matrix: np.ndarray | None) -> dict[str, float] | None:
    """By how much the map makes vectors longer, or shorter; all the same of one without effect."""
    if matrix is None:
        return None
    factors = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return {"least_stretch": float(factors[-1]), "most_stretch": float(factors[0])}


def _encoder(knowledge: Knowledge) -> dict[str, Any]:
    """The part of provenance that a prototype's space depends on."""
    return {key: value for key, value in knowledge.provenance.items() if key == "encoder"}


def _check_alike(a: Knowledge, b: Knowledge, in_a: np.ndarray, in_b: np.ndarray) -> None:
    for title, field in (("word vectors", "word_vectors"), ("prototypes", "prototypes")):
        widths = getattr(a, field).shape[1], getattr(b, field).shape[1]
        if widths[0] != widths[1]:
            raise UserError(
                f"the sets to merge have {title} of widths {widths[0]} and {widths[1]}; build both "
                "with the same model and the same word vectors"
            )
    if _encoder(a) != _encoder(b):
        raise UserError("the sets to merge are of different encoders; build both with the same one")
    maps = [side.region_map for side in (a, b) if side.region_map is not None]
    if len(maps) == 1 or (maps and not np.array_equal(maps[0], maps[1])):
        raise UserError(
            "the sets to merge were not fine-tuned alike; merge them before, fine-tune the whole"
        )
    differs = (a.word_vectors[in_a] != b.word_vectors[in_b]).any(axis=1)
    if differs.any():
        word = a.words[in_a[int(np.argmax(differs))]]
        raise UserError(
            f"the sets to merge have other vectors for {int(differs.sum())} words, {word!r} the "
            "first; build both with the same file of word vectors"
        )


def _digest(arrays: Mapping[str, np.ndarray], provenance: str) -> str:
    """SHA-256 of the content, the place in the file aside."""
    digest = hashlib.sha256(provenance.encode())
    for field in sorted(arrays):
        digest.update(f"\n{field} {_kind(arrays[field])}\n".encode())
        digest.update(arrays[field].tobytes())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the header of a file that calls itself a knowledge."""
    foreign = f"{path} is no knowledge, or is cut off or damaged"
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(
                    f"{path} is a safetensors file, but no knowledge; give what launch/match.py "
                    "build wrote"
                )
            if metadata.get("version") != _VERSION:
                raise UserError(f"{path} is a knowledge of another version; {_AGAIN}")
            names = list(file.keys())
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
            if dtypes not in (_DTYPES, _DTYPES | _OPTIONAL):
                raise UserError(f"{foreign}: it has {dtypes}; {_AGAIN}")
            return {name: file.get_tensor(name) for name in names}, metadata
    except safetensors.SafetensorError as error:
        raise UserError(f"{foreign} ({error}); fetch it again, or {_AGAIN}") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be read ({reason}); check the path") from None

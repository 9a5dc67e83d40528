"""NLTK's averaged perceptron tagger of English: either form of its data, tags with their places.

The data is three tables: weights of features, tags of words that have one alone, and all tags.
NLTK has it as three JSON files (averaged_perceptron_tagger_eng) and had it as one pickle
(averaged_perceptron_tagger). A pickle is a program; it is read by an unpickler that knows no more
than what the tables are made of.
"""

import functools
import glob
import hashlib
import io
import json
import math
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trm_jax.types import UserError

NAMES = ("averaged_perceptron_tagger_eng", "averaged_perceptron_tagger")  # the newer form first
_REMEDY = f"run python -m nltk.downloader {NAMES[0]}, or set NLTK_DATA to the folder that has it"
_PARTS = (".weights.json", ".tagdict.json", ".classes.json")
_PICKLE = ".pickle"
_LARGEST = 1 << 28  # bytes of a file of the data, unpacked; the real ones have 6 million
_FULL_STOP = re.compile(r"(?<=\w\w\.)(?=\s)")
_QUOTES = re.compile(r"``|''|\"")
_LOADING = threading.Lock()


class Tagger:
    """Splits a caption into tokens and tags them; `sha256` is that of the files of its data.

    Args:
      weights: feature -> tag -> weight. tagdict: word -> its one tag. classes: all tags.
      sha256: of the files that these were read from.
    """

    def __init__(
        self,
        weights: Mapping[str, Mapping[str, float | int]],
        tagdict: Mapping[str, str],
        classes: set[str],
        sha256: str,
    ):
        # Late: NLTK takes a second to import, and most runs need no tagger.
        from nltk.tag.perceptron import PerceptronTagger
        from nltk.tokenize import NLTKWordTokenizer

        self.sha256 = sha256
        self._tokenizer = NLTKWordTokenizer()
        self._tagger: Any = PerceptronTagger(load=False)
        self._tagger.tagdict = tagdict
        self._tagger.model = _Perceptron(weights, classes)

    def __call__(self, caption: str) -> list[tuple[int, int, str]]:
        """(start, end, Penn Treebank tag) of each token, in order; caption[start:end] is the token.

        The tokenizer takes one sentence and finds its full stop at the end alone, so it is given
        the sentences of a caption one by one. It writes any double quote as `` or ''; so the tagger
        knows them.
        """
        tokens, places, end = [], [], 0
        for sentence in _FULL_STOP.split(caption):
            for token in self._tokenizer.tokenize(sentence):
                if token in ("``", "''"):
                    found = _QUOTES.search(caption, end)
                    assert found is not None
                    start, end = found.span()
                else:
                    start = caption.index(token, end)
                    end = start + len(token)
                tokens.append(token)
                places.append((start, end))
        tags = self._tagger.tag(tokens)
        return [(*place, tag) for place, (_, tag) in zip(places, tags, strict=True)]


class _Perceptron:
    """NLTK's model with its weights in one matrix: the same sums, several times as fast."""

    def __init__(self, weights: Mapping[str, Mapping[str, float | int]], classes: set[str]):
        # Backwards: of equal scores NLTK takes the last tag of the alphabet, argmax the first.
        self._tags = sorted(classes, reverse=True)
        column = {tag: number for number, tag in enumerate(self._tags)}
        self._rows = {feature: row for row, feature in enumerate(weights)}
        self._matrix = np.zeros((len(weights), len(classes)))
        for row, scores in zip(self._matrix, weights.values(), strict=True):
            for tag in scores.keys() & column.keys():
                row[column[tag]] = scores[tag]

    def predict(self, features: Iterable[str], return_conf: bool = False) -> tuple[str, None]:
        """(best tag, None: no confidence is asked for)."""
        del return_conf
        rows = [self._rows[feature] for feature in features if feature in self._rows]
        # Row after row, in the order in which NLTK adds.
        return self._tags[int(self._matrix[rows].sum(axis=0).argmax())], None


def open_tagger(path: str | Path = "") -> Tagger:
    """The tagger below `path`, read once per process.

    Args:
      path: the data: a folder with the three JSON files, a .pickle, a .zip of either as NLTK's
        downloader leaves it, or a folder (also an NLTK_DATA) with one of these. "" is where NLTK
        looks for data.

    Raises:
      UserError: there is no such data, it is damaged, or a pickle holds anything else than
        dictionaries, lists, tuples, sets, strings and numbers.
    """
    with _LOADING:  # the pipeline reads in threads
        return _open(str(path))


@functools.lru_cache(maxsize=4)
def _open(path: str) -> Tagger:
    place = _find(path)
    try:
        files = _read(place)
        tables = _tables(files)
        _check(*tables)
    except Exception as error:  # noqa: BLE001 (a damaged pickle, zip or JSON breaks in many ways)
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = f": {_REMEDY}" if not path else ""
        raise UserError(f"the tagger {place} cannot be read ({reason}){remedy}") from None
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(hashlib.sha256(files[name]).digest())
    weights, tagdict, classes = tables
    return Tagger(weights, tagdict, set(classes), digest.hexdigest())


def _find(path: str) -> Path:
    """The folder, zip or pickle of the data."""
    if path:
        roots = [Path(path).expanduser()]
    else:
        import nltk

        roots = [Path(root) for root in nltk.data.path]
    for place in (place for root in roots for place in _places(root)):
        # These two take a folder that may not be read for one that is not there.
        if os.path.isfile(place) or any(map(_is_data, glob.glob(f"{glob.escape(str(place))}/*"))):
            return place
    if path:
        raise UserError(
            f"{path} holds no tagger; give a folder with NLTK's {NAMES[0]} (JSON), or "
            f"{NAMES[1]}.pickle or .zip"
        )
    raise UserError(
        f"the nouns of captions need NLTK's {NAMES[0]}, which is not on this machine: {_REMEDY}"
    )


def _places(root: Path) -> list[Path]:
    """Where the data may lie: `root` itself, and where NLTK's downloader puts it."""
    below = [f"{name}{ending}" for name in NAMES for ending in ("", ".zip", _PICKLE)]
    return [root, *(root / name for name in below), *(root / "taggers" / name for name in below)]


def _is_data(name: str) -> bool:
    return name.endswith((*_PARTS, _PICKLE))


def _read(place: Path) -> dict[str, bytes]:
    """The files of the data by name."""
    if place.suffix == ".zip":
        with zipfile.ZipFile(place) as archive:
            members = [member for member in archive.infolist() if _is_data(member.filename)]
            _check_size(max((member.file_size for member in members), default=0))
            return {member.filename: archive.read(member) for member in members}
    paths = [place]
    if place.is_dir():
        paths = [path for path in place.iterdir() if _is_data(path.name)]
    _check_size(max((path.stat().st_size for path in paths), default=0))
    return {path.name: path.read_bytes() for path in paths}


def _check_size(size: int) -> None:
    if size > _LARGEST:
        raise ValueError(f"a file of {size:,} bytes is none of a tagger")


def _tables(files: dict[str, bytes]) -> tuple[Any, Any, Any]:
    """(weights, tagdict, classes) from the JSON files, or else from the pickle."""
    parts = [[data for name, data in files.items() if name.endswith(end)] for end in _PARTS]
    if all(parts):
        weights, tagdict, classes = (json.loads(part[0]) for part in parts)
    else:
        pickled = [data for name, data in files.items() if name.endswith(_PICKLE)]
        if not pickled:
            raise ValueError(f"it has none of the files *{', *'.join((*_PARTS, _PICKLE))}")
        weights, tagdict, classes = _Unpickler(io.BytesIO(pickled[0])).load()
    return weights, tagdict, classes


class _Unpickler(pickle.Unpickler):
    """Knows dict, list, tuple, str, float and int, which need no class, and set."""

    def find_class(self, module: str, name: str) -> type[set]:
        if (module, name) in (("__builtin__", "set"), ("builtins", "set")):
            return set
        raise ValueError(f"its pickle asks for {module}.{name}, which no table of a tagger holds")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("its pickle asks for an object from outside")


def _check(weights: Any, tagdict: Any, classes: Any) -> None:
    """Raises ValueError for tables that are not those of a tagger."""
    if not (
        isinstance(weights, dict)
        and all(isinstance(row, dict) for row in weights.values())
        and all(
            isinstance(weight, int | float) and math.isfinite(weight)
            for row in weights.values()
            for weight in row.values()
        )
    ):
        raise ValueError("its weights are not numbers by feature and tag")
    if not isinstance(tagdict, dict) or not all(isinstance(t, str) for t in tagdict.values()):
        raise ValueError("its tagdict is not a tag by word")
    if not isinstance(classes, list | set) or not all(isinstance(c, str) for c in classes):
        raise ValueError("its classes are not a list of tags")
    if not classes:
        raise ValueError("it has no tags")

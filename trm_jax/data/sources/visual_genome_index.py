"""Visual Genome's objects and attributes, read once from JSON and kept as arrays.

Source: Krishna et al., "Visual Genome", IJCV 2017. The folder holds, as published,

    image_data.json  [{"image_id", "width", "height", "coco_id", ...}, ...]
    objects.json     [{"image_id", "objects": [{"object_id", "x", "y", "w", "h", "names": [...],
                       "synsets": ["traffic_light.n.01"], "merged_object_ids": [...]}, ...]}, ...]
    attributes.json  [{"image_id", "attributes": [{"object_id", "attributes": ["red", ...], and the
                       object as above}, ...]}, ...]

Version 1.0 has "id" for both ids, "object_names" in the attributes, and synsets as
{"synset_name": ...}. The lists have an element for each of 108,077 images; objects.json is 400 MB,
and ten times that as Python objects, so one element is read at a time.
"""

import array
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int
from tqdm import tqdm

from trm_jax.data.sources.labelled_regions import save_arrays
from trm_jax.data.sources.region_words import clean_word
from trm_jax.types import UserError

FILES = ("image_data.json", "objects.json", "attributes.json")
_VERSION = 1
_CHUNK = 1 << 20  # characters
_LARGEST = 1 << 26  # of one element; those of Visual Genome have some ten thousand
_SYNSET = re.compile(r"(.+)\.[a-z]\.\d+")
_REMEDY = "set data.options.index_dir to a folder for what is read of Visual Genome"


class Annotations(NamedTuple):
    """The boxes of I images and their words.

    Boxes lie image by image, those of objects.json first and in its order, then those that only
    attributes.json has. A word is in the spelling of `region_words.clean_word`.
    """

    ids: Int[np.ndarray, "I"]
    coco_ids: Int[np.ndarray, "I"]  # -1 where the image is none of COCO's
    sizes: Int[np.ndarray, "I 2"]  # width, height in pixels
    num_objects: Int[np.ndarray, "I"]  # boxes that objects.json lists
    box_starts: Int[np.ndarray, "I1"]
    boxes: Float32[np.ndarray, "B 4"]  # x1, y1, x2, y2 in pixels
    sample_boxes: Int[np.ndarray, "S"]
    sample_words: Int[np.ndarray, "S"]  # positions in `words`
    words: tuple[str, ...]
    num_without_synset: int  # objects that go by their names


def open_annotations(root: str | Path, index_dir: str | Path = "") -> Annotations:
    """The annotations in a folder of Visual Genome, read from their index or read and kept.

    The index lies beside the files, or in `index_dir`; it is made anew when size or time of a file
    change.

    Raises:
      UserError: a file is missing or damaged, an entry lacks what is read of it (with image and
        object), an image is unknown or listed twice, or the index cannot be written.
    """
    root = Path(root).expanduser()
    facts = {"version": _VERSION, "files": [_facts(root / name) for name in FILES]}
    file = index_file(root, "visual_genome", index_dir)
    kept = load_index(file, facts)
    if kept is not None:
        words = bytes(kept.pop("words")).decode().splitlines()
        number = int(kept.pop("num_without_synset"))
        return Annotations(words=tuple(words), num_without_synset=number, **kept)
    found = read_annotations(root)
    arrays = found._asdict() | {"words": np.frombuffer("\n".join(found.words).encode(), np.uint8)}
    save_arrays(file, _REMEDY, **arrays, facts=np.asarray(json.dumps(facts)))
    return found


def index_file(root: Path, name: str, index_dir: str | Path) -> Path:
    """Where an index of the folder `root` lies; indexes of several folders may share index_dir."""
    if not index_dir:
        return root / f"{name}.npz"
    folder = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    return Path(index_dir).expanduser() / f"{name}.{folder}.npz"


def load_index(file: Path, facts: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """The arrays of an index that was made of `facts`, else None."""
    try:
        with file.open("rb") as data, np.load(data) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return arrays if json.loads(str(arrays.pop("facts"))) == facts else None
    except Exception:  # noqa: BLE001 (not there, or damaged in whatever way: it is made anew)
        return None


def read_annotations(root: Path) -> Annotations:
    """The annotations in a folder, from its JSON files alone; errors as `open_annotations`."""
    tables = _Tables()
    tables.read_images(root / FILES[0])
    tables.read_objects(root / FILES[1])
    tables.read_attributes(root / FILES[2])
    return tables.finish()


def elements(path: Path, chunk: int = _CHUNK) -> Iterator[Mapping[str, Any]]:
    """The elements of a file that is a JSON list of objects, one at a time.

    chunk: characters that are read at a time. Raises UserError for a file that is no such list, is
    cut short or damaged, with the number of the first element that cannot be read.
    """
    decoder, number = json.JSONDecoder(), 0
    size = path.stat().st_size
    shown = tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, disable=None)
    try:
        with path.open(encoding="utf-8-sig") as file, shown:
            text, position = file.read(chunk).lstrip(), 1
            if text[:1] != "[":
                raise UserError(f"{path} is none of Visual Genome's files: it is no JSON list")
            while True:
                position = _skip(text, position)
                if text[position : position + 1] == "]":
                    return
                try:
                    element, position = decoder.raw_decode(text, position)
                except json.JSONDecodeError as error:
                    # The element may go on in the next part; doubling keeps the work linear.
                    more = file.read(max(chunk, len(text) - position))
                    shown.update(len(more))
                    if not more or len(text) - position > _LARGEST:
                        raise UserError(
                            f"{path}, element {number}: {error.msg}; the file is cut short or "
                            "damaged"
                        ) from None
                    text, position = text[position:] + more, 0
                    continue
                if not isinstance(element, dict):
                    raise UserError(f"{path}, element {number} is no JSON object")
                yield element
                number += 1
    except UnicodeDecodeError:
        raise UserError(f"{path}, after element {number}: not UTF-8; fetch the file anew") from None


def _skip(text: str, position: int) -> int:
    """The next place that is neither space nor comma."""
    while text[position : position + 1] in (" ", "\n", "\r", "\t", ","):
        position += 1
    return position


def _facts(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; a folder of Visual Genome has {', '.join(FILES)}"
        ) from error
    return [path.name, status.st_size, status.st_mtime_ns]


class _Tables:
    """Columns that grow while the files are read."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}  # image id -> row
        self._coco, self._sizes = array.array("q"), array.array("q")
        self._box_rows, self._boxes = array.array("i"), array.array("f")
        self._sample_boxes, self._sample_words = array.array("q"), array.array("i")
        self._words: dict[str, int] = {}
        self._raw: dict[str, int] = {}  # as spelt in the files -> number of the word, -1 for none
        # Object ids and their boxes; those of an image lie together.
        self._keys, self._key_boxes = array.array("q"), array.array("q")
        self._parts: dict[int, tuple[int, int]] = {}
        self._num_objects: dict[int, int] = {}
        self._without_synset = 0

    def read_images(self, path: Path) -> None:
        for number, entry in enumerate(elements(path)):
            image = _number(entry, "image_id", "id")
            width, height = _number(entry, "width"), _number(entry, "height")
            if image is None or not width or not height or min(width, height) < 1:
                raise UserError(f"{path}, element {number} lacks image_id, width or height")
            if image in self._rows:
                raise UserError(f"{path} lists the image {image} twice")
            coco = _number(entry, "coco_id")
            self._rows[image] = len(self._rows)
            self._coco.append(-1 if coco is None else coco)
            self._sizes.extend((width, height))

    def read_objects(self, path: Path) -> None:
        for row, place, items in self._images(path, "objects"):
            if row in self._parts:
                raise UserError(f"{place} is listed twice")
            start = len(self._keys)
            for item in items:
                box = self._add_box(row, place, item)
                merged = item.get("merged_object_ids") or ()
                for key in (_number(item, "object_id", "id"), *merged):
                    if isinstance(key, int):
                        self._keys.append(key)
                        self._key_boxes.append(box)
            self._parts[row] = (start, len(self._keys))
            self._num_objects[row] = len(items)

    def read_attributes(self, path: Path) -> None:
        for row, place, items in self._images(path, "attributes"):
            start, end = self._parts.get(row, (0, 0))
            boxes = dict(zip(self._keys[start:end], self._key_boxes[start:end], strict=True))
            for item in items:
                names = _strings(item, place, "attributes")
                number = _number(item, "object_id", "id")
                if number is None or number not in boxes:
                    box = self._add_box(row, place, item)
                else:
                    box = boxes[number]
                self._add_words(box, names)

    def finish(self) -> Annotations:
        rows = np.asarray(self._box_rows, np.int64)
        order = np.argsort(rows, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        count = len(self._rows)
        objects = np.zeros(count, np.int64)
        objects[list(self._num_objects)] = list(self._num_objects.values())
        return Annotations(
            ids=np.fromiter(self._rows, np.int64, count),
            coco_ids=np.asarray(self._coco, np.int64),
            sizes=np.asarray(self._sizes, np.int64).reshape(-1, 2),
            num_objects=objects,
            box_starts=np.searchsorted(rows[order], np.arange(count + 1)),
            boxes=np.asarray(self._boxes, np.float32).reshape(-1, 4)[order],
            sample_boxes=place[np.asarray(self._sample_boxes, np.int64)],
            sample_words=np.asarray(self._sample_words, np.int64),
            words=tuple(self._words),
            num_without_synset=self._without_synset,
        )

    def _images(self, path: Path, field: str) -> Iterator[tuple[int, str, list[Mapping]]]:
        """(row of the image, its place for messages, what the file has of it)."""
        for number, entry in enumerate(elements(path)):
            image, items = _number(entry, "image_id", "id"), entry.get(field)
            if image is None or not isinstance(items, list):
                raise UserError(f"{path}, element {number} lacks image_id or {field}")
            if image not in self._rows:
                raise UserError(f"{path}, image {image}: {FILES[0]} does not know it")
            place = f"{path}, image {image}"
            if not all(isinstance(item, dict) for item in items):
                raise UserError(f"{place}: {field} are no JSON objects")
            yield self._rows[image], place, items

    def _add_box(self, row: int, place: str, item: Mapping[str, Any]) -> int:
        """The number of a new box with the words of its object."""
        place = f"{place}, object {_number(item, 'object_id', 'id')}"
        given = [item.get(name) for name in "xywh"]
        values = [v for v in given if isinstance(v, int | float) and math.isfinite(v)]
        if len(values) < 4:
            raise UserError(f"{place}: its box x, y, w, h is {given}, not four numbers")
        x, y, w, h = values
        box = len(self._box_rows)
        self._box_rows.append(row)
        self._boxes.extend((x, y, x + w, y + h))
        synsets = _strings(item, place, "synsets")
        self._without_synset += not synsets
        self._add_words(box, synsets or _strings(item, place, "names", "object_names"))
        return box

    def _add_words(self, box: int, texts: Sequence[str]) -> None:
        for text in texts:
            number = self._raw.get(text)
            if number is None:
                word = clean_word(text)
                number = self._words.setdefault(word, len(self._words)) if word else -1
                self._raw[text] = number
            if number >= 0:
                self._sample_boxes.append(box)
                self._sample_words.append(number)


def _number(entry: Mapping[str, Any], *names: str) -> int | None:
    """The integer under the first of `names` that has one."""
    values = (entry.get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _strings(item: Mapping[str, Any], place: str, *names: str) -> list[str]:
    """The list under the first of `names` that has one; of a synset its lemma."""
    values = next((item[name] for name in names if item.get(name)), [])
    if isinstance(values, list):
        entries = (v.get("synset_name") if isinstance(v, dict) else v for v in values)
        texts = [text for text in entries if isinstance(text, str)]
        if len(texts) == len(values):
            return [_lemma(text) for text in texts] if names == ("synsets",) else texts
    raise UserError(f"{place}: {names[0]} is {values!r}, not a list of strings")


def _lemma(synset: str) -> str:
    """The lemma of "traffic_light.n.01" is "traffic_light"; what is no synset stays."""
    match = _SYNSET.fullmatch(synset)
    return match[1] if match else synset

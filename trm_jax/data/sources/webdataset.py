"""Image-text pairs in the tar shards that img2dataset writes, read at random.

Samples are found by the indexes of `tar_index.py`; nothing is unpacked or copied. In memory there
are 16 bytes a sample; ids and captions are read when they are asked for.
"""

import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trm_jax.data.sources import tar_index
from trm_jax.data.sources.base import decode_image, file_fingerprint
from trm_jax.data.sources.lazy import JoinedPairs
from trm_jax.types import BadSampleError, UserError

# Open shards of this process, over all sources; the usual limit is 1,024 files.
_OPEN_FILES = 256
# Lines about single shards, so that a thousand of them do not hide what else is said.
_LINES = 8


class WebDataset(JoinedPairs):
    """The samples KEY.jpg (jpeg, png, webp) + KEY.txt of tar shards, in the order of the shards.

    The members of a sample are neighbours, as those who write shards have it (tar --sort=name).

    root:  a folder of *.tar; a shard; or a pattern of shards with * ? [] and {00000..00331} {a,b}.
    split: "train", or "test": the shards of `test_root`, by default those of the folder root/test.
    shards: patterns of shards below the folder `root`, where not all of them are wanted.
    caption_key: the caption is this field of KEY.json, a text or a list of texts, not KEY.txt.
    index_dir: folder for the indexes, by default beside the shards.

    Raises UserError where there is no shard or no sample. A damaged shard gives the samples before
    the damage; it is named in a line, as are shards without a sample and the count of samples that
    lack an image or a caption.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        shards: Sequence[str] = (),
        test_root: str = "",
        caption_key: str = "",
        index_dir: str = "",
    ):
        self._paths = find_shards(root if split == "train" else _test_root(root, test_root), shards)
        self._caption_key = caption_key
        text = "json" if caption_key else "txt"
        self._indexes = tar_index.open_indexes(self._paths, text=text, index_dir=index_dir)
        _describe(self._indexes, text)
        self._starts = np.cumsum([0, *(len(index.table) for index in self._indexes)])
        if not len(self):
            raise UserError(f"not one sample in the {len(self._paths)} shards of {root}")
        common = Path(os.path.commonpath([path.parent for path in self._paths]))
        self._names = [path.relative_to(common).with_suffix("").as_posix() for path in self._paths]

    @property
    def captioned(self) -> range:
        """All positions: each sample has a caption's member, which is not read for this."""
        return range(len(self))

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(index.size for index in self._indexes)

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the shards, and with the sizes of their members."""
        digest = hashlib.sha256(file_fingerprint(self._paths).encode())
        for index in self._indexes:
            digest.update(index.table.tobytes())  # the size of a tar is rounded up to 10 kB
        return digest.hexdigest()

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if it cannot be decoded."""
        return {"image": decode_image(self.encoded(index), self._name_of(index))}

    def encoded(self, index: int) -> bytes:
        """The image file as it lies in the shard. Raises BadSampleError if it cannot be read."""
        return self._member(index, 0)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions, () if they are empty; BadSampleError if they cannot be read."""
        content = self._member(index, 2)
        if self._caption_key:
            texts = _texts(content, self._caption_key)
        else:
            texts = [content.decode("utf-8", errors="replace")]
        return tuple(text.strip() for text in texts if text.strip())

    def _member(self, index: int, column: int) -> bytes:
        shard, row = self._place(index)
        of = self._indexes[shard]
        block, size = of.table[row, column : column + 2].tolist()
        try:
            file = _opened(of.path, of.size, of.mtime_ns)
            content = os.pread(file.number, size, block * tar_index.BLOCK)
        except OSError as error:
            raise BadSampleError(f"{of.path}: {error.strerror}") from error
        if len(content) != size:
            raise BadSampleError(f"{of.path} was cut short since it was indexed")
        return content

    def _id(self, index: int) -> str:
        shard, row = self._place(index)
        key = tar_index.read_keys(self._indexes[shard])[row]
        return f"{self._names[shard]}/{key.decode('utf-8', errors='replace')}"

    def _name_of(self, index: int) -> str:
        """For messages: unlike the id it costs no look into a file."""
        shard, row = self._place(index)
        return f"{self._paths[shard]}, sample {row}"


def find_shards(root: str | Path, shards: Sequence[str] = ()) -> list[Path]:
    """The shards that a folder, a shard or a pattern means, in the order of their names.

    shards: patterns below the folder `root`; their order is kept. Raises UserError for none, and
    for one that braces ask for but that is missing.
    """
    root = Path(root).expanduser()
    if isinstance(shards, str):
        shards = (shards,)
    if root.is_dir():
        patterns = [str(root / pattern) for pattern in shards or ("*.tar",)]
    elif shards:
        raise UserError(f"data.root '{root}' is not a folder; data.options.shards lie in one")
    else:
        patterns = [str(root)]
    found = dict.fromkeys(path for pattern in patterns for path in _matching(pattern))
    if not found:
        where = f"{root} has no shard (*.tar)" if root.is_dir() else f"there is no shard {root}"
        raise UserError(f"{where}; check data.root and data.options.shards")
    return list(found)


def _matching(pattern: str) -> list[Path]:
    names = _expand(pattern)
    if any(glob.has_magic(name) for name in names):
        return sorted(Path(path) for name in names for path in glob.glob(name))
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        raise UserError(
            f"{missing[0]} does not exist ({len(missing)} of {len(names)} shards of '{pattern}'); "
            "get it, or write * for the numbers to take the shards that are there"
        )
    return [Path(name) for name in names]


def _expand(pattern: str) -> list[str]:
    """{a,b} and {08..11} as a shell expands them."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", group[1])
    if span is None:
        words = group[1].split(",")
    else:
        words = [f"{n:0{len(span[1])}d}" for n in range(int(span[1]), int(span[2]) + 1)]
    head, tail = pattern[: group.start()], pattern[group.end() :]
    return [name for word in words for name in _expand(f"{head}{word}{tail}")]


def _test_root(root: str | Path, test_root: str) -> Path:
    folder = Path(test_root or Path(root) / "test").expanduser()
    if not test_root and not folder.is_dir():
        raise UserError(
            f"{root} has no folder 'test' with shards for the tests; set data.options.test_root, "
            "or evaluate on another dataset with data.test_dataset"
        )
    return folder


def _describe(indexes: Sequence[tar_index.ShardIndex], text: str) -> None:
    """Prints what is wrong with the shards."""
    lines = []
    for index in indexes:
        samples = len(index.table)
        if index.damage:
            lines.append(f"{index.path}: {index.damage}; its first {samples:,} samples are used")
        elif not samples:
            lines.append(f"{index.path} has no sample (an image and KEY.{text})")
    left_out = sum(index.left_out for index in indexes)
    for line in lines[:_LINES]:
        print(line)
    if lines[_LINES:]:
        print(f"and {len(lines) - _LINES:,} more shards are damaged or have no sample")
    if left_out:
        folder = indexes[0].path.parent
        print(
            f"{folder}: {left_out:,} samples lack an image or KEY.{text} beside it and are left out"
        )


def _texts(content: bytes, key: str) -> list[str]:
    """The captions under `key` of a JSON object; [] if there are none."""
    try:
        value = json.loads(content)[key]
    except (ValueError, KeyError, TypeError):
        return []
    texts = value if isinstance(value, list) else [value]
    return [text for text in texts if isinstance(text, str)]


class _File:
    """A file that is open as long as anybody holds this object."""

    def __init__(self, path: Path):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


# A file that leaves the cache is closed only when the last thread has read from it. Size and time
# are part of the key, so that a replaced shard is opened anew.
@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(path: Path, size: int, mtime_ns: int) -> _File:
    del size, mtime_ns
    return _File(path)

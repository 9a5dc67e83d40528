"""Images in ArrayRecord files that TFDS wrote, read at random without TensorFlow.

TensorFlow Datasets says which records there are and what they hold; OpenCV decodes the images.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trm_jax.data.sources.base import decode_image
from trm_jax.types import BadSampleError, UserError

INFO = "dataset_info.json"


class Records:
    """The examples of a split of a TFDS dataset; an image is the bytes of its file.

    Args:
      folder: holds dataset_info.json, features.json and the ArrayRecord files.
      split: a split of TFDS, or several joined by "+".

    Raises:
      UserError: there is no such dataset or split, it is not in ArrayRecord files, or a file is
        missing or cut short.
    """

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        self.split = split
        self._source: Any = None  # TFDS's, opened on first use
        builder = _builder(folder)
        unknown = [name for name in split.split("+") if name not in builder.info.splits]
        if unknown:
            raise UserError(
                f"{folder} has no split '{unknown[0]}'; it has {', '.join(builder.info.splits)}"
            )
        for name in split.split("+"):
            _check_files(builder.info.splits[name])
        self.features = builder.info.features
        if "image" not in self.features:
            raise UserError(f"{folder} has no image; it has {', '.join(self.features)}")
        self._length = sum(builder.info.splits[name].num_examples for name in split.split("+"))

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        # Workers open the files for themselves.
        return {**self.__dict__, "_source": None, "features": None}

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One example; BadSampleError if its bytes are damaged."""
        if self._source is None:
            import tensorflow_datasets as tfds

            self._source = _builder(self.folder).as_data_source(
                self.split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        try:
            return self._source[row]
        except Exception as error:  # array_record's, protobuf's and TFDS's have no common base
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadSampleError(
                f"{self.folder}, record {row} of {self.split}: {reason}"
            ) from error


class RecordImages:
    """Images and labels of some records; a Source.

    Args:
      records: where the images lie.
      rows: [N] the record of each example.
      ids: N image ids.
      class_names: C names.
      labels: int8 [N, C].
      captions: N tuples, or () if there are none.
      fingerprint: changes with the images.
    """

    def __init__(
        self,
        records: Records,
        rows: np.ndarray,
        *,
        ids: Sequence[str],
        class_names: Sequence[str],
        labels: np.ndarray,
        captions: Sequence[tuple[str, ...]] = (),
        fingerprint: str = "",
    ):
        self._records = records
        self._rows = rows
        self.ids: Sequence[str] = tuple(ids)
        self.class_names = tuple(class_names)
        self.labels = labels
        self._captions = captions
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Changes with the images."""
        return self._fingerprint

    def read(self, index: int) -> dict[str, np.ndarray]:
        """{"image": uint8 [h, w, 3] RGB}; BadSampleError if the record or its image is broken."""
        example = self._records[int(self._rows[index])]
        return {"image": decode_image(example["image"], self.ids[index])}

    def encoded(self, index: int) -> bytes:
        """The image file."""
        return self._records[int(self._rows[index])]["image"]

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of the image, () if none."""
        return self._captions[index] if self._captions else ()


def label_matrix(
    positives: Sequence[Sequence[int]], difficult: Sequence[Sequence[int]], num_classes: int
) -> np.ndarray:
    """int8 [N, C]: 1 in the columns of `positives`, 0 in those of `difficult`, -1 elsewhere."""
    labels = np.full((len(positives), num_classes), -1, np.int8)
    for value, lists in ((0, difficult), (1, positives)):
        for row, columns in enumerate(lists):
            labels[row, list(columns)] = value
    return labels


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; UserError with the remedy if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object); {remedy}")
    return content


def _builder(folder: Path) -> Any:
    """TFDS's view of a prepared folder."""
    import tensorflow_datasets as tfds

    if not (folder / INFO).is_file():
        raise UserError(f"{folder} has no {INFO}: it is no dataset that TFDS prepared")
    try:
        builder = tfds.builder_from_directory(folder)
        file_format = builder.info.file_format
    except Exception as error:  # whatever its parsers of JSON and protobuf raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{folder}: {INFO} or features.json is damaged ({reason}); prepare the dataset again"
        ) from error
    if file_format is None or file_format.value != "array_record":
        raise UserError(
            f"{folder} is in {file_format and file_format.value} files, which are read in order "
            "only; prepare it with file_format=array_record"
        )
    return builder


def _check_files(split: Any) -> None:
    """Raises UserError for a file that is missing, cut short, or has not its records."""
    from array_record.python.array_record_module import ArrayRecordReader

    for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
        if not Path(path).is_file():
            raise UserError(f"{path} is missing; prepare the dataset again")
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()  # 0 in a file without its end
        if reader.ok():  # closing a broken one raises
            reader.close()
        if found != length:
            raise UserError(
                f"{path} is damaged: {found} of {length} records can be read; prepare the dataset "
                "again"
            )

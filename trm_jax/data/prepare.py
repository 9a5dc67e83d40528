"""From the raw layout of COCO or VOC to ArrayRecord files, with counts and hashes checked.

The folder is built beside its place under a name that says so, read back, and moved into place
when it is whole: a killed preparation leaves no half-written dataset, the next one starts clean.
`sources/prepared.py` says what is in the folder and reads it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trm_jax.data.prepare_records import Report, Split, build, content_sha256, read_back
from trm_jax.data.sources import coco, voc
from trm_jax.data.sources.base import file_fingerprint
from trm_jax.data.sources.prepared import (
    LAYOUT,
    METADATA,
    index_of,
    index_path,
    is_prepared,
    read_metadata,
)
from trm_jax.data.sources.records import Records
from trm_jax.types import UserError

DATASETS = ("coco", "voc")
_SHOWN = 3


def prepare(
    dataset: str,
    source: str | Path,
    out: str | Path,
    *,
    year: str = "",
    splits: Sequence[str] = ("train", "test"),
    skip_bad: bool = False,
    check_counts: bool = True,
    report: Report = lambda phase, split, done, total: None,
) -> tuple[dict[str, Any], bool]:
    """Makes the prepared folder `out` of the dataset in `source`.

    Args:
      dataset: "coco" or "voc".
      source: the dataset in its official layout, as data.root.
      out: a folder that does not exist, is empty, or holds what this call would make.
      year: "" takes the only one that `source` holds.
      splits: some of "train" and "test".
      skip_bad: leave images out that cannot be decoded, instead of refusing them.
      check_counts: refuse whole splits whose labels are not those published.
      report: told about each image; what it raises ends the preparation.

    Returns:
      (the content of prepared.json, whether `out` was there already).

    Raises:
      UserError: missing or broken images, wrong counts, or an `out` that holds something else.
    """
    source, out = Path(source), Path(out).resolve()
    year = year or _only_year(dataset, source)
    opened = {
        name: Split(name, _open(dataset, source, name, year, check_counts)) for name in splits
    }
    for split in opened.values():
        _refuse_missing(split)
    made_of = {
        "dataset": dataset,
        "year": year,
        "skip_bad": skip_bad,
        "images": {name: file_fingerprint(split.paths) for name, split in opened.items()},
        "files": _file_hashes(source, [split.source for split in opened.values()]),
    }
    source_sha256 = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    metadata = read_metadata(out) if is_prepared(out) else None
    if metadata is not None:
        check_same(out, metadata, source_sha256)
        for name in opened:
            Records(out, name)  # names a file that is missing or cut short
        return metadata, True
    check_empty(out)
    with whole_folder(out, sum(sum(split.sizes) for split in opened.values())) as workspace:
        folder = build(workspace, opened, report)
        _refuse_bad(opened.values(), skip_bad)
        metadata = {
            "layout": LAYOUT,
            "dataset": dataset,
            "year": year,
            "class_names": list(next(iter(opened.values())).source.class_names),
            "splits": {name: _finish(folder, split, report) for name, split in opened.items()},
            "source_files": made_of["files"],
            "source_sha256": source_sha256,
        }
        (folder / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        os.replace(folder, out)
    return metadata, False


def official_images(dataset: str, year: str, split: str) -> int:
    """How many images the whole split has; 0 for a year that is not known."""
    table = coco.OFFICIAL_COUNTS if dataset == "coco" else voc.OFFICIAL_COUNTS
    return table[year, split][0] if (year, split) in table else 0


def _open(
    dataset: str, root: Path, split: str, year: str, check_counts: bool
) -> coco.CocoImages | voc.VocImages:
    """The raw source with all it knows: images without labels, difficult instances as 0."""
    if dataset == "voc":
        return voc.VocImages(
            root,
            split,
            year=year,
            difficult="ignore",
            check_counts=check_counts,
            allow_empty_classes=True,
        )
    source = coco.CocoImages(root, split, year=year, keep_empty=True, allow_empty_classes=True)
    images, annotated = coco.OFFICIAL_COUNTS.get((year, split), (0, 0))
    count = int((source.labels > 0).any(axis=1).sum())
    if check_counts and len(source) == images and count != annotated:
        raise UserError(
            f"{source.annotation_files[0]}: {count} of {images} images have an annotation, "
            f"{annotated} in the published COCO {year}; get the file anew or add --nocheck_counts"
        )
    return source


def _only_year(dataset: str, source: Path) -> str:
    """The year whose files `source` holds; the default of the dataset if there is none."""
    if dataset == "coco":
        found = [
            year
            for year in ("2014", "2017")
            if any(
                coco.annotation_file(source, "instances", part, year).is_file()
                for part in ("train", "val")
            )
        ]
        other = any((source / name).is_dir() for name in ("JPEGImages", "VOCdevkit", "ImageSets"))
    else:
        found = []
        for year in voc.YEARS:
            with contextlib.suppress(UserError):
                voc.find_folder(source, year)
                found.append(year)
        other = (source / "annotations").is_dir()
    if not found and other:
        right = next(name for name in DATASETS if name != dataset)
        raise UserError(f"{source} does not look like {dataset}; is --dataset={right} meant?")
    # A folder that holds VOC's files itself does not say its year.
    if len(found) > 1:
        raise UserError(f"{source} may be {' or '.join(found)}; say --year")
    return found[0] if found else {"coco": "2017", "voc": "2007"}[dataset]


def _file_hashes(root: Path, sources: Iterable[coco.CocoImages | voc.VocImages]) -> dict[str, str]:
    """File below `root` -> SHA-256; the XML files of a folder count as one."""
    digests: dict[str, Any] = {}
    for source in sources:
        for path in source.annotation_files:
            named = path.with_name("*.xml") if path.suffix == ".xml" else path
            digest = digests.setdefault(named.relative_to(root).as_posix(), hashlib.sha256())
            digest.update(path.read_bytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def check_same(out: Path, metadata: Mapping[str, Any], source_sha256: str) -> None:
    """Raises UserError if `out` was prepared from other data than that of the hash."""
    if metadata["source_sha256"] != source_sha256:
        raise UserError(
            f"{out} was prepared from another source (other samples, labels, splits or options); "
            "give another --out or delete it"
        )


def check_empty(out: Path) -> None:
    """Raises UserError if `out` exists and is no empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; give another --out")


@contextlib.contextmanager
def whole_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """An empty folder beside `out`, for this process alone; it is gone afterwards."""
    workspace = out.parent / f".{out.name}.incomplete"
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        lock = os.open(workspace, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out: {error.filename}: {error.strerror}") from error
    try:
        # The system gives the lock back when a process dies, however that happens.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UserError(f"another process is preparing {out}") from error
    try:
        for path in workspace.iterdir():  # what a killed process left
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        free = shutil.disk_usage(workspace).free
        if num_bytes > free:
            raise UserError(
                f"--out: {out} needs {num_bytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB"
            )
        yield workspace
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EBUSY, errno.EXDEV):
            raise
        raise UserError(f"--out: {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
        os.close(lock)


def _refuse_missing(split: Split) -> None:
    names = [path.name for path, size in zip(split.paths, split.sizes, strict=True) if size < 0]
    if names:
        raise UserError(
            f"{split.paths[0].parent} lacks {len(names)} of the {len(split.paths)} {split.name} "
            f"images: {_some(names)}; get them again"
        )


def _refuse_bad(splits: Iterable[Split], skip_bad: bool) -> None:
    for split in splits:
        if split.bad and not skip_bad:
            raise UserError(
                f"{len(split.bad)} of {len(split.paths)} {split.name} images cannot be decoded: "
                f"{_some(split.bad)}; get them again, or leave them out with --skip_bad"
            )
        if not split.kept:
            raise UserError(f"not one of the {split.name} images can be decoded")


def _finish(folder: Path, split: Split, report: Report) -> dict[str, Any]:
    """Reads the records of one split back, writes its index; what prepared.json says of it."""
    source, kept = split.source, split.kept
    records = Records(folder, split.name)
    expected = split.content_sha256()
    if content_sha256(read_back(records, split.name, report)) != expected:
        raise UserError(
            f"the {split.name} records differ from the images they were made of: the disk or the "
            "memory is faulty, or the images were changed meanwhile; run the command again"
        )
    labels = source.labels[kept]
    captions = [source.captions(row) for row in kept]
    file_rows = np.asarray(source.file_rows)[kept]
    index = index_of([source.ids[row] for row in kept], labels, file_rows, captions)
    content = json.dumps(index).encode()
    index_path(folder, split.name).write_bytes(content)
    return {
        "images": len(kept),
        "labelled": int((labels > 0).any(axis=1).sum()),
        "captions": sum(map(len, captions)),
        "positives": dict(zip(source.class_names, (labels > 0).sum(axis=0).tolist(), strict=True)),
        "difficult_only": int((labels == 0).sum()),
        "skipped": split.bad,
        "num_file_rows": source.num_file_rows,
        "sha256": expected,
        "index_sha256": hashlib.sha256(content).hexdigest(),
    }


def _some(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

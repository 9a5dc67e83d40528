"""Prepares data for training: ArrayRecord files, every image decoded once and checked.

python launch/prepare.py --dataset=coco --source=COCO --out=prepared/coco2014 --year=2014
python launch/prepare.py --dataset=pairs --source=webdataset:/data/cc3m --out=prepared/cc3m

"pairs" are images with captions of any dataset that has both, written as DATASET:ROOT; what cannot
be used is left out and counted.

Afterwards data.root may be the folder --out. A preparation that was interrupted starts anew.
"""

import json
import sys
from typing import Any

import cli
from absl import flags
from tqdm import tqdm

from trm_jax.data import prepare, prepare_pairs
from trm_jax.train.preemption import Preempted, StopRequest
from trm_jax.types import UserError

_DATASET = flags.DEFINE_enum(
    "dataset", None, (*prepare.DATASETS, prepare_pairs.DATASET), "What to make", required=True
)
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Folder of the dataset in its official layout; of pairs DATASET:ROOT, as webdataset:/data/cc3m",
    required=True,
)
_OUT = flags.DEFINE_string("out", None, "Folder to make", required=True)
_YEAR = flags.DEFINE_string("year", "", "Of the dataset; by default the one that the source holds")
_SPLIT = flags.DEFINE_list(
    "split", [], "train, test or both; by default both, of pairs the training split alone"
)
_OPTIONS = flags.DEFINE_string(
    "options", "{}", 'Of pairs: data.options of the source as JSON, {"caption_key": "caption"}'
)
_SKIP_BAD = flags.DEFINE_boolean("skip_bad", False, "Leave out images that cannot be decoded")
_CHECK_COUNTS = flags.DEFINE_boolean(
    "check_counts", True, "Refuse a whole split whose labels are not those published"
)
# Images between two plain lines.
_EVERY = 10_000


class Progress:
    """A bar on a terminal, a line now and then elsewhere; raises Preempted after a signal."""

    def __init__(self, stop: StopRequest):
        self._stop = stop
        self._stdout = sys.stdout
        self._terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._phase = ("", "")

    def __call__(self, phase: str, split: str, done: int, total: int) -> None:
        if self._stop.requested:
            raise Preempted("stopped by a signal: nothing was prepared; run the command again")
        if (phase, split) != self._phase:
            self.close()
            self._phase = (phase, split)
            if self._terminal:
                self._bar = tqdm(total=total, desc=f"{phase} {split}", unit="image")
        if self._bar is not None:
            self._bar.update()
        elif done % _EVERY == 0:
            print(f"{phase} {split}: {done:,} of {total:,}", file=self._stdout, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def main(arguments: list[str]) -> None:
    """Prepares the dataset and says what it holds."""
    cli.no_arguments(arguments)
    pairs = _DATASET.value == prepare_pairs.DATASET
    wanted = _SPLIT.value if _SPLIT.present else (["train"] if pairs else ["train", "test"])
    splits = [name for name in ("train", "test") if name in wanted]
    unknown = sorted(set(wanted) - set(splits))
    if unknown or not splits:
        raise UserError(f"--split={','.join(unknown)}: it is train, test or train,test")
    with StopRequest() as stop:
        progress = Progress(stop)
        try:
            metadata, there = (_prepare_pairs if pairs else _prepare)(splits, progress)
        except UserError as error:
            # The readers speak of a run's fields, this command has flags.
            text = str(error).replace("data.root", "--source").replace("data.options.", "--")
            raise UserError(text) from error
        finally:
            progress.close()
    for name, facts in metadata["splits"].items():
        if pairs:
            _describe_pairs(name, facts)
        else:
            whole = prepare.official_images(metadata["dataset"], metadata["year"], name)
            _describe(name, facts, whole)
    verb = "holds this already; nothing to do" if there else "is ready"
    year = "" if pairs else f"--config.data.options.year={metadata['year']} "
    print(
        f"{_OUT.value} {verb}: --config.data.dataset={metadata['dataset']} "
        f"{year}--config.data.root={_OUT.value}"
    )


def _prepare(splits: list[str], progress: Progress) -> tuple[dict[str, Any], bool]:
    return prepare.prepare(
        _DATASET.value,
        _SOURCE.value,
        _OUT.value,
        year=_YEAR.value,
        splits=splits,
        skip_bad=_SKIP_BAD.value,
        check_counts=_CHECK_COUNTS.value,
        report=progress,
    )


def _prepare_pairs(splits: list[str], progress: Progress) -> tuple[dict[str, Any], bool]:
    dataset, colon, root = _SOURCE.value.partition(":")
    if not colon:
        raise UserError(f"--source={_SOURCE.value}: for pairs it is DATASET:ROOT")
    try:
        options = json.loads(_OPTIONS.value)
    except ValueError as error:
        raise UserError(f"--options={_OPTIONS.value} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"--options={_OPTIONS.value} is no JSON object")
    return prepare_pairs.prepare_pairs(
        dataset, root, _OUT.value, options=options, splits=splits, report=progress
    )


def _describe(name: str, facts: dict, whole: int) -> None:
    """A line about one split."""
    print(
        f"{name}: {facts['images']:,} images"
        + ("" if whole in (0, facts["num_file_rows"]) else f" (the whole split has {whole:,})")
        + (f", {len(facts['skipped'])} skipped" if facts["skipped"] else "")
        + f", {facts['labelled']:,} with a label, {sum(facts['positives'].values()):,} positives, "
        + f"{facts['captions']:,} captions, sha256 {facts['sha256']}"
    )


def _describe_pairs(name: str, facts: dict) -> None:
    """A line about one split of pairs."""
    print(
        f"{name}: {facts['images']:,} images, {facts['captions']:,} captions, "
        f"{facts['skipped']:,} skipped, sha256 {facts['sha256']}"
    )


if __name__ == "__main__":
    cli.run(main)

"""The input pipeline: examples to host-local numpy batches, on grain.

The position in the data is the global step. Step s of a run takes the rows s*B .. (s+1)*B of an
endless stream of epochs, each a seeded permutation that every process derives for itself; process p
of P reads the rows [p*B/P, (p+1)*B/P) of each batch. The random numbers of a sample are keyed by
(seed, epoch, place in the epoch). So a batch depends on neither the number of workers nor of
processes, and a run may start at any step at no cost and on another number of hosts.
"""

import contextlib
import dataclasses
import functools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import cv2
import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from trm_jax.data.examples import Examples, Sample
from trm_jax.types import BadSampleError, UserError

_MAX_THREADS = 16


@runtime_checkable
class Croppable(Examples, Protocol):
    """Examples of a few declared lengths: what no example of a batch fills is cut off."""

    def crop(self, batch: Sample, positions: Sequence[int]) -> Sample:
        """Part of a batch, cut as the examples at `positions`, the whole batch, allow."""
        ...


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Full batches in one epoch; UserError if there is not one."""
    if batch_size < 1:
        raise UserError(f"data.batch_size is {batch_size}; it must be at least 1")
    if num_examples < batch_size:
        raise UserError(
            f"data.batch_size {batch_size} is larger than the {num_examples} training examples"
        )
    return num_examples // batch_size


def position(place: int, num_examples: int, *, seed: int, epoch: int) -> int:
    """The position of the example at `place` of the shuffled epoch; both in [0, num_examples)."""
    return index_shuffle(place, max_index=num_examples - 1, seed=_epoch_seed(seed, epoch), rounds=4)


def train_batches(
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterator[Sample]:
    """Yields the `num_steps` batches of the steps start_step, start_step + 1, ...

    batch_size: B, over all processes; a batch here has B / process_count rows.
    seed: of the permutations and of every sample's random numbers.
    workers: decoding processes; 0 decodes in threads of this process. For photos threads are the
    faster of the two: OpenCV does not hold Python's lock, and no batch crosses into shared memory.

    A sample that raises BadSampleError becomes a blank with valid=False and its index kept; any
    other exception is raised here. Raises UserError if an epoch has not one full batch, or if the
    processes cannot share a batch evenly. Close the iterator if you leave it early.
    """
    per_epoch = steps_per_epoch(len(examples), batch_size)
    rows = _local_rows(batch_size, process_index, process_count)

    load = _TrainLoader(examples, batch_size, seed, start_step, per_epoch, rows)
    batches = _batches(load, num_batches=num_steps, rows=len(rows), workers=workers)
    return _cropped(examples, batches, lambda number: load.positions(start_step + number))


def eval_batches(
    examples: Examples,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterator[Sample]:
    """Yields every example once, in order; rows that fill up the last batch have index -1.

    All processes yield the same number of batches. Bad samples and errors as in `train_batches`;
    padding and bad samples have valid=False.
    """
    if batch_size < 1:
        raise UserError(f"the evaluation batch size is {batch_size}; it must be at least 1")
    rows = _local_rows(batch_size, process_index, process_count)

    load = _EvalLoader(examples, batch_size, rows)
    num_batches = -(-len(examples) // batch_size)
    batches = _batches(load, num_batches=num_batches, rows=len(rows), workers=workers)

    def positions(number: int) -> Sequence[int]:
        return range(number * batch_size, min((number + 1) * batch_size, len(examples)))

    return _cropped(examples, batches, positions)


def _cropped(
    examples: Examples, batches: Iterator[Sample], positions: Callable[[int], Sequence[int]]
) -> Iterator[Sample]:
    """The batches, cut where the examples can; every process cuts by the whole batch, alike."""
    if not isinstance(examples, Croppable):
        return batches
    return _cut(examples, batches, positions)


def _cut(examples: Croppable, batches, positions) -> Iterator[Sample]:
    with contextlib.closing(batches):
        for number, batch in enumerate(batches):
            yield examples.crop(batch, positions(number))


# Classes rather than closures: grain pickles them to its workers, and a closure would take the
# module's native functions along.
@dataclasses.dataclass(frozen=True)
class _TrainLoader:
    """Sample `number` of this process, counted from the first row of start_step."""

    examples: Examples
    batch_size: int
    seed: int
    start_step: int
    steps_per_epoch: int
    rows: range

    def __call__(self, number: int) -> Sample:
        epoch, first = self._epoch(self.start_step + number // len(self.rows))
        place = first + self.rows[number % len(self.rows)]
        return _load(self.examples, self._position(epoch, place), (self.seed, epoch, place))

    def positions(self, step: int) -> list[int]:
        """Those of the whole batch of a step."""
        epoch, first = self._epoch(step)
        return [self._position(epoch, first + row) for row in range(self.batch_size)]

    def _epoch(self, step: int) -> tuple[int, int]:
        """(epoch of a step, place in it of the step's first example)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_in_epoch * self.batch_size

    def _position(self, epoch: int, place: int) -> int:
        return position(place, len(self.examples), seed=self.seed, epoch=epoch)


@dataclasses.dataclass(frozen=True)
class _EvalLoader:
    """Sample `number` of this process; a blank of index -1 behind the last example."""

    examples: Examples
    batch_size: int
    rows: range

    def __call__(self, number: int) -> Sample:
        place = number // len(self.rows) * self.batch_size + self.rows[number % len(self.rows)]
        if place >= len(self.examples):
            return self.examples.blank(-1)
        return _load(self.examples, place, (0, 0, place))


def _local_rows(batch_size: int, process_index: int, process_count: int) -> range:
    if batch_size % process_count:
        raise UserError(
            f"data.batch_size {batch_size} does not divide evenly among {process_count} processes"
        )
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed: int, epoch: int) -> int:
    """32 bits from (seed, epoch): neighbouring seeds and epochs share no permutation."""
    return int(np.random.SeedSequence(_words(seed, epoch)).generate_state(1)[0])


def _words(*numbers: int) -> list[int]:
    """Non-negative integers for a SeedSequence; a negative seed wraps round."""
    return [number % 2**64 for number in numbers]


def _load(examples: Examples, position: int, key: tuple[int, int, int]) -> Sample:
    """One sample, or a blank in the place of a bad one."""
    try:
        return examples.sample(position, np.random.default_rng(_words(*key)))
    except BadSampleError:
        return examples.blank(position)


def _batches(
    load: Callable[[int], Sample], *, num_batches: int, rows: int, workers: int
) -> Iterator[Sample]:
    """Yields load(0) .. load(num_batches * rows - 1), stacked `rows` at a time."""
    if workers < 0:
        raise UserError(f"data.workers is {workers}; it must be 0 or more")
    numbers = grain.MapDataset.range(num_batches * rows)
    if workers == 0:
        threads = min(_MAX_THREADS, os.cpu_count() or 1)
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(2 * rows, threads)
        )
        dataset = numbers.map(load).to_iter_dataset(options).batch(rows)
    else:
        # Batched before the processes share the work, so that a batch has the same rows for any
        # number of them; each reads its samples one after the other.
        if not flags.FLAGS.is_parsed():
            # Grain's worker processes read absl flags, which a notebook or a test never parses.
            flags.FLAGS.mark_as_parsed()
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        dataset = numbers.map(_Portable(load)).batch(rows).to_iter_dataset(options)
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=max(1, min(workers, num_batches)), per_worker_buffer_size=2
            ),
            worker_init_fn=_init_worker,
        )
    return _closing(dataset)


def _closing(dataset: grain.IterDataset) -> Iterator[Sample]:
    """Iterates and, however it ends, stops the threads or processes behind."""
    iterator = iter(dataset)
    try:
        for batch in iterator:
            # Copied out of the workers' shared memory, which is unmapped when grain's arrays are
            # collected: jax may still be reading a batch then.
            yield {
                name: array if type(array) is np.ndarray else np.array(array)
                for name, array in batch.items()
            }
    finally:
        iterator.close()


def _init_worker(index: int, count: int) -> None:
    del index, count
    # One thread per process: OpenCV's own pool would oversubscribe the cores.
    cv2.setNumThreads(0)


class _Portable:
    """Raises only exceptions that survive the way from a worker to this process.

    One that cannot be pickled would be lost in the worker's queue and the reader would wait for
    ever.
    """

    def __init__(self, load: Callable[[int], Sample]):
        self._load = load

    def __call__(self, number: int) -> Sample:
        try:
            return self._load(number)
        except Exception as error:
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # noqa: BLE001 (a foreign __reduce__ may raise anything)
                raise RuntimeError(f"{type(error).__name__}: {error}") from None
            raise

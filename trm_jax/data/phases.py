"""Batch sizes that change during a run: which step belongs to which epoch, and its batches."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trm_jax.data import pipeline
from trm_jax.data.examples import Examples, Sample
from trm_jax.types import UserError


class Phase(NamedTuple):
    """Epochs of one batch size; `first_step` and `first_epoch` count from the start of the run."""

    first_step: int
    first_epoch: int
    batch_size: int
    steps_per_epoch: int


class Phases(NamedTuple):
    """All of a run: its phases in order, and its number of steps."""

    phases: tuple[Phase, ...]
    total_steps: int

    def at(self, step: int) -> Phase:
        """The phase of a step."""
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` is the last one of its epoch."""
        phase = self.at(step)
        return (step + 1 - phase.first_step) % phase.steps_per_epoch == 0

    def step_of(self, epoch: float) -> int:
        """The step at which an epoch, or a part of one, has passed, rounded."""
        phase = next(p for p in reversed(self.phases) if p.first_epoch <= max(epoch, 0))
        return phase.first_step + round((epoch - phase.first_epoch) * phase.steps_per_epoch)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Each batch size once."""
        return tuple(dict.fromkeys(phase.batch_size for phase in self.phases))


def plan(
    num_examples: int,
    *,
    batch_size: int,
    epochs: int,
    steps: int | None = None,
    schedule: Sequence[Sequence[int]] = (),
) -> Phases:
    """The phases of a run.

    Args:
      num_examples: of an epoch; what does not fill its last batch is left out.
      batch_size: of all steps where there is no schedule.
      epochs: of the run.
      steps: of the run; they win where they are given.
      schedule: (epochs, batch size) one after the other; the last one holds until the end.

    Raises:
      UserError: an epoch has not one full batch, the schedule is no list of such pairs, or there
        is neither an epoch nor a step.
    """
    pairs = [tuple(pair) for pair in schedule]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise UserError(
            f"data.batch_size_schedule={tuple(pairs)} must be pairs (epochs, batch size), such as "
            "((200, 4096), (200, 2048))"
        )
    if not steps and epochs < 1:
        raise UserError(f"train.epochs is {epochs}; it must be at least 1, or give train.steps")
    phases, step, epoch = [], 0, 0
    for length, size in pairs or [(epochs, batch_size)]:
        per_epoch = pipeline.steps_per_epoch(num_examples, size)
        phases.append(Phase(step, epoch, size, per_epoch))
        step, epoch = step + length * per_epoch, epoch + length
    run = Phases(tuple(phases), 0)
    return run._replace(total_steps=steps if steps else run.step_of(epochs))


def train_batches(
    examples: Examples,
    run: Phases,
    *,
    seed: int,
    start_step: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Sample]:
    """Yields the batches of the steps start_step .. of the run; see `pipeline.train_batches`."""
    ends = [phase.first_step for phase in run.phases[1:]] + [run.total_steps]
    for phase, end in zip(run.phases, ends, strict=True):
        start, end = max(start_step, phase.first_step), min(end, run.total_steps)
        if start >= end:
            continue
        # Counted as if all epochs before had this phase's number of steps: the permutation of an
        # epoch follows from its number.
        before = phase.first_epoch * phase.steps_per_epoch - phase.first_step
        yield from pipeline.train_batches(
            examples,
            batch_size=phase.batch_size,
            seed=seed,
            start_step=before + start,
            num_steps=end - start,
            workers=workers,
            process_index=process_index,
            process_count=process_count,
        )

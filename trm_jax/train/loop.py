"""The one training loop: batches in, updates, logs, evaluations, checkpoints, exact resume."""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from trm_jax.train import checkpoints, distributed, metrics, paths, sharding, state, step
from trm_jax.train.bad_samples import BadSamples
from trm_jax.train.preemption import Preempted, StopRequest
from trm_jax.train.state import TrainState
from trm_jax.types import Batch, Method, PyTree, UserError, check_batch


class Job(NamedTuple):
    """All that a run needs, built from a config by train/experiment.py.

    batches: start step -> iterator of host batches; refresh_batches: -> the training set in a
    fixed order; evaluate: (params, extras) -> metrics of `eval_split`; ends_epoch: of a step.
    """

    method: Method
    init: Callable[[], tuple[PyTree, PyTree]]
    make_optimizer: Callable[[PyTree], optax.GradientTransformation]
    schedule: Callable[[Any], Any]  # step -> learning rate
    batches: Callable[[int], Iterator[Batch]]
    refresh_batches: Callable[[], Iterator[Batch]]
    evaluate: Callable[[PyTree, PyTree], dict[str, float]]
    eval_split: str
    num_train: int
    name_of: Callable[[int], str]
    freeze: tuple[str, ...]
    shard: tuple[str, ...]
    seed: int
    total_steps: int
    ends_epoch: Callable[[int], bool]
    batch_sizes: tuple[int, ...]
    microbatch: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep: int
    nan_policy: str
    ema: float
    clip: float
    max_bad_fraction: float


class Run:
    """A job on a workdir and a mesh; `prepare` makes or restores the state, `train` runs it."""

    def __init__(
        self, job: Job, workdir: Path, mesh: jax.sharding.Mesh, *, read_only: bool = False
    ):
        self.job, self.workdir, self.mesh = job, workdir, mesh
        for size in job.batch_sizes:
            sharding.check_batch_size(size, mesh)
        if job.microbatch and not job.method.decomposes:
            raise UserError(
                "train.microbatch: this method's loss looks at the whole batch, so splitting it "
                "would change the result; set train.microbatch=0"
            )
        for size in job.batch_sizes:
            if job.microbatch and size % job.microbatch:
                raise UserError(
                    f"train.microbatch={job.microbatch} does not divide data.batch_size={size}"
                )
        self.key = jax.random.key(job.seed)
        self.files = checkpoints.Checkpoints(workdir, keep=job.keep, read_only=read_only)
        self.bad = BadSamples(job.num_train, job.max_bad_fraction, job.name_of)

    def prepare(self) -> TrainState:
        """The state at step 0, or of the newest checkpoint of the workdir."""
        job = self.job
        first = sharding.put_batch(next(self._batches(0)), self.mesh)
        params, extras = job.init()
        trained, frozen = paths.split(params, job.freeze, field="optimizer.freeze")
        self.optimizer = job.make_optimizer(trained)
        self.counts = {"trained": _size(trained), "frozen": _size(frozen)}
        self.frozen_hash = checkpoints.hash_frozen(frozen, trained)
        sums = state.zero_sums(job.method, params, extras, first, self.key, clip=job.clip)
        fresh = state.create(trained, frozen, extras, self.optimizer, ema=job.ema > 0, sums=sums)
        placed = sharding.state_shardings(fresh, self.optimizer, self.mesh, job.shard)
        self.resumed_from = self.files.latest_step()
        if self.resumed_from is None and self.files.read_only:
            raise UserError(f"{self.workdir} holds no finished checkpoint; train there first")
        if self.resumed_from is None:
            current = jax.tree.map(distributed.place, fresh, placed)
            self.files.save_frozen(current.frozen)
            current = self._refresh(current)
        else:
            current = self.files.restore(fresh, placed, self.resumed_from)
            current = current.replace(frozen=self.files.restore_frozen(fresh.frozen, placed.frozen))
        self._step = self._compile(placed)
        return current

    def train(self, current: TrainState, writer: metrics.MetricsWriter) -> TrainState:
        """Runs to the last step, or raises Preempted after a checkpoint when a signal asks."""
        job, start = self.job, int(current.step)
        evaluated: dict[str, float] | None = None
        with StopRequest() as stop, jax.set_mesh(self.mesh):
            clock, vote = time.monotonic(), distributed.StopVote(self.mesh)
            batches = itertools.islice(self._batches(start), job.total_steps - start)
            for number, batch in enumerate(_ahead(batches, self.mesh), start):
                frozen, current = current.frozen, current.replace(frozen=None)
                current = self._step(current, frozen, batch).replace(frozen=frozen)
                writer.advance()
                if job.ends_epoch(number):
                    current = self._refresh(current)
                last, stopping = number + 1 == job.total_steps, vote(stop.requested)
                if (number + 1) % job.log_every == 0 or last:
                    current = self._log(current, number + 1, writer, clock)
                    clock = time.monotonic()
                evaluated = None
                if last:  # before it is evaluated, so that a mistake in the test data loses nothing
                    self.files.save(current)
                if (number + 1) % job.eval_every == 0 or last:
                    evaluated = self.evaluate(current)
                    writer.write(number + 1, job.eval_split, evaluated)
                    clock = time.monotonic()
                if ((number + 1) % job.checkpoint_every == 0 or stopping) and not last:
                    self.files.save(current)
                if stopping and not last:
                    self.files.close()
                    raise Preempted(f"stopped at step {number + 1}; checkpoint saved")
        evaluated = evaluated or self.evaluate(current)
        writer.write(job.total_steps, job.eval_split, writer.with_best(evaluated), final=True)
        self.files.close()
        return current

    def evaluate(self, current: TrainState) -> dict[str, float]:
        """The evaluators' metrics, on the moving average of the weights if there is one."""
        with jax.set_mesh(self.mesh):
            return self.job.evaluate(self.weights(current), current.extras)

    def weights(self, current: TrainState) -> PyTree:
        """The full params to predict with: the moving average where there is one."""
        return paths.merge(current.ema or current.params, current.frozen)

    def _compile(self, placed: TrainState) -> Callable:
        function = step.make_train_step(
            self.job.method,
            self.optimizer,
            key=self.key,
            ema_decay=self.job.ema,
            microbatch=self.job.microbatch,
            clip=self.job.clip,
        )
        out = placed.replace(frozen=None)
        return jax.jit(function, donate_argnums=0, out_shardings=out)

    def _refresh(self, current: TrainState) -> TrainState:
        if self.job.method.refresh is None:
            return current
        with jax.set_mesh(self.mesh):
            params = paths.merge(current.params, current.frozen)
            batches = (sharding.put_batch(b, self.mesh) for b in self.job.refresh_batches())
            return current.replace(extras=self.job.method.refresh(params, current.extras, batches))

    def _log(
        self, current: TrainState, number: int, writer: metrics.MetricsWriter, since: float
    ) -> TrainState:
        self.bad.share()
        values = metrics.summarize(current.sums)
        values["learning_rate"] = float(self.job.schedule(np.int32(number - 1)))
        values["seconds"] = round(time.monotonic() - since, 3)
        writer.write(number, "train", values)
        skipped = values.get("skipped", 0.0)
        if skipped and (self.job.nan_policy == "stop" or skipped == 1.0):
            self.files.close()
            raise FloatingPointError(
                f"step {number}: {skipped:.0%} of the last steps had a loss or gradient that is "
                "not finite; lower optimizer.learning_rate (train.nan_policy='skip' goes on as "
                "long as some steps are finite)"
            )
        return current.replace(sums=metrics.zeros(current.sums))

    def _batches(self, start: int) -> Iterator[Batch]:
        for batch in self.job.batches(start):
            check_batch(batch, self.job.method.specs["train"])
            self.bad.count(batch)
            yield batch


def _ahead(batches: Iterator[Batch], mesh: jax.sharding.Mesh) -> Iterator[Batch]:
    """The batches on the devices, one batch ahead, so that transfers overlap with the step."""
    queue = (sharding.put_batch(batch, mesh) for batch in batches)
    upcoming = next(queue, None)
    while upcoming is not None:
        batch, upcoming = upcoming, next(queue, None)
        yield batch


def _size(tree: PyTree) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))

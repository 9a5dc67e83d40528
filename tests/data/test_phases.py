"""Batch sizes that change during a run: every epoch shows every example, resume is exact."""

import numpy as np
import pytest

from trm_jax.data import phases, pipeline
from trm_jax.types import UserError


class _Numbers:
    """Examples that are their positions."""

    def __len__(self):
        return 12

    def sample(self, position, rng):
        return {"index": np.asarray(position, np.int32), "valid": np.asarray(True)}

    def blank(self, position):
        return {"index": np.asarray(position, np.int32), "valid": np.asarray(False)}


SCHEDULE = ((2, 4), (1, 6), (1, 3))


def _indices(run, start=0):
    batches = phases.train_batches(_Numbers(), run, seed=3, start_step=start)
    return [batch["index"].tolist() for batch in batches]


def test_every_epoch_of_every_phase_shows_each_example_once():
    run = phases.plan(12, batch_size=99, epochs=5, schedule=SCHEDULE)
    assert run.total_steps == 3 + 3 + 2 + 4 + 4 and run.batch_sizes == (4, 6, 3)
    found = _indices(run)
    assert [len(batch) for batch in found] == [4] * 6 + [6] * 2 + [3] * 8
    ends = [step for step in range(run.total_steps) if run.ends_epoch(step)]
    assert ends == [2, 5, 7, 11, 15]
    epochs = np.split(np.arange(len(found)), np.asarray(ends[:-1]) + 1)
    orders = [sum((found[step] for step in epoch), []) for epoch in epochs]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)  # no epoch repeats another
    for start in (1, 6, 7, 13):
        assert _indices(run, start) == found[start:]


def test_one_size_is_the_pipelines_own_order():
    run = phases.plan(12, batch_size=4, epochs=2)
    plain = pipeline.train_batches(_Numbers(), batch_size=4, seed=3, num_steps=6)
    assert _indices(run) == [batch["index"].tolist() for batch in plain]
    assert phases.plan(12, batch_size=4, epochs=2, steps=4).total_steps == 4


def test_steps_of_epochs():
    run = phases.plan(12, batch_size=99, epochs=5, schedule=SCHEDULE)
    assert [run.step_of(epoch) for epoch in (0, 1, 2, 2.5, 3, 4, 5)] == [0, 3, 6, 7, 8, 12, 16]
    cut = phases.plan(12, batch_size=99, epochs=5, steps=7, schedule=SCHEDULE)
    assert _indices(cut) == _indices(run)[:7]


@pytest.mark.parametrize("schedule", [((0, 4),), ((1, 4, 2),), ((2, -1),)])
def test_a_schedule_that_is_none(schedule):
    with pytest.raises(UserError, match="data.batch_size_schedule=.* must be pairs"):
        phases.plan(12, batch_size=4, epochs=2, schedule=schedule)
    with pytest.raises(UserError, match="larger than the 12 training examples"):
        phases.plan(12, batch_size=4, epochs=2, schedule=((1, 13),))


@pytest.mark.parametrize(
    ("size", "epochs", "told"), [(0, 2, "data.batch_size is 0"), (4, 0, "train.epochs is 0")]
)
def test_without_a_schedule_the_wrong_field_is_named(size, epochs, told):
    with pytest.raises(UserError, match=told):
        phases.plan(8, batch_size=size, epochs=epochs, steps=0, schedule=())

"""The roll call on real sockets, the finding of a cluster, and agreement with a pretended store."""

import json
import os
import socket
import threading
import time

import jax
import numpy as np
import pytest

from tests import tiny
from trm_jax.train import distributed, roll_call
from trm_jax.train.bad_samples import BadSamples
from trm_jax.train.roll_call import Missing, Place
from trm_jax.types import UserError

HOST = socket.gethostname()


@pytest.fixture
def port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def _answer(*places, timeout=5.0):
    """What each process's roll call raised, by number; None where it returned."""
    ends = {}

    def run(place):
        try:
            ends[place.index] = roll_call.answer(place, timeout)
        except (Missing, UserError) as error:
            ends[place.index] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(ends) == len({place.index for place in places})
    return ends


def _places(port, *indices, count=3, **keywords):
    return [Place(f"localhost:{port}", count, index, **keywords) for index in indices]


def test_all_go_on_together_and_the_port_is_free_at_once(port):
    for _ in range(2):
        assert _answer(*_places(port, 2, 0, 1)) == {0: None, 1: None, 2: None}


def test_the_absent_are_named_to_all_who_came(port):
    started = time.monotonic()
    ends = _answer(*_places(port, 0, 2, hosts=("a", "b", "c")), timeout=0.6)
    assert 0.5 < time.monotonic() - started < 4
    text = (
        f"1 of 3 processes did not show up within 0.6 s: 1 on b (there: 0 on {HOST}, 2 on {HOST}); "
        "start them, or raise --start_timeout"
    )
    assert {index: str(error) for index, error in ends.items()} == {0: text, 2: text}
    assert all(isinstance(error, Missing) for error in ends.values())


def test_without_process_0_the_others_say_where_they_looked(port):
    ends = _answer(*_places(port, 1), timeout=0.3)
    assert str(ends[1]) == (
        f"process 0 did not answer at localhost:{port} within 0.3 s; check that it runs, and that "
        f"{HOST} (process 1) can reach it"
    )


def test_strangers_are_ignored_and_a_process_may_come_again(port):
    result = {}
    zero = threading.Thread(
        target=lambda: result.update(_answer(*_places(port, 0, count=2))), daemon=True
    )
    zero.start()
    word = json.dumps({"process": 1, "of": 2, "host": "elsewhere"}).encode()
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b""):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(("localhost", port)) as line:
                    line.sendall(text)
                break
            except OSError:
                time.sleep(0.02)
    assert not result and zero.is_alive()
    with socket.create_connection(("localhost", port)) as line:
        line.sendall(word + b"\n")
        assert json.loads(line.recv(100)) == {"go": True}
    zero.join(5)
    assert result == {0: None}


def test_contradictions_are_told_to_both_sides(port):
    other = Place(f"localhost:{port}", 4, 3)
    ends = _answer(*_places(port, 0, count=2), other)
    assert "process 3 on" in str(ends[0]) and "expects 4 processes, not 2" in str(ends[0])
    assert isinstance(ends[0], UserError) and str(ends[3]) in str(ends[0])


def test_a_taken_port_is_named(port):
    with socket.create_server(("", port)):
        ends = _answer(*_places(port, 0))
    assert f"process 0 cannot listen at port {port}" in str(ends[0])


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "a.b:1234",
    "JAX_NUM_PROCESSES": "3",
    "JAX_PROCESS_ID": "2",
}


def _find(monkeypatch, variables):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JAX_", "TPU_", "CUDA_", "JOB_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return roll_call.find(1.0)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (EXPLICIT, Place("a.b:1234", 3, 2)),
        (EXPLICIT | {"TPU_WORKER_HOSTNAMES": "x,y,z"}, Place("a.b:1234", 3, 2, None, tuple("xyz"))),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1"}, None),
        # jax's port: 4097 % 4096 beyond the last 4096 ports; one device for each task of a node
        (SLURM, Place("node07:61441", 4, 3, (1,))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, Place("node07:61441", 4, 3)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "4,5"}, Place("node07:61441", 4, 3, (1,))),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, Place("node07:61441", 4, 3)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "ib07:99"}, Place("ib07:99", 4, 3, (1,))),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        # the batch script itself, and a step of one task, are no processes of a larger run
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NUM_TASKS"}, None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_a_process_finds_its_place(monkeypatch, variables, expected):
    assert _find(monkeypatch, variables) == expected


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID= must be a whole number"),
        ({"JAX_PROCESS_ID": "3"}, "JAX_PROCESS_ID=3 must be at least 0 and below"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two must be a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "a.b"}, "JAX_COORDINATOR_ADDRESS=a.b must be HOST:PORT"),
    ],
)
def test_variables_that_cannot_be_are_named(monkeypatch, variables, text):
    with pytest.raises(UserError, match=text):
        _find(monkeypatch, EXPLICIT | variables)


def test_variables_that_are_missing_are_named(monkeypatch):
    with pytest.raises(
        UserError, match="JAX_PROCESS_ID is set, but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"
    ):
        _find(monkeypatch, {"JAX_PROCESS_ID": "0"})


class _Store:
    """A key-value store in which process 0 has spoken already."""

    def __init__(self, first):
        self._first = first

    def blocking_key_value_get(self, key, timeout_in_ms):
        del key, timeout_in_ms
        return json.dumps(self._first)

    def wait_at_barrier(self, name, timeout_in_ms):
        """All are there."""


def _as_second_of_two(monkeypatch, first):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed, "_client", lambda: _Store(first))


def test_agreement_names_what_differs(monkeypatch):
    distributed.agree("a config", {"a": 1})  # one process agrees with itself
    _as_second_of_two(monkeypatch, {"a": "1", "b": "2", "c": "3"})
    distributed.agree("a config", {"a": 1, "b": 2, "c": "3"})
    with pytest.raises(UserError) as info:
        distributed.agree("a config", {"a": 1, "b": 5, "d": None})
    assert str(info.value).startswith(
        "process 0 has a config of its own: b (5 here, 2 there), c (absent here, 3 there), "
        "d (None here, absent there); start all processes"
    )


def test_a_workdir_that_is_not_shared_is_refused(monkeypatch, tmp_path):
    _as_second_of_two(monkeypatch, "token")
    monkeypatch.setattr(distributed.time, "monotonic", iter(range(0, 100, 40)).__next__)
    with pytest.raises(UserError, match=f"is not the same folder on all hosts: {HOST}"):
        distributed.check_shared(tmp_path)


def _gathering(monkeypatch, *others):
    """process_allgather among this process and `others`, each a set of numbers."""

    def gather(mine):
        if mine.ndim == 0:
            return np.array([mine, *map(len, others)])
        padded = [np.r_[sorted(o), [-1] * (len(mine) - len(o))].astype(int) for o in others]
        return np.stack([mine, *padded])

    monkeypatch.setattr(jax, "process_count", lambda: 1 + len(others))
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)


def _bad(*positions):
    return {"valid": np.zeros(len(positions), bool), "index": np.array(positions)}


def test_bad_samples_of_all_processes_count_once(monkeypatch):
    bad = BadSamples(100, 0.05, lambda position: f"photo {position}")
    bad.count(_bad(7, 3))
    bad.share()
    _gathering(monkeypatch, {7, 90}, set(), {0, 1})
    bad.share()
    assert bad.names() == [f"photo {n}" for n in (0, 1, 3, 7, 90)]
    bad.share()  # 5 of 100 may be bad, 6 may not
    _gathering(monkeypatch, {55})
    with pytest.raises(UserError, match="6 of 100 samples are unreadable"):
        bad.share()


def test_a_vote_is_known_one_step_later(monkeypatch):
    alone = distributed.StopVote(tiny.mesh(2))
    assert [alone(wanted) for wanted in (False, True)] == [False, True]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    vote = distributed.StopVote(tiny.mesh(2))
    assert [vote(wanted) for wanted in (False, True, False, False)] == [False, False, True, False]


def test_arrays_are_placed_by_their_sharding():
    sharding = jax.sharding.NamedSharding(tiny.mesh(4), jax.sharding.PartitionSpec("data"))
    values = np.arange(8.0, dtype=np.float32)
    placed = distributed.place(values, sharding)
    assert placed.sharding == sharding
    np.testing.assert_array_equal(placed, values)


def test_one_process_needs_no_start_and_no_end(monkeypatch, tmp_path):
    monkeypatch.setattr(roll_call, "find", lambda timeout: None)
    distributed.initialize()
    distributed.leave(1, "nothing happens")
    distributed.barrier()
    distributed.check_shared(tmp_path / "new")
    assert not (tmp_path / "new").exists() and distributed.is_first()

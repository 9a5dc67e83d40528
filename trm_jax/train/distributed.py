"""Several processes as one run: they find each other, agree, and stop together.

`initialize` is called once, before anything touches a device. A roll call over a plain socket comes
before jax's own start: jax ends a process with a stack trace when another one is missing, the roll
call says which. Later nobody waits for ever on a process that has failed: it leaves its reason in
jax's key-value store, where a thread of every other process finds it and ends that process too.
On one process every function here does nothing, or the obvious.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trm_jax.train import roll_call
from trm_jax.types import UserError

# Seconds that a process has to fail by itself before the failure of another one ends it: where all
# make the same mistake, each tells its own.
_GRACE = 3.0
# Seconds that process 0, which holds the key-value store, waits for the others to read it.
_FAREWELL = 10.0
_DAY_MS = 24 * 3600 * 1000

_calls = itertools.count()
_watch: "_Watch | None" = None


def initialize(timeout: float = 300.0) -> None:
    """Joins the processes of a run, if there are several; to be called before jax sees a device.

    They are found from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from
    Slurm, Open MPI, a TPU pod or an indexed Kubernetes job (see `roll_call.find`).

    Args:
      timeout: seconds until all have to be there.

    Raises:
      UserError: the environment variables contradict each other, or a port is taken.
      roll_call.Missing: a process did not show up; it is named.
    """
    global _watch
    if jax.distributed.is_initialized():
        return
    place = roll_call.find(timeout)
    if place is None:
        return
    roll_call.answer(place, timeout)
    # jax's handler of SIGTERM would swallow a signal that comes before the loop has its own.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(max(timeout, 60)),
    )
    _watch = _Watch(place.index, place.count)
    _watch.start()


def leave(code: int, reason: str = "") -> None:
    """Ends this process's part; with `code` not 0 it exits with it, as will all the others.

    Args:
      code: the exit code.
      reason: one line for the other processes.
    """
    if _watch is None:
        return
    if code:
        _watch.fail(code, reason)
    _client().wait_at_barrier("trm_jax/end", _DAY_MS)
    _watch.stop()
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def agree(what: str, mine: Mapping[str, Any]) -> None:
    """Checks that all processes hold the values of process 0; none goes on unless they do.

    Args:
      what: names the values in the error, as in "process 0 has WHAT of its own".
      mine: name -> anything; values are compared as text.

    Raises:
      UserError: on a process that differs; it names what does.
    """
    if jax.process_count() == 1:
        return
    values = {name: str(value) for name, value in mine.items()}
    first = json.loads(_from_first(json.dumps(values)))
    differing = sorted(n for n in values.keys() | first.keys() if values.get(n) != first.get(n))
    if differing:
        shown = ", ".join(
            f"{n} ({values.get(n, 'absent')[:80]} here, {first.get(n, 'absent')[:80]} there)"
            for n in differing[:4]
        )
        raise UserError(
            f"process 0 has {what} of its own: {shown}; start all processes with the same flags, "
            "code and data"
        )
    barrier()


def check_shared(folder: Path) -> None:
    """Makes `folder` and checks that all processes see the same one.

    Raises:
      UserError: a process does not.
    """
    if jax.process_count() == 1:
        return
    marker = folder / ".shared"
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(f"{socket.gethostname()} {os.getpid()} {time.time()}")
    token = _from_first(marker.read_text() if is_first() else "")
    deadline = time.monotonic() + 30.0  # network disks show new files late
    while not (marker.is_file() and marker.read_text() == token):
        if time.monotonic() > deadline:
            raise UserError(
                f"--workdir={folder} is not the same folder on all hosts: {socket.gethostname()} "
                "does not see what process 0 wrote; choose one on a disk that they share"
            )
        time.sleep(0.2)
    barrier()
    if is_first():
        marker.unlink()


def barrier() -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"trm_jax/barrier/{next(_calls)}", _DAY_MS)


def place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process holds whole -> one laid out by `sharding` over all of them.

    Unlike `jax.device_put` it does not gather all processes' copies to compare them; `agree`
    compares hashes of the weights.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def union(numbers: set[int]) -> set[int]:
    """The numbers of all processes; a collective, so that all must call it."""
    if jax.process_count() == 1:
        return numbers
    counts = multihost_utils.process_allgather(np.int32(len(numbers)))
    if not counts.any():
        return numbers
    padded = np.full(counts.max(), -1, np.int32)
    padded[: len(numbers)] = sorted(numbers)
    everyone = multihost_utils.process_allgather(padded)
    return {int(number) for number in everyone.ravel() if number >= 0}


class StopVote:
    """Stops all processes after the same step when any of them was asked to stop.

    The votes of a step are summed on the devices behind it and read one step later, so that the
    host never waits for a step that it has just started.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._rows = mesh.local_mesh.size
        self._any = jax.jit(
            lambda votes: votes.any(), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._pending: jax.Array | None = None

    def __call__(self, wanted: bool) -> bool:
        """Whether to stop after this step; to be called after every step by all processes."""
        if jax.process_count() == 1:
            return wanted
        mine = np.full(self._rows, wanted)
        previous = self._pending
        self._pending = self._any(jax.make_array_from_process_local_data(self._sharding, mine))
        return previous is not None and bool(previous)


class _Watch(threading.Thread):
    """Ends this process when another one has failed: its main thread may wait for that one."""

    def __init__(self, index: int, count: int):
        super().__init__(name="watch over the other processes", daemon=True)
        self._index, self._count = index, count
        self._leaving = threading.Event()

    def run(self) -> None:
        """Looks for a failure once a second."""
        while not self._leaving.wait(1.0):
            failures = []
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                failures = _client().key_value_dir_get("trm_jax/failed/")
            if failures and not self._leaving.wait(_GRACE):
                failure = json.loads(failures[0][1])
                print(f"error: {failure['text']}", file=sys.stderr)
                self._exit(failure["code"])

    def fail(self, code: int, reason: str) -> None:
        """Tells the others and ends this process; cleaning up could wait for a collective."""
        self.stop()
        where = f"process {self._index} on {socket.gethostname()}"
        text = f"{where} stopped: {reason or f'exit code {code}'}"
        body = json.dumps({"code": code, "text": text})
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store may be gone
            _client().key_value_set(f"trm_jax/failed/{self._index}", body)
        self._exit(code)

    def stop(self) -> None:
        """Ends the thread."""
        self._leaving.set()
        if threading.current_thread() is not self:
            self.join()

    def _exit(self, code: int) -> None:
        deadline = time.monotonic() + _FAREWELL
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(f"trm_jax/left/{self._index}", "")
            while self._index == 0 and time.monotonic() < deadline:
                if len(_client().key_value_dir_get("trm_jax/left/")) == self._count:
                    time.sleep(0.5)  # the last of them may still be writing its line
                    break
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _from_first(value: str) -> str:
    """Process 0's value; all must call it in the same order."""
    key = f"trm_jax/said/{next(_calls)}"
    if is_first():
        _client().key_value_set(key, value)
        return value
    # The watch ends the wait if process 0 fails, jax's heartbeats do if it dies.
    return _client().blocking_key_value_get(key, _DAY_MS)


def _client() -> Any:
    """The client of jax's coordination service, for which jax has no public name."""
    from jax._src import distributed

    return distributed.global_state.client

"""Who belongs to a run of several processes, and whether all of them are there.

The roll call uses the coordinator's port before jax does: process 0 listens until every other
process has said its number and its host, then all go on to `jax.distributed.initialize`.
"""

import json
import os
import socket
import subprocess
import time
from typing import Any, NamedTuple

from trm_jax.types import UserError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


class Missing(RuntimeError):
    """Not all processes of a run showed up in time."""


class Place(NamedTuple):
    """A process's place in its run.

    address: host:port of process 0. devices: local ids of the devices it uses, None for all.
    hosts: the names of all processes' hosts, () if unknown.
    """

    address: str
    count: int
    index: int
    devices: tuple[int, ...] | None = None
    hosts: tuple[str, ...] = ()


def find(timeout: float) -> Place | None:
    """The place of this process, None if it is alone.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID go first. What they leave open
    comes from what started the process: srun, mpirun, a TPU pod, or an indexed Kubernetes job
    with the package `kubernetes`. JAX_NUM_PROCESSES=1 keeps a process to itself anywhere.

    Args:
      timeout: seconds to wait for the name of process 0's host.

    Raises:
      UserError: the variables are incomplete or contradict each other.
    """
    address = os.environ.get(_ADDRESS)
    count, index = _number(_COUNT), _number(_INDEX)
    if count == 1:
        return None
    devices = None
    if None in (address, count, index) and _managed():
        address, count, index, devices = _detect(address, count, index, timeout)
        if count == 1:
            return None
    if (address, count, index) == (None, None, None):
        return None
    given = {_ADDRESS: address, _COUNT: count, _INDEX: index}
    absent = [name for name, value in given.items() if value is None]
    if address is None or count is None or index is None:
        raise UserError(
            f"{', '.join(n for n in given if n not in absent)} is set, but not "
            f"{', '.join(absent)}: several processes need all three"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{_ADDRESS}={address} must be HOST:PORT, of process 0")
    if count < 1 or not 0 <= index < count:
        raise UserError(f"{_INDEX}={index} must be at least 0 and below {_COUNT}={count}")
    return Place(address, count, index, devices, _hosts(count))


def answer(place: Place, timeout: float) -> None:
    """Returns on all processes once all are there.

    Args:
      place: of this process.
      timeout: seconds, from this process's start.

    Raises:
      Missing: not all were there in time; where process 0 is, all are told who is missing.
      UserError: process 0 cannot listen at its port, or two processes contradict each other.
    """
    deadline = time.monotonic() + timeout
    host, _, port = place.address.rpartition(":")
    if place.index == 0:
        _call(place, int(port), deadline, timeout)
    else:
        _report(place, (host.strip("[]"), int(port)), deadline, timeout)


def _call(place: Place, port: int, deadline: float, timeout: float) -> None:
    """Process 0: takes the others' names down and sends them on, or away."""
    try:
        listener = _listen(port, place.count)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {port} of {place.address} ({error.strerror}); "
            f"choose another in {_ADDRESS}"
        ) from None
    present, lines = {0: socket.gethostname()}, {}
    with listener:
        try:
            while len(present) < place.count:
                if not _accept(listener, place, present, lines, deadline):
                    raise Missing(_missing_text(place, present, timeout))
        except (Missing, UserError) as error:
            _send(lines, {"error": str(error)})
            raise
        _send(lines, {"go": True})


def _listen(port: int, backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
        )
    return socket.create_server(("", port), backlog=backlog)


def _accept(
    listener: socket.socket,
    place: Place,
    present: dict[int, str],
    lines: dict[int, socket.socket],
    deadline: float,
) -> bool:
    """Takes down one process; False if none came in time."""
    listener.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        line, _ = listener.accept()
    except TimeoutError:
        return False
    name = _receive(line, 5.0)
    if not {"process", "of", "host"} <= name.keys():
        line.close()  # of something else that tries ports
        return True
    index, count, host = name["process"], name["of"], name["host"]
    contradiction = ""
    if count != place.count or not 0 < index < count:
        contradiction = f"process {index} on {host} expects {count} processes, not {place.count}"
    elif index in lines and not _gone(lines[index]):
        contradiction = f"two processes are number {index}, on {present[index]} and {host}"
    if contradiction:
        _send({0: line}, {"error": contradiction})
        raise UserError(f"{contradiction}; check {_COUNT} and {_INDEX} of all processes")
    present[index], lines[index] = host, line
    return True


def _report(place: Place, address: tuple[str, int], deadline: float, timeout: float) -> None:
    """The other processes: say their names to process 0 and wait for its word."""
    name = {"process": place.index, "of": place.count, "host": socket.gethostname()}
    while time.monotonic() < deadline:
        try:
            line = socket.create_connection(address, timeout=5.0)
        except OSError:
            time.sleep(min(0.5, timeout / 10))
            continue
        with line:
            try:
                line.sendall(json.dumps(name).encode() + b"\n")
            except OSError:
                continue
            # Process 0 may have started later, and its word comes at the end of its own time.
            word = _receive(line, max(deadline - time.monotonic(), 0.0) + timeout)
        if "go" in word:
            return
        if "error" in word:
            raise Missing(str(word["error"]))
        time.sleep(0.2)  # process 0 went away before it spoke; it may come back
    raise Missing(
        f"process 0 did not answer at {place.address} within {timeout:g} s; check that it runs, "
        f"and that {socket.gethostname()} (process {place.index}) can reach it"
    )


def _missing_text(place: Place, present: dict[int, str], timeout: float) -> str:
    absent = [number for number in range(place.count) if number not in present]
    named = [f"{n} on {place.hosts[n]}" if place.hosts else str(n) for n in absent[:16]]
    there = [f"{number} on {host}" for number, host in sorted(present.items())][:16]
    return (
        f"{len(absent)} of {place.count} processes did not show up within {timeout:g} s: "
        f"{', '.join(named)}{' ...' if len(absent) > 16 else ''} (there: {', '.join(there)}"
        f"{' ...' if len(present) > 16 else ''}); start them, or raise --start_timeout"
    )


def _send(lines: dict[int, socket.socket], word: dict[str, Any]) -> None:
    """Sends a word and waits for the other side to hang up: the port is free at once then."""
    for line in lines.values():
        try:
            line.sendall(json.dumps(word).encode() + b"\n")
        except OSError:
            continue
    for line in lines.values():
        with line:
            _gone(line, 2.0)


def _receive(line: socket.socket, timeout: float) -> dict[str, Any]:
    """The object of one line of text, {} if there is none."""
    line.settimeout(timeout)
    try:
        with line.makefile("rb") as stream:
            word = json.loads(stream.readline(10_000))
    except (OSError, ValueError):
        return {}
    return word if isinstance(word, dict) else {}


def _gone(line: socket.socket, timeout: float = 0.001) -> bool:
    """Whether the other side has hung up."""
    line.settimeout(timeout)
    try:
        return line.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise UserError(f"{name}={text} must be a whole number")
    return int(text)


def _managed() -> bool:
    """Whether this process may be one of several that a cluster manager started.

    A shell inside a Slurm job has the job's variables too, but only srun counts its tasks; every
    pod has Kubernetes' variables, but only those of an indexed job a number.
    """
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    started = [int(os.environ.get(n, 1)) for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return max(started) > 1 or "JOB_COMPLETION_INDEX" in os.environ or running_in_cloud_tpu_vm


def _detect(
    address: str | None, count: int | None, index: int | None, timeout: float
) -> tuple[str | None, int | None, int | None, tuple[int, ...] | None]:
    """What jax finds out about the cluster: (address, count, index, local devices)."""
    from jax._src.clusters import ClusterEnv

    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        address, count, index, None, None, int(max(timeout, 1))
    )
    return address, count, index, _devices(devices)


def _devices(proposed) -> tuple[int, ...] | None:
    """jax gives every task of a node the device of its number; that is wrong in two cases.

    A node's only task would see one of its devices, and a task that Slurm has bound to a device
    of its own sees that one as number 0.
    """
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    bound = bool(visible) and "," not in visible
    return None if proposed is None or alone or bound else tuple(proposed)


def _hosts(count: int) -> tuple[str, ...]:
    """The hosts' names in the order of the processes, where each has one process; else ()."""
    names = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes and len(names) != count:
        try:
            command = ["scontrol", "show", "hostnames", nodes]
            names = subprocess.run(
                command, capture_output=True, text=True, timeout=10, check=True
            ).stdout.split()
        except (OSError, subprocess.SubprocessError):
            return ()
    return tuple(names) if len(names) == count else ()

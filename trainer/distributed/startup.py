"""Start-up of several processes: find the group, wait until all are there, then connect JAX."""

import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import jax
from jax._src.clusters import ClusterEnv  # JAX's public API detects and connects in one call: no room for `rendezvous`

from trainer.distributed import peers, relay
from trainer.errors import UserError

_GREETING = "belief-trainer"  # tells our processes from any other program at the port
_RETRY_SECONDS = 0.2
_LATER_SECONDS = 60  # JAX ends the processes so much later than `peers`, and names nobody
_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "SLURM_STEP_NODELIST")


def initialize(
    coordinator: str | None = None,
    process: int | None = None,
    processes: int | None = None,
    *,
    wait_seconds: int = 300,
    heartbeat_seconds: int = 100,
) -> None:
    """Connects this process to the others of the run; in a run of one process it does nothing.

    On Cloud TPU, GKE, Slurm and Open MPI the environment gives the first three. Call it before JAX computes.

    Args:
      coordinator: HOST:PORT of process 0, where it will listen.
      process: the number of this process, from 0.
      processes: the number of processes.
      wait_seconds: how long to wait for the other processes, at least 1.
      heartbeat_seconds: seconds without a message from a process after which the others end, at least 2. They end at
        once if its connection closes.

    Raises `UserError` if an argument is out of its range, if environment and arguments do not describe the group, if a
    process did not come in time or expects another number of processes, and if process 0 cannot listen at the port.
    """
    if wait_seconds < 1 or heartbeat_seconds < 2:
        found = f"wait_seconds is {wait_seconds}, heartbeat_seconds is {heartbeat_seconds}"
        raise UserError(f"{found}; at least 1 and 2 are expected")
    if (group := _find(coordinator, process, processes, wait_seconds)) is None:
        return
    address, index, count, local_devices = group
    hosts = next((os.environ[n] for n in _HOSTS if n in os.environ), "")
    connections = rendezvous(address, index, count, wait_seconds, hosts)
    jax.config.update("jax_enable_preemption_service", False)  # signals are left to `distributed.Preemption`
    seconds, heartbeat = max(wait_seconds, 60), heartbeat_seconds + _LATER_SECONDS
    timeouts: Any = {"initialization_timeout": seconds, "heartbeat_timeout_seconds": heartbeat}
    peers.start(index, connections, heartbeat_seconds)
    if index > 0:
        address = relay.start(*_parse(address), seconds)
    # `_find` has detected the cluster.
    jax.distributed.initialize(address, count, index, local_devices, cluster_detection_method="deactivate", **timeouts)
    # This exchanges the devices now. A process that failed before a later exchange would leave the others waiting.
    jax.devices()


def _find(
    coordinator: str | None, process: int | None, processes: int | None, seconds: int
) -> tuple[str, int, int, Sequence[int] | None] | None:
    """Address, process, processes, and the local devices of this process (None: all); None in a run of one process."""
    devices, method = None, None
    if None in (coordinator, processes, process):
        platforms = jax.config.jax_platforms  # pyrefly: ignore[missing-attribute] - JAX adds it when imported
        method = _launcher(dict(os.environ), platforms or "")
    if method is not None:
        detect = ClusterEnv.auto_detect_unset_distributed_params
        try:
            coordinator, processes, process, devices = detect(coordinator, processes, process, None, method, seconds)
        except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the environment ({method}) does not tell where the processes of the run are "
                f"({type(error).__name__}: {error}); give --coordinator, --process and --processes"
            ) from error
    if coordinator is None and processes in (None, 1) and process in (None, 0):
        return None
    if coordinator is None or processes is None or process is None:
        raise UserError("give --coordinator=HOST:PORT, --process=I and --processes=N together")
    if not 0 <= process < processes:
        raise UserError(f"--process is {process}; it must be from 0 to {processes - 1}, below --processes")
    return (coordinator, process, processes, devices) if processes > 1 else None


def _launcher(environment: dict[str, str], platforms: str) -> str | None:
    """JAX's name for the system that started the processes of the run; None in a run of one process.

    JAX's own detection takes every pod of Kubernetes for a process of a group.
    """
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "ompi"
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    if "tpu" not in platforms.split(","):  # JAX puts it there on a TPU host
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "gketpu" if "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1 else None
    return None if "TPU_SKIP_MDS_QUERY" in environment else "gcetpu"


def _parse(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {address!r}; HOST:PORT is expected")
    return host.strip("[]"), int(port)


def rendezvous(address: str, index: int, count: int, seconds: float, hosts: str = "") -> dict[int, socket.socket]:
    """Returns in every process once all have arrived.

    JAX's own wait aborts the processes that arrived and does not name the missing ones. Process 0 listens at `address`
    (HOST:PORT), where another socket can listen afterwards; `hosts` is for the error only. In process 0 it returns a
    connection to each other process, by its number. In the others it returns {0: the connection to process 0}. Raises
    `UserError` if a process did not come in time or expects another count, or process 0 cannot listen at the port.
    """
    host, port = _parse(address)
    where = f"{address}{f' (hosts: {hosts})' if hosts else ''}"
    if index == 0:
        return _receive(port, where, count, seconds)
    return {0: _report((host, port), where, index, count, seconds)}


def _receive(port: int, where: str, count: int, seconds: float) -> dict[int, socket.socket]:
    """Process 0: waits for the reports of all other processes, then replies to each."""
    deadline = time.monotonic() + seconds
    arrived: dict[int, socket.socket] = {}
    error = ""
    with ExitStack() as stack:
        server = stack.enter_context(_listen(port))
        while len(arrived) < count - 1 and not error and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(OSError, ValueError):  # nobody came, or another program, or the process is gone again
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(1)
                greeting, index, expected = connection.makefile().readline().split()
                if greeting == _GREETING:
                    arrived[int(index)] = connection
                    differs = f"process {index} expects {expected} processes, process 0 expects {count}"
                    error = "" if int(expected) == count else differs
        missing = ", ".join(str(i) for i in range(1, count) if i not in arrived)
        if missing and not error:
            came = f"{len(arrived) + 1} of {count} processes"
            error = f"only {came} came within {seconds:g} s to {where}: no process {missing}"
        for connection in arrived.values():
            with suppress(OSError):  # the process is gone; JAX will miss it, too
                connection.sendall(f"{_GREETING} {error or 'complete'}\n".encode())
                if error:
                    connection.recv(1)  # the other side closes first, so that the port is free at once
        if error:
            raise UserError(error)
        return {index: connection.dup() for index, connection in arrived.items()}  # the stack closes the originals


def _report(address: tuple[str, int], where: str, index: int, count: int, seconds: float) -> socket.socket:
    """Any other process: reports to process 0 until it replies."""
    deadline = time.monotonic() + seconds
    while True:
        problem, reply = "did not answer", ""
        left = max(deadline - time.monotonic(), 0.001)
        # An OSError: process 0 does not listen yet, or its host has no address yet.
        with suppress(OSError), ExitStack() as stack:
            connection = stack.enter_context(relay.connect(address, left))
            problem = "still waits for another process"
            connection.sendall(f"{_GREETING} {index} {count}\n".encode())
            connection.settimeout(left + 1)  # process 0 gives up first, and names the missing process
            _, _, reply = _read_line(connection).partition(f"{_GREETING} ")
            if reply == "complete":
                stack.pop_all()
                return connection
        if reply:
            raise UserError(reply)
        if time.monotonic() > deadline:
            raise UserError(f"process 0 of {count} at {where} {problem}; process {index} waited {seconds:g} s")
        time.sleep(_RETRY_SECONDS)


def _read_line(connection: socket.socket) -> str:
    """The next line, and nothing after it: that is for `peers`."""
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line.decode(errors="replace").strip()


def _listen(port: int) -> socket.socket:
    """Listens at all addresses of this machine, as JAX will."""
    with suppress(OSError, ValueError):  # IPv6 is switched off
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(f"process 0 cannot listen at port {port}: {error.strerror}") from error

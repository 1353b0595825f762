"""Start-up of several processes: find each other, then wait for all, then connect JAX."""

import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack

import jax
from jax._src.clusters import ClusterEnv  # what started these processes: public only as a side effect of `initialize`

from trainer.errors import UserError

_GREETING = "belief-trainer"  # so that what else may listen or call at the port is not taken for one of ours
_RETRY_SECONDS = 0.2


def initialize(
    coordinator: str | None = None,
    process: int | None = None,
    processes: int | None = None,
    *,
    wait_seconds: int = 300,
    heartbeat_seconds: int = 100,
    preemptible: bool = False,
) -> None:
    """Joins the other processes of the run; on a machine that is alone it does nothing.

    What is not given comes from the environment on Cloud TPU, GKE, Slurm and Open MPI. Call it before JAX computes.

    Args:
      coordinator: HOST:PORT of process 0, where it will listen.
      process: which process this is, from 0.
      processes: how many there are.
      wait_seconds: how long to wait for the others, at least 1.
      heartbeat_seconds: how long after a process died the others end, at least 2.
      preemptible: whether SIGTERM is left to `checkpoint.preemption`; otherwise it kills, as usual.

    Raises:
      UserError: not all came in time, or it cannot be told where or how many they are.
    """
    found = _find(coordinator, process, processes, wait_seconds)
    if found is None:
        return
    address, count, place, local_devices = found
    hosts = next((os.environ[name] for name in _HOSTS if name in os.environ), "")
    rendezvous(address, place, count, wait_seconds, hosts)
    jax.config.update("jax_enable_preemption_service", preemptible)
    jax.distributed.initialize(
        address,
        count,
        place,
        local_devices,
        cluster_detection_method="deactivate",  # it has told all it knows
        initialization_timeout=max(wait_seconds, 60),
        heartbeat_timeout_seconds=heartbeat_seconds,
    )
    jax.devices()  # all processes exchange theirs: a mistake that only one of them finds must come afterwards


_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "SLURM_STEP_NODELIST")


def _find(
    coordinator: str | None, process: int | None, processes: int | None, seconds: int
) -> tuple[str, int, int, Sequence[int] | None] | None:
    """Address, number of processes, number of this one, and its devices where they are shared out; None if alone."""
    local_devices: Sequence[int] | None = None
    method = None
    if None in (coordinator, processes, process):
        platforms = jax.config.jax_platforms  # pyrefly: ignore[missing-attribute] - made at import
        method = _method(dict(os.environ), platforms or "")
    if method is not None:
        try:
            coordinator, processes, process, local_devices = ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, processes, process, None, method, seconds
            )
        except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot tell from the environment ({method}) where the processes of the run are "
                f"({type(error).__name__}: {error}); give --coordinator, --process and --processes"
            ) from error
    if coordinator is None and processes in (None, 1) and process in (None, 0):
        return None
    if coordinator is None or processes is None or process is None:
        raise UserError("give --coordinator=HOST:PORT, --process=I and --processes=N together")
    if not 0 <= process < processes:
        raise UserError(f"--process is {process}; it must be from 0 to {processes - 1}, below --processes")
    return (coordinator, processes, process, local_devices) if processes > 1 else None


def _method(environment: dict[str, str], platforms: str) -> str | None:
    """JAX's name for what started several processes like this one; None on a workstation, or where a single one runs.

    JAX itself is not asked, since it takes any pod of Kubernetes for one of a group.
    """
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "ompi"
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    if "tpu" not in platforms.split(","):  # JAX adds it where there are chips
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "gketpu" if "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1 else None
    return None if "TPU_SKIP_MDS_QUERY" in environment else "gcetpu"


def rendezvous(address: str, place: int, count: int, seconds: float, hosts: str = "") -> None:
    """Returns in every process once all of them are there.

    Args:
      address: HOST:PORT of process 0, which listens there for the others; the port is free again afterwards.
      place: which process this is, from 0.
      count: how many there must be.
      seconds: how long to wait.
      hosts: where the processes should be, as far as that is known; only for the error.

    Raises:
      UserError: somebody did not come in time, or was told another count; the address cannot be listened at.
    """
    deadline = time.monotonic() + seconds
    where = f"{address}{f' (hosts: {hosts})' if hosts else ''}"
    if place:
        _answer(address, where, place, count, seconds, deadline)
    else:
        _call(address, where, count, seconds, deadline)


def _call(address: str, where: str, count: int, seconds: float, deadline: float) -> None:
    came: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        server = stack.enter_context(_listen(address))
        error = ""
        while len(came) < count - 1 and not error:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(1)
                greeting, place, theirs = connection.makefile().readline().split()
            except TimeoutError:
                if time.monotonic() >= deadline:
                    missing = ", ".join(str(i) for i in range(1, count) if i not in came)
                    error = f"only {len(came) + 1} of {count} processes came within {seconds:g} s to {where}: "
                    error += f"no process {missing}"
            except (OSError, ValueError):  # not one of ours, or gone again
                continue
            else:
                if greeting == _GREETING:
                    came[int(place)] = connection
                    if int(theirs) != count:
                        error = f"process {place} was told of {theirs} processes, process 0 of {count}"
        for connection in came.values():
            _reply(connection, error or "complete")
    if error:
        raise UserError(error)


def _reply(connection: socket.socket, text: str) -> None:
    try:
        connection.sendall(f"{_GREETING} {text}\n".encode())
        connection.recv(1)  # the other side closes first, so that the port is free at once
    except OSError:
        return  # gone; JAX will miss it, too


def _answer(address: str, where: str, place: int, count: int, seconds: float, deadline: float) -> None:
    host, port = _split(address)
    answered = False
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(f"{_GREETING} {place} {count}\n".encode())
                connection.settimeout(left + 1)  # process 0 knows better who is missing
                greeting, _, text = connection.makefile(errors="replace").readline().strip().partition(" ")
        except TimeoutError:
            answered = True
            continue
        except OSError:  # nobody listens there yet, or the name is not known yet
            time.sleep(_RETRY_SECONDS)
            continue
        if greeting == _GREETING:
            if text != "complete":
                raise UserError(text)
            return
        time.sleep(_RETRY_SECONDS)
    what = "waits for more than this one" if answered else "did not answer"
    raise UserError(f"process 0 of {count} at {where} {what}; process {place} waited {seconds:g} s")


def _listen(address: str) -> socket.socket:
    """Listens at all of this machine's addresses, as JAX will."""
    _, port = _split(address)
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            except OSError:  # IPv6 is switched off
                return socket.create_server(("", port))
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(f"process 0 cannot listen at port {port}: {error.strerror}") from error


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {address!r}; HOST:PORT is expected")
    return host.strip("[]"), int(port)

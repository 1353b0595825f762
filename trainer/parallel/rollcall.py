"""The roll call before JAX connects its processes: JAX itself would abort those that came if one does not."""

import socket
import time
from contextlib import ExitStack

from trainer.errors import UserError

_GREETING = "belief-trainer"  # so that what else may listen or call at the port is not taken for one of ours
_RETRY_SECONDS = 0.2


def call_roll(address: str, place: int, count: int, seconds: float, hosts: str = "") -> None:
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

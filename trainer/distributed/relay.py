"""A relay on this host between JAX and the coordinator, so that JAX does not abort when process 0 dies.

JAX's client aborts with a C++ stack within a millisecond after its connection has closed, and no setting prevents it.
The relay keeps the connection open, and leaves it to `peers` to name process 0 and to end this process.
"""

import os
import socket
import struct
import threading
import time
from contextlib import suppress

_RETRY_SECONDS = 0.1
_NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy", "NO_PROXY")  # gRPC takes the first that is set


def start(host: str, port: int, seconds: float) -> str:
    """Relays connections to the HOST:PORT that it returns; the target may begin to listen up to `seconds` later."""
    server = socket.create_server(("127.0.0.1", 0))
    if any("_proxy" in name.lower() for name in os.environ):
        excluded = next((os.environ[name] for name in _NO_PROXY_VARIABLES if name in os.environ), "")
        os.environ[_NO_PROXY_VARIABLES[0]] = f"{excluded},127.0.0.1".strip(",")
    arguments = server, (host, port), seconds
    threading.Thread(target=_serve, args=arguments, name="relay to process 0", daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


def connect(address: tuple[str, int], seconds: float) -> socket.socket:
    """A connection to an address; raises an `OSError` if nobody listens there within `seconds`.

    A client may be given the very port of this host that it calls. If nobody listens there, TCP connects the client
    with itself.
    """
    connection = socket.create_connection(address, timeout=seconds)
    if connection.getsockname() == connection.getpeername():
        # Reset the connection. After a plain close, nobody could listen at the port for a minute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        raise ConnectionRefusedError(f"nobody listens at {address}")
    return connection


def _serve(server: socket.socket, target: tuple[str, int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        client, _ = server.accept()
        threading.Thread(target=_connect, args=(client, target, deadline), daemon=True).start()


def _connect(client: socket.socket, target: tuple[str, int], deadline: float) -> None:
    while True:
        try:
            coordinator = connect(target, _RETRY_SECONDS * 100)
            break
        except OSError:  # JAX does not listen yet
            if time.monotonic() > deadline:
                client.close()
                return
            time.sleep(_RETRY_SECONDS)
    for connection in (client, coordinator):
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_pass_on, args=(coordinator, client), daemon=True).start()
    _pass_on(client, coordinator)
    with suppress(OSError):  # the coordinator is gone already
        coordinator.shutdown(socket.SHUT_WR)


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    """Passes on until the source closes. The sink stays open."""
    with suppress(OSError):  # either end is gone
        while chunk := source.recv(1 << 16):
            sink.sendall(chunk)

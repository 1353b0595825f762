"""Monitors the processes of a run. When one dies, stops or gets stuck, all end, and a message names the one at fault.

Every process sends a beat a second with its step and its activity, over the connections of the rendezvous: process
0 to all others, the others to process 0. The kernel closes the connection of a dead process, so its end is known at
once. JAX's own detection names nobody and prints a C++ stack; it acts later, should this one fail.
"""

import atexit
import json
import multiprocessing
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from jax.errors import JaxRuntimeError

from trainer.distributed.agreement import Agreement
from trainer.distributed.stuck import held_up
from trainer.errors import HostError, UserError

_BEAT_SECONDS = 1.0
_BLAME_SECONDS = 3.0  # before this process is blamed; the death of another one is noticed sooner than that
_ENDS = "the run ends, launch it again to go on from the last checkpoint"
_ENDING = threading.RLock()  # an RLock: the handler of SIGCONT may interrupt its own thread in `_end`

_monitor: "_PeerMonitor | None" = None  # None in a run of one process
_own_activity: tuple[int, str, float] = (0, "starting", time.monotonic())  # step, activity, since when


def report(step: int, activity: str) -> None:
    """Notes the newest step, and what the main thread does from now on: a key of `DOING`, or a phrase. 0.2 µs."""
    global _own_activity
    _own_activity = (step, activity, time.monotonic())


@contextmanager
def waiting(activity: str) -> Iterator[None]:
    """Notes an activity inside another one, such as waiting for the other processes, at the same step."""
    step, before, _ = _own_activity
    report(step, activity)
    yield
    report(step, before)


def set_end_seconds(end_seconds: float | None) -> None:
    """If no process reports for `end_seconds`, process 0 names the one that blocks the others and ends the run.

    None (the default) sets no limit. Only the limit of process 0 matters.
    """
    if _monitor is not None:
        _monitor.end_seconds = end_seconds


def agreement() -> Agreement | None:
    """The `Agreement` of the connected processes; None if `start` was not called."""
    return None if _monitor is None else _monitor.agreement


def start(index: int, connections: Mapping[int, socket.socket], silence_seconds: float) -> None:
    """Monitors the other processes until they, and this one, end in good order: at the exit of the interpreter.

    Args:
      index: the number of this process, from 0.
      connections: from process 0, one to each other process; from another, one to process 0. The monitor owns them.
      silence_seconds: a process without a message for so long counts as stopped; at least 2.
    """
    global _monitor
    _monitor = _PeerMonitor(index, connections, silence_seconds)
    threading.Thread(target=_monitor.run, name="monitor of the other processes", daemon=True).start()
    atexit.register(_monitor.leave)  # runs before JAX's shutdown, which was registered earlier
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCONT, _monitor.continued)  # runs before anything else in this thread


def fail(error: BaseException, code: int) -> None:
    """Tells the other processes that this one ends with `error`; they end too, with `code`, or 3 if `code` is 0."""
    if _monitor is None:
        return
    # A JAX error often only means that another process died. Then the monitor's thread ends this process during the
    # sleep and names the other one. Gloo's error is a ValueError if it is raised at dispatch.
    if isinstance(error, JaxRuntimeError) or "Gloo" in str(error):
        time.sleep(_BLAME_SECONDS)
    _monitor.is_failing = True
    named = "" if isinstance(error, UserError | HostError) else f"{type(error).__name__}: "
    first = next(iter(str(error).splitlines()), "")
    text = f"{_monitor.name(_monitor.index)} failed: {named}{first}; the run ends"
    _monitor.say("fault", "" if isinstance(error, KeyboardInterrupt | SystemExit) else text, code or 3)


@dataclass
class _Peer:
    """Another process, as its last beat left it."""

    connection: socket.socket
    heard: float
    host: str = "an unknown host"
    step: int = 0
    activity: str = "starting"
    since: float = 0.0
    said_goodbye: bool = False
    partial: bytes = b""  # the beginning of a line whose end has not come yet
    unsent: bytes = b""  # the end of a line of which the kernel has taken the beginning


class _PeerMonitor:
    """The connections of this process to others.

    One thread executes `run`. The main thread calls `say`, `leave`, `name` and `continued`, and sets `is_failing` and
    `end_seconds`.
    """

    def __init__(self, index: int, connections: Mapping[int, socket.socket], silence_seconds: float) -> None:
        self.index = index
        self.end_seconds: float | None = None
        self.is_failing = False  # the main thread reports its own error, and ends the process
        self._said_goodbye, self._last_beat_at = False, time.monotonic()
        self._silence_seconds, self._host = silence_seconds, socket.gethostname()
        self._peers = {i: _Peer(connection, self._last_beat_at) for i, connection in connections.items()}
        self.agreement = Agreement(index, len(connections), self.say)
        self._hosts = {index: self._host}
        self._sending = threading.RLock()  # the handler of SIGCONT may `say` something while the main thread does
        self._selector = selectors.DefaultSelector()
        for i, peer in self._peers.items():
            peer.connection.setblocking(False)
            self._selector.register(peer.connection, selectors.EVENT_READ, i)

    def run(self) -> None:
        """Sends and receives beats, and ends this process when another one is at fault or has said so."""
        period = min(_BEAT_SECONDS, self._silence_seconds / 4)
        self.say("host", self._host)
        while True:
            step, activity, since = _own_activity
            self._last_beat_at = time.monotonic()
            self.say("beat", step, activity, self._last_beat_at - since)
            while (left := self._last_beat_at + period - time.monotonic()) > 0:
                ready = [key.data for key, _ in self._selector.select(left)]
                self._check_own_gap()
                ended = [i for i in ready if not self._hear(i)]
                self._end_if_any(dict.fromkeys(ended, "was killed or crashed"))
            self._check()

    def say(self, *message: str | float) -> None:
        """Sends a message to all connected processes; a stopped one that takes no more of them gets none."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for peer in list(self._peers.values()):
                with suppress(OSError):  # the process is gone, which `run` notices, or takes no more
                    if peer.unsent:
                        peer.unsent = peer.unsent[peer.connection.send(peer.unsent) :]
                    if not peer.unsent:
                        peer.unsent = line[peer.connection.send(line) :]

    def leave(self) -> None:
        """Says goodbye: from now on the end of this process is no fault."""
        self._said_goodbye = True
        self.say("bye")

    def name(self, index: int) -> str:
        """A process with its host."""
        return f"process {index} on {self._hosts.get(index, 'an unknown host')}"

    def continued(self, *_: int | FrameType | None) -> None:
        """The handler of SIGCONT."""
        self._check_own_gap()

    def _check_own_gap(self) -> None:
        """Ends this process if it was stopped for so long that the others have gone on without it."""
        gap = time.monotonic() - self._last_beat_at
        if gap > self._silence_seconds:
            text = f"{self.name(self.index)} did not answer for {gap:.0f} s (stopped?); {_ENDS}"
            self.say("fault", text, 3)
            _end(text, 3)

    def _hear(self, index: int) -> bool:
        """Takes what a process has said; False if its connection has ended without a goodbye."""
        peer = self._peers[index]
        try:
            chunk = peer.connection.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            chunk = b""
        peer.heard = time.monotonic()
        *lines, peer.partial = (peer.partial + chunk).split(b"\n")
        for line in lines:
            self._take(peer, index, *json.loads(line))
        if not chunk:
            self._selector.unregister(peer.connection)
        return bool(chunk) or peer.said_goodbye

    def _take(self, peer: _Peer, index: int, kind: str, *values: Any) -> None:
        if kind == "beat":
            peer.step, peer.activity, peer.since = values[0], values[1], peer.heard - values[2]
        elif kind == "bye":
            peer.said_goodbye = True
        elif kind == "host":
            self._hosts[index] = values[0]
            if self.index == 0 and len(self._hosts) > len(self._peers):
                self.say("hosts", json.dumps(self._hosts))
        elif kind in ("stop", "calls", "last"):
            self.agreement.take(index, kind, values[0])
        elif kind == "hosts":
            self._hosts = {int(i): host for i, host in json.loads(values[0]).items()}
        elif kind == "fault":
            text, code = values
            if self.is_failing:
                return
            self.say("fault", text, code)  # process 0 forwards it to all
            _end(text if self.index == 0 else "", code)

    def _check(self) -> None:
        """Looks for processes that are silent, or hold up the others."""
        now, peers = time.monotonic(), {i: peer for i, peer in self._peers.items() if not peer.said_goodbye}
        silent = {i: now - peer.heard for i, peer in peers.items() if now - peer.heard > self._silence_seconds}
        away = "is it stopped, or its host away?"
        self._end_if_any({i: f"does not answer for {seconds:.0f} s ({away})" for i, seconds in silent.items()})
        if self.index == 0 and peers and self.end_seconds is not None:
            states = {i: (peer.step, peer.activity, peer.since) for i, peer in peers.items()}
            states |= {} if self._said_goodbye else {0: _own_activity}
            if all(now - since > self.end_seconds for _, _, since in states.values()):
                self._end_if_any(held_up(states, now))

    def _end_if_any(self, faults: Mapping[int, str]) -> None:
        """Ends all processes if any is at fault. Process 0 forwards the message; if it died, its connections close."""
        if not faults or self.is_failing:
            return
        text = f"{', '.join(f'{self.name(i)} {said}' for i, said in sorted(faults.items()))}; {_ENDS}"
        self.say("fault", text, 3)
        # Process 0 prints it. So does another one, on another host if there is any: that of process 0 may be down.
        elsewhere = [i for i in self._hosts if i and self._hosts[i] != self._hosts.get(0)]
        _end(text if self.index in (0, min(elsewhere, default=1)) else "", 3)


def _end(text: str, code: int) -> None:
    """Ends this process at once, with its children; an orderly exit would wait for the other processes.

    A second thread that calls it waits for the end, so that one of them prints.
    """
    _ENDING.acquire()  # never released
    if text:
        with suppress(OSError):  # standard error may be closed or full
            os.write(2, b"\n" * os.isatty(2) + f"error: {text}\n".encode())
    for child in multiprocessing.active_children():  # a stopped one would outlive this process
        child.kill()
    os._exit(code)

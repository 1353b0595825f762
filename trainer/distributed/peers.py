"""The watch over the processes of a run: all end, and the one at fault is named, when one dies, stops or gets stuck.

Every process sends a beat a second with its step and what it waits for, over the connections of the rendezvous: process
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
from trainer.errors import HostError, UserError

_BEAT_SECONDS = 1.0
_BLAME_SECONDS = 3.0  # the end of another process is known much earlier
_TOGETHER = ("device", "processes")  # waits that end when all processes have come so far
_DOING = {
    "starting": "starting",
    "compile": "compiling",
    "data": "waiting for its data",
    "device": "waiting for its devices",
    "processes": "waiting for the other processes",
    "save": "saving",
    "evaluate": "evaluating",
}
_ENDS = "the run ends, launch it again to go on from the last checkpoint"

_watch: "_Watch | None" = None  # None: a process alone
_report: tuple[int, str, float] = (0, "starting", time.monotonic())  # step, wait, since when


def report(step: int, waiting_for: str) -> None:
    """Notes the newest step, and what the main thread waits for from now on: a key of `_DOING`, or a phrase. 0.2 µs."""
    global _report
    _report = (step, waiting_for, time.monotonic())


@contextmanager
def waiting(waiting_for: str) -> Iterator[None]:
    """Notes a wait inside another one, such as for the other processes, at the same step."""
    step, before, _ = _report
    report(step, waiting_for)
    yield
    report(step, before)


def set_limits(end_seconds: float | None) -> None:
    """Sets after how many seconds without a report of any process the one that holds up the others is named.

    None, as at the start, is for never. Only the limit of process 0 matters.
    """
    if _watch is not None:
        _watch.end_seconds = end_seconds


def agreement() -> Agreement | None:
    """How the connected processes agree to stop; None without `start`."""
    return None if _watch is None else _watch.agreement


def start(index: int, connections: Mapping[int, socket.socket], seconds: float) -> None:
    """Watches the other processes until they, and this one, end in good order: at the exit of the interpreter.

    Args:
      index: the number of this process, from 0.
      connections: from process 0, one to each other process; from another, one to process 0. They are taken over.
      seconds: after how long a silence a process counts as stopped, at least 1.
    """
    global _watch
    _watch = _Watch(index, connections, seconds)
    threading.Thread(target=_watch.run, name="watch over the other processes", daemon=True).start()
    atexit.register(_watch.leave)  # runs before JAX's shutdown, which was registered earlier
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCONT, _watch.continued)  # runs before anything else in this thread


def fail(error: BaseException, code: int) -> None:
    """Tells the other processes that this one ends with `error`; they end too, with exit code `code`, 3 for 0.

    An error of JAX is often no more than the end of another process as a collective sees it. In this case this function
    does not return: the process ends with the line that names the other one.
    """
    if _watch is None:
        return
    if isinstance(error, JaxRuntimeError) or "Gloo" in str(error):  # at a dispatch it is a ValueError
        time.sleep(_BLAME_SECONDS)
    _watch.is_failing = True
    named = "" if isinstance(error, UserError | HostError) else f"{type(error).__name__}: "
    first = next(iter(str(error).splitlines()), "")
    text = f"{_watch.name(_watch.index)} failed: {named}{first}; the run ends"
    _watch.say("fault", "" if isinstance(error, KeyboardInterrupt | SystemExit) else text, code or 3)


@dataclass
class _Peer:
    """Another process, as its last beat left it."""

    connection: socket.socket
    heard: float
    host: str = "an unknown host"
    step: int = 0
    waiting_for: str = "starting"
    since: float = 0.0
    left: bool = False  # it has said goodbye
    partial: bytes = b""


class _Watch:
    """The connections of this process to others. One thread runs it; other threads only `say` something."""

    def __init__(self, index: int, connections: Mapping[int, socket.socket], seconds: float) -> None:
        self.index = index
        self.end_seconds: float | None = None
        self.is_failing = False  # the main thread reports its own error, and ends the process
        self._left = False
        self._seconds, self._host, self._beaten = seconds, socket.gethostname(), time.monotonic()
        self._peers = {i: _Peer(connection, self._beaten) for i, connection in connections.items()}
        self.agreement = Agreement(index, len(connections), self.say)
        self._hosts = {index: self._host}
        self._selector = selectors.DefaultSelector()
        for i, peer in self._peers.items():
            peer.connection.setblocking(False)
            self._selector.register(peer.connection, selectors.EVENT_READ, i)

    def run(self) -> None:
        """Sends and receives beats, and ends this process when another one is at fault or has said so."""
        period = min(_BEAT_SECONDS, self._seconds / 4)
        self.say("host", self._host)
        while True:
            step, waiting_for, since = _report
            self._beaten = time.monotonic()
            self.say("beat", step, waiting_for, self._beaten - since)
            while (left := self._beaten + period - time.monotonic()) > 0:
                ready = [key.data for key, _ in self._selector.select(left)]
                self._check_own_gap()
                ended = [i for i in ready if not self._hear(i)]
                self._fault(dict.fromkeys(ended, "was killed or crashed"))
            self._check()

    def say(self, *message: str | float) -> None:
        """Sends a message to all connected processes; a stopped one that takes no more of them gets none."""
        line = json.dumps(message).encode() + b"\n"
        for peer in list(self._peers.values()):
            with suppress(OSError):  # the process is gone, which `run` notices, or takes no more
                peer.connection.send(line)

    def leave(self) -> None:
        """Says goodbye: from now on the end of this process is no fault."""
        self._left = True
        self.say("bye")

    def name(self, index: int) -> str:
        """A process with its host."""
        return f"process {index} on {self._hosts.get(index, 'an unknown host')}"

    def continued(self, *_: int | FrameType | None) -> None:
        """The handler of SIGCONT."""
        self._check_own_gap()

    def _check_own_gap(self) -> None:
        """Ends this process if it was stopped for so long that the others have gone on without it."""
        gap = time.monotonic() - self._beaten
        if gap > self._seconds:
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
        return bool(chunk) or peer.left

    def _take(self, peer: _Peer, index: int, kind: str, *values: Any) -> None:
        if kind == "beat":
            peer.step, peer.waiting_for, peer.since = values[0], values[1], peer.heard - values[2]
        elif kind == "bye":
            peer.left = True
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
            self.say("fault", text, code)  # process 0 hands it on
            _end(text if self.index == 0 else "", code)

    def _check(self) -> None:
        """Looks for processes that are silent, or hold up the others."""
        now, peers = time.monotonic(), {i: peer for i, peer in self._peers.items() if not peer.left}
        silent = {i: now - peer.heard for i, peer in peers.items() if now - peer.heard > self._seconds}
        self._fault({i: f"does not answer for {s:.0f} s (is it stopped, or its host away?)" for i, s in silent.items()})
        if self.index == 0 and peers and self.end_seconds is not None:
            states = {i: (peer.step, peer.waiting_for, peer.since) for i, peer in peers.items()}
            states |= {} if self._left else {0: _report}
            if all(now - since > self.end_seconds for _, _, since in states.values()):
                self._fault(_held_up(states, now))

    def _fault(self, what: Mapping[int, str]) -> None:
        """Ends all processes if any is at fault; the others hear it from process 0, or from its silence."""
        if not what or self.is_failing:
            return
        text = f"{', '.join(f'{self.name(i)} {said}' for i, said in sorted(what.items()))}; {_ENDS}"
        self.say("fault", text, 3)
        # Process 0 reports. If it is the one at fault, its whole host may be away.
        elsewhere = [i for i in self._hosts if i and self._hosts[i] != self._hosts.get(0)]
        _end(text if self.index in (0, min(elsewhere, default=1)) else "", 3)


def _held_up(states: Mapping[int, tuple[int, str, float]], now: float) -> dict[int, str]:
    """The processes that hold up the others, with what they do: those that wait for no other, else the last ones."""
    alone = [i for i, (_, waiting_for, _) in states.items() if waiting_for not in _TOGETHER]
    last = min(step for step, _, _ in states.values())
    named = alone or [i for i, (step, _, _) in states.items() if step == last]
    texts = {}
    for i in named:
        step, waiting_for, since = states[i]
        texts[i] = f"has been {_DOING.get(waiting_for, waiting_for)} at step {step} for {now - since:.0f} s"
    return texts


def _end(text: str, code: int) -> None:
    """Ends this process at once, with its children; an exit in good order would wait for the other processes."""
    if text:
        with suppress(OSError):  # standard error may be closed or full
            os.write(2, b"\n" * os.isatty(2) + f"error: {text}\n".encode())
    for child in multiprocessing.active_children():  # a stopped one would outlive this process
        child.kill()
    os._exit(code)

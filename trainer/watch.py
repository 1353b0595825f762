"""A thread that watches a training: it says what a stalled run waits for, and saves for a main thread that cannot."""

import os
import select
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from typing import Self

from trainer import config, distributed
from trainer.distributed import how_to_continue, peers
from trainer.errors import HostError

_LOOK_SECONDS = 0.25
_PATIENCE_SECONDS = 3.0  # after a signal, for the main thread to answer it by itself
_STEPS = 64  # whose times make the median
# The phases in which the newest state is complete and no other thread reads the metrics.
_SAVABLE = ("compile", "data", "step", "evaluate")
_SAID = {"start": "starting", "restore": "reading the checkpoint", "step": "dispatching the step"}  # to other processes
_DOING = {
    "start": "starting",
    "compile": "compiling",
    "restore": "reading the checkpoint",
    "data": "waiting for the batch of step {step} (positions {positions} in the run's order of examples)",
    "step": "dispatching step {step}",
    "device": "waiting for the devices, at step {step}",
    "evaluate": "evaluating step {step}",
    "save": "saving step {step}",
}


class Watch:
    """Watches the main thread of a training, which says by `enter` what it begins to do.

    In a run of one process, the thread saves the newest complete state and ends the process in two cases: the main
    thread does not answer a signal within 3 s, as in a long call of C, or a time limit passes. From then on the main
    thread blocks at its next `enter`, so that only one of the two saves.
    """

    def __init__(self, settings: config.Watch, batch_size: int = 1) -> None:
        """`batch_size` is that of the run, to name the examples of a batch."""
        self._settings, self._batch_size = settings, batch_size
        self._lock, self._main = threading.Lock(), threading.get_ident()
        self._woken, self._wakes = socket.socketpair()
        self._handled: Collection[int] = ()
        self._now: tuple[str, int, float] = ("start", 0, time.monotonic())
        self._progressed = self._stepped = time.monotonic()
        self._times: deque[float] = deque(maxlen=_STEPS)  # of steps without a save or an evaluation
        self._step_is_timed, self._is_reported, self._is_taken = False, False, False
        self._signal: tuple[int, float] | None = None
        self._rescue: Callable[[], str] = lambda: "there is no complete state to save"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for end in (self._woken, self._wakes):
            end.close()

    def wakeup_fd(self, signums: Collection[int]) -> int:
        """The descriptor for `signal.set_wakeup_fd`, by which the thread knows of these signals at once."""
        self._handled = signums
        self._wakes.setblocking(False)
        return self._wakes.fileno()

    def set_rescue(self, rescue: Callable[[], str]) -> None:
        """Sets the function that saves the newest complete state and says so; another thread calls it."""
        self._rescue = rescue

    def enter(self, phase: str, step: int) -> None:
        """The main thread begins a phase, a key of `_DOING`, of an update, counted from 1. It costs about 1 µs."""
        if self._is_taken:
            if threading.get_ident() == self._main:
                threading.Event().wait()  # the other thread saves, and ends the process
            return
        now = time.monotonic()
        with self._lock:
            if phase == "data":
                if self._step_is_timed:
                    self._times.append(now - self._stepped)
                self._stepped, self._step_is_timed = now, True
            elif phase in ("save", "evaluate", "compile"):
                self._step_is_timed = False
            self._now, self._progressed, self._is_reported = (phase, step, now), now, False
        peers.report(step, _SAID.get(phase, phase))

    def beat(self) -> None:
        """A batch of an evaluation was made."""
        self.enter(*self._now[:2])

    def _run(self) -> None:
        while not self._ended.is_set():
            if select.select([self._woken], [], [], _LOOK_SECONDS)[0]:
                for signum in self._woken.recv(64):
                    if signum in self._handled and self._signal is None:
                        self._signal = signum, time.monotonic()
            now = time.monotonic()
            if self._signal is not None:
                self._watch_signal(*self._signal, now)
            else:
                self._watch_time(now)

    def _watch_signal(self, signum: int, came: float, now: float) -> None:
        """Ends the process when the main thread does not answer a signal."""
        grace, alone = self._settings.grace_seconds, distributed.count() == 1
        patience = min(_PATIENCE_SECONDS, grace / 4)
        name, left = signal.Signals(signum).name, came + grace - now
        if alone and now - max(came, self._now[2]) > patience and self._now[0] in _SAVABLE and self._take():
            self._end(f"stopped by {name}", 128 + signum, left)
        if left < _LOOK_SECONDS and not self._ended.is_set():
            late = f"after the {grace:g} s of watch.grace_seconds"
            self._leave(f"stopped by {name} while {self._doing()}, {late}", 128 + signum)

    def _watch_time(self, now: float) -> None:
        settings, (phase, _, since) = self._settings, self._now
        idle = now - self._progressed
        if phase in ("data", "device", "step") and not self._is_reported and self._times:
            limit = max(settings.stall_seconds, settings.stall_factor * statistics.median(self._times))
            if idle > limit:
                self._is_reported = True
                print(f"no step for {idle:.0f} s: {self._doing()}\n{stacks()}", file=sys.stderr, flush=True)
        if phase == "data" and now - since > settings.data_seconds:
            self._stop(f"no batch came in {settings.data_seconds:g} s (watch.data_seconds) while {self._doing()}")
        elif settings.end_seconds is not None and idle > settings.end_seconds and distributed.count() == 1:
            self._stop(f"no progress for {settings.end_seconds:g} s (watch.end_seconds) while {self._doing()}")

    def _stop(self, cause: str) -> None:
        if distributed.count() == 1 and self._now[0] in _SAVABLE and self._take():
            self._end(f"error: {cause}", 3, self._settings.grace_seconds)
        self._leave(f"error: {cause}", 3)

    def _take(self) -> bool:
        """Takes over from the main thread, which blocks at its next `enter`; False if it just went on."""
        with self._lock:
            self._is_taken = self._now[0] in _SAVABLE
            return self._is_taken

    def _end(self, cause: str, code: int, seconds: float) -> None:
        """Saves in yet another thread, since that may hang, too, and ends the process."""
        results: deque[str] = deque()

        def rescue() -> None:
            try:
                results.append(self._rescue())
            except Exception as error:
                results.append(f"the newest state could not be saved ({error})")

        saving = threading.Thread(target=rescue, name="rescue", daemon=True)
        saving.start()
        saving.join(max(seconds, 0) + 0.1)
        self._leave(f"{cause}; {results[0] if results else 'the newest state could not be saved in time'}", code)

    def _leave(self, text: str, code: int) -> None:
        print(f"\n{text}; {how_to_continue()}", file=sys.stderr, flush=True)
        peers.fail(HostError(text.removeprefix("error: ")), code)
        os._exit(code)

    def _doing(self) -> str:
        phase, step, _ = self._now
        first = (step - 1) * self._batch_size
        return _DOING[phase].format(step=step, positions=f"{first:,} to {first + self._batch_size - 1:,}")


def stacks() -> str:
    """The stack of every thread, the main thread last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == threading.main_thread().ident)
    parts = (f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(f))}" for ident, f in frames)
    return "\n".join(parts)

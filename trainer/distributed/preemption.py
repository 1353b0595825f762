"""Ctrl-C and SIGTERM: the step in hand is finished and saved, then the run ends."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from trainer.errors import CollectiveError


class Interrupted(KeyboardInterrupt, CollectiveError):
    """The run was asked to stop and has saved its state; in all of its processes alike."""

    def __init__(self, step: int, signum: int) -> None:
        """`step` is where the run can go on."""
        super().__init__(
            f"stopped by {signal.Signals(signum).name} at step {step}, which is saved; launch it again to go on"
        )
        self.signum = signum


class Preemption:
    """While entered, notes SIGINT and SIGTERM instead of letting them break a step; a second SIGINT acts at once.

    Outside of the main thread, where Python takes no handlers, it notes nothing. With several processes, a signal to
    any of them is for all: JAX takes SIGTERM there and tells the others, and a SIGINT is handed on to it.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._signum: int | None = None
        self._group = jax.process_count() > 1
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self._enabled and threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT,) if self._group else (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def stops_after(self, step: int) -> int | None:
        """The signal after which the run is to end with `step`, if one came. Ask at every step, once.

        Several processes get the same answer, but for the signal: SIGTERM in those that got none.
        """
        if not self._group:
            return self._signum
        return (self._signum or signal.SIGTERM) if reached_preemption_sync_point(step) else None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None and signum == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self._signum = signum
        if self._group:
            os.kill(os.getpid(), signal.SIGTERM)

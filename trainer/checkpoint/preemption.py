"""Ctrl-C and SIGTERM: the step in hand is finished and saved, then the run ends."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved its state."""

    def __init__(self, step: int, signum: int) -> None:
        """`step` is where the run can go on."""
        super().__init__(
            f"stopped by {signal.Signals(signum).name} at step {step}, which is saved; launch it again to go on"
        )
        self.signum = signum


class Preemption:
    """While entered, notes SIGINT and SIGTERM instead of letting them break a step; a second SIGINT acts at once.

    Outside of the main thread, where Python takes no handlers, it notes nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            signal.default_int_handler(signum, frame)
        self.signum = signum

"""How the processes of a run agree at which step a signal to any of them stops them all."""

import math
import threading
from collections.abc import Callable


class Agreement:
    """Chooses one number N: every process stops at its N-th call of `signal_after`.

    N is one more than the most calls that any process has made. Process 0 asks the others for the number of their
    calls. After it has answered, a process blocks in `signal_after` until process 0 has sent N.

    JAX's `reached_preemption_sync_point` does the same, but waits for a message with Python's global lock held, and
    `relay` needs that lock to pass the message on.
    """

    def __init__(self, index: int, other_count: int, say: Callable[..., None]) -> None:
        """`say` sends a message from process 0 to all `other_count` others, and from another process to process 0."""
        self._index, self._other_count, self._say = index, other_count, say
        self._changed = threading.Condition()
        self._signum: int | None = None
        self._calls, self._last = 0, math.inf
        self._is_held = False
        self._answers: dict[int, int] = {}  # process 0: the calls of the others

    def signal_after(self, signum: int | None) -> int | None:
        """The signal that stops all processes with this call; None if they go on. This process received `signum`."""
        with self._changed:
            if signum is not None and self._signum is None:
                self._hold(signum)
            while self._is_held:
                self._changed.wait()
            self._calls += 1
            return self._signum if self._calls >= self._last else None

    def take(self, index: int, kind: str, value: int) -> None:
        """Takes a message of process `index`; the thread that receives messages calls it."""
        with self._changed:
            if kind == "stop":
                if self._index > 0:
                    self._signum, self._is_held = value, True
                    self._say("calls", self._calls)
                elif self._signum is None:
                    self._hold(value)
            elif kind == "calls":
                self._answers[index] = value
                if len(self._answers) == self._other_count:
                    last = 1 + max(self._calls, *self._answers.values())
                    self._say("last", last)
                    self._stop_at(last)
            elif kind == "last":
                self._stop_at(value)

    def _hold(self, signum: int) -> None:
        self._signum, self._is_held = signum, True
        self._say("stop", signum)

    def _stop_at(self, last: int) -> None:
        self._last, self._is_held = last, False
        self._changed.notify_all()

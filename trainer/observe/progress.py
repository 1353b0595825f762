"""The progress line: one that is rewritten on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TextIO


class Progress:
    """Shows step, loss, examples per second and the time that is left."""

    def __init__(self, total_steps: int, stream: TextIO | None = None, *, seconds: float = 0.1) -> None:
        """On a terminal the line is drawn at most every `seconds`; elsewhere every update is a line."""
        self._total = total_steps
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._seconds = seconds
        self._drawn_at = -float("inf")
        self._width = 0

    def update(self, step: int, loss: float, examples_per_second: float, seconds_left: float) -> None:
        """Shows where the run is."""
        if self._live and step < self._total and time.monotonic() - self._drawn_at < self._seconds:
            return
        self._drawn_at = time.monotonic()
        line = (
            f"step {step:>{len(str(self._total))}}/{self._total}  loss {loss:.4f}  "
            f"{examples_per_second:,.0f} examples/s  ETA {clock(seconds_left)}"
        )
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def message(self, text: str) -> None:
        """A line of its own, which stays."""
        self.end_line()
        self._stream.write(text + "\n")
        self._stream.flush()

    def end_line(self) -> None:
        """Lets what comes next begin on a line of its own."""
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

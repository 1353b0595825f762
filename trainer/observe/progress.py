"""Progress of a run: one line that is rewritten on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TextIO


class Progress:
    """Shows step, loss, examples per second and the remaining time."""

    def __init__(self, total_steps: int, stream: TextIO | None = None, *, seconds: float = 0.1) -> None:
        """Writes to `stream`, None for standard output; redraws the line on a terminal at most every `seconds`."""
        self._total, self._stream, self._seconds = total_steps, stream or sys.stdout, seconds
        self._live, self._drawn_at, self._width = self._stream.isatty(), -float("inf"), 0

    def update(self, step: int, loss: float, examples_per_second: float, seconds_left: float) -> None:
        """Shows the metrics of a step."""
        if self._live and step < self._total and time.monotonic() - self._drawn_at < self._seconds:
            return
        self._drawn_at = time.monotonic()
        line = (
            f"step {step:>{len(str(self._total))}}/{self._total}  loss {loss:.4f}  "
            f"{examples_per_second:,.0f} examples/s  ETA {clock(seconds_left)}"
        )
        self._stream.write("\r" + line.ljust(self._width) if self._live else line + "\n")
        self._width = len(line) if self._live else 0
        self._stream.flush()

    def message(self, text: str) -> None:
        """Writes `text` in lines of its own, which stay."""
        self.end_line()
        print(text, file=self._stream, flush=True)

    def end_line(self) -> None:
        """Ends the progress line, so that other output begins on a new line."""
        if self._width:
            print(file=self._stream, flush=True)
            self._width = 0


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

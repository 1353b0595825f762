"""Progress of a run: one line that is rewritten on a terminal, plain lines elsewhere. A broken stream ends it."""

import sys
import time
from typing import TextIO


class Progress:
    """Shows step, loss, examples per second and the remaining time. No method raises an error of the stream."""

    def __init__(self, total_steps: int, stream: TextIO | None = None, *, redraw_seconds: float = 0.1) -> None:
        """Writes to `stream`, None for standard output.

        On a terminal it redraws the line at most every `redraw_seconds`.
        """
        self._total, self._redraw_seconds = total_steps, redraw_seconds
        self._stream: TextIO | None = stream or sys.stdout  # None if the process has none
        self._live, self._drawn_at, self._width = _is_terminal(self._stream), -float("inf"), 0

    def update(self, step: int, loss: float, examples_per_second: float, seconds_left: float) -> None:
        """Shows the metrics of a step."""
        if self._live and step < self._total and time.monotonic() - self._drawn_at < self._redraw_seconds:
            return
        self._drawn_at = time.monotonic()
        line = (
            f"step {step:>{len(str(self._total))}}/{self._total}  loss {loss:.4f}  "
            f"{examples_per_second:,.0f} examples/s  ETA {clock(seconds_left)}"
        )
        self._write("\r" + line.ljust(self._width) if self._live else line + "\n")
        self._width = len(line) if self._live else 0

    def message(self, text: str) -> None:
        """Writes `text` in lines of its own, which stay."""
        self.end_line()
        self._write(text + "\n")

    def end_line(self) -> None:
        """Ends the progress line, so that other output begins on a new line."""
        if self._width:
            self._write("\n")
            self._width = 0

    def _write(self, text: str) -> None:
        """Writes and flushes; an error of the stream ends the progress, not the run."""
        if self._stream is None:
            return
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream was closed
            self._stream = None


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Standard output and standard error that may close, fill up, lack characters or be absent."""

import io
import os
import sys
from typing import Any

from trainer.errors import HostError


class _Descriptor(io.RawIOBase):
    """Writes to a file descriptor until that fails for the first time; what comes later is dropped."""

    def __init__(self, descriptor: int, name: str, *, is_needed: bool) -> None:
        super().__init__()
        self._descriptor, self._name, self._is_needed = descriptor, name, is_needed
        self._has_failed = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        """Writes the bytes, and returns how many.

        Raises `BrokenPipeError` or `HostError` once, if this output is all that the command is for.
        """
        if not self._has_failed:
            try:
                return os.write(self._descriptor, data)
            except OSError as error:
                self._has_failed = True
                if self._is_needed:
                    if isinstance(error, BrokenPipeError):
                        raise
                    raise HostError(f"{self._name} cannot be written: {error.strerror}") from error
        return len(data)


def make_safe(*, is_needed: bool) -> None:
    """Replaces `sys.stdout` and `sys.stderr` by streams that end quietly where they can no longer write.

    Python itself would end with an exception, and with exit code 120. A character that the encoding lacks is shown as a
    question mark. A closed descriptor 0, 1 or 2 is opened on /dev/null; otherwise the next file we open would get that
    number.

    Args:
      is_needed: whether an error of standard output is raised, once: `BrokenPipeError` if its reader is gone, else
        `HostError`. Errors of standard error are never raised.
    """
    for descriptor in (0, 1, 2):
        _open_if_absent(descriptor)
    sys.stdout = _stream(sys.stdout, 1, "standard output", is_needed=is_needed)
    sys.stderr = _stream(sys.stderr, 2, "standard error", is_needed=False)


def _open_if_absent(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)


def _stream(old: io.TextIOWrapper | object, descriptor: int, name: str, *, is_needed: bool) -> io.TextIOWrapper:
    raw = io.BufferedWriter(_Descriptor(descriptor, name, is_needed=is_needed))
    encoding = getattr(old, "encoding", None) or "utf-8"
    # `python -u` sets `write_through`.
    is_line_buffered = descriptor == 2 or os.isatty(descriptor) or getattr(old, "write_through", False)
    return io.TextIOWrapper(raw, encoding, errors="replace", line_buffering=is_line_buffered)

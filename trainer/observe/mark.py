"""The mark that each sync leaves in `tensorboard/`: what is on disk, so that a launch need not read it again.

A mark may be lost or older than the files at any time. Then the launch reads more, and the result is the same.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trainer.observe.row_file import Prefix

NAME = ".written.json"


class Mark(NamedTuple):
    """The rows on disk, and how far the event files have them."""

    metrics: Prefix = Prefix()
    timing: Prefix = Prefix()
    in_events: int = 0  # bytes of metrics.jsonl whose rows are in the event files
    files: int = 0  # event files
    newest: str = ""  # the last one that was synced
    newest_size: int = 0  # its bytes then


def read_mark(folder: Path) -> Mark | None:
    """The mark in a folder; None if there is none, or no valid one."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            metrics, timing, in_events, files, newest, newest_size = json.loads(stream.read(1 << 12))
        mark = Mark(Prefix(*metrics), Prefix(*timing), in_events, files, newest, newest_size)
    except (OSError, RecursionError, TypeError, ValueError):
        return None
    numbers = (*mark.metrics, *mark.timing, mark.in_events, mark.files, mark.newest_size)
    return mark if isinstance(newest, str) and all(type(x) is int and x >= -1 for x in numbers) else None


def write_mark(folder: Path, mark: Mark) -> None:
    """Writes the mark, in place, as a full disk still allows that; if it cannot, no mark is left."""
    try:
        # Without waiting for a reader, if it is a pipe.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(folder / NAME, flags, 0o666)
        try:
            length = os.pwrite(descriptor, json.dumps(mark).encode(), 0)
            os.ftruncate(descriptor, length)
        finally:
            os.close(descriptor)
    except OSError:
        with suppress(OSError):  # an older mark is true as well, unless the files were cut since
            (folder / NAME).unlink()

"""The record that each sync leaves in `tensorboard/`, so that a launch need not read again what is on disk.

A record may be lost or older than the files at any time. Then the launch reads more, and the result is the same.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trainer.observe.row_file import Prefix

NAME = ".written.json"


class SyncRecord(NamedTuple):
    """Sizes of the files that the last sync put on disk: the two of rows, and the event files."""

    metrics: Prefix = Prefix()
    timing: Prefix = Prefix()
    bytes_in_events: int = 0  # bytes of metrics.jsonl whose rows are in the event files
    file_count: int = 0  # event files
    newest: str = ""  # the name of the last event file that was synced
    newest_size: int = 0  # its size in bytes at this sync


def read_record(folder: Path) -> SyncRecord | None:
    """The record in a folder; None if there is none, or no valid one."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            metrics, timing, bytes_in_events, file_count, newest, newest_size = json.loads(stream.read(1 << 12))
        record = SyncRecord(Prefix(*metrics), Prefix(*timing), bytes_in_events, file_count, newest, newest_size)
    except (OSError, RecursionError, TypeError, ValueError):
        return None
    numbers = (*record.metrics, *record.timing, record.bytes_in_events, record.file_count, record.newest_size)
    return record if isinstance(newest, str) and all(type(x) is int and x >= -1 for x in numbers) else None


def write_record(folder: Path, record: SyncRecord) -> None:
    """Writes the record in place, which a full disk still allows; if that fails, no record is left."""
    try:
        # O_NONBLOCK: if it is a pipe, do not wait for a reader.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(folder / NAME, flags, 0o666)
        try:
            length = os.pwrite(descriptor, json.dumps(record).encode(), 0)
            os.ftruncate(descriptor, length)
        finally:
            os.close(descriptor)
    except OSError:
        with suppress(OSError):  # remove the old record: it is wrong if the files were truncated since
            (folder / NAME).unlink()

"""TensorBoard event files.

The caller's thread writes each event at once: there is no other thread, and no queue that could fill up. A network file
system that hangs blocks the run.
"""

import errno
import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute] - made at import
from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute] - made at import
from tensorboardX.record_writer import masked_crc32c

from trainer.files import AnyPath

_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\..+")


class Events:
    """Writes event files into a folder, one after the other. Every error is an `OSError` and closes the file."""

    def __init__(self, folder: Path, earlier: Iterable[str] = ()) -> None:
        """Writes into `folder`; `earlier` names event files that are there already, or in a bucket."""
        self._folder, self._earlier = folder, set(earlier)
        self._descriptor: int | None = None
        self.file_count = 0  # event files, with the earlier ones
        self.name, self.size = "", 0  # name and size in bytes of the newest file

    @property
    def is_open(self) -> bool:
        """Whether events can be added."""
        return self._descriptor is not None

    def begin(self, purge_from: int | None = None) -> None:
        """Begins a file that TensorBoard reads after all others.

        TensorBoard then drops all earlier values of steps ≥ `purge_from`.
        """
        self._folder.mkdir(exist_ok=True)
        if self._folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a link, which is not followed")
        parent = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            names = self._earlier | set(event_files(self._folder))
            stamps = [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]
            # TensorBoard sorts the files by name: the new one must come last even if the clock was set back.
            stamp = max(int(time.time()), *(stamp + 1 for stamp in stamps)) if stamps else int(time.time())
            self.name, self.size, self.file_count = f"events.out.tfevents.{stamp:010}.{_host()}", 0, len(stamps) + 1
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(self.name, flags, 0o666, dir_fd=parent)
        finally:
            os.close(parent)
        first = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if purge_from is not None:
            start = SessionLog(status=SessionLog.START)
            first.append(Event(wall_time=time.time(), step=purge_from, session_log=start))
        try:
            for event in first:
                self._write(event)
        except OSError:
            self.discard()
            raise

    def add_scalars(self, step: int, values: Mapping[str, Any], timestamp: float) -> None:
        """Adds the numbers among the values of a step; `timestamp` is in seconds since 1970."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if numbers:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()])
            self.add(summary, step, timestamp)

    def add(self, summary: Any, step: int, timestamp: float) -> None:
        """Adds a `Summary`, such as one that `tensorboardX.summary.image` makes."""
        self._write(Event(wall_time=timestamp, step=step, summary=summary))

    def sync(self) -> None:
        """Puts all events on disk."""
        if self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            except OSError:
                self.close()
                raise

    def discard(self) -> None:
        """Removes the newest file, which this object began and could not complete."""
        self.close()
        with suppress(OSError):  # if the unlink fails, TensorBoard shows some steps twice; no value is lost
            (self._folder / self.name).unlink()

    def close(self) -> None:
        """Closes the file; does nothing if it is closed."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):  # `sync` raised the error of an event that did not reach the disk
                os.close(descriptor)

    def _write(self, event: Any) -> None:
        assert self._descriptor is not None
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        pending, position = b"".join((length, checksums[0], data, checksums[1])), self.size
        try:
            while pending:
                written = os.pwrite(self._descriptor, pending, position)
                position, pending = position + written, pending[written:]
        except OSError:
            with suppress(OSError):  # readers skip an incomplete last event
                os.ftruncate(self._descriptor, self.size)
            self.close()
            raise
        self.size = position


def event_files(folder: AnyPath) -> list[str]:
    """The names of the event files in a folder, in the order in which TensorBoard reads them; a link has none."""
    if not folder.is_dir() or (isinstance(folder, Path) and folder.is_symlink()):
        return []
    return sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name))


def read_events(data: bytes) -> Iterator[Any]:
    """The `Event`s in the bytes of a file, up to the first incomplete one."""
    position = 0
    while position + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        begin, end = position + 12, position + 12 + length
        if end + 4 > len(data):
            return
        try:
            yield Event.FromString(data[begin:end])
        except DecodeError:
            return
        position = end + 4


def shown_values(contents: Iterable[bytes]) -> set[tuple[str, int]]:
    """The (tag, step) of the values that TensorBoard shows after it read these files, one after the other."""
    shown: set[tuple[str, int]] = set()
    for data in contents:
        for event in read_events(data):
            if event.session_log.status == SessionLog.START:
                shown = {(tag, step) for tag, step in shown if step < event.step}
            shown |= {(value.tag, event.step) for value in event.summary.value}
    return shown


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname()) or "host"

"""A file of rows of metrics: appended to, cut after a step, and repaired when it is damaged.

A launch must not wait for a long log. The last sync stored the size and CRC-32 of the file (a `Prefix`). If they still
match, only the rows after that size are parsed.
"""

import json
import os
import secrets
import stat
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trainer.files import DamagedError, sync_folder, write_text
from trainer.observe.rows import Row, is_torn, lines_from_end, row_or_none


class Prefix(NamedTuple):
    """The first rows of a file: their number, their size in bytes, their CRC-32, and the step of the last one."""

    row_count: int = 0
    size: int = 0
    crc32: int = 0
    step: int = -1


_NOTHING = Prefix()


class RowFile:
    """Appends rows to a file. They stay in memory until they are synced: a later write repeats one that failed."""

    def __init__(
        self,
        file: Path,
        after_step: int,
        report: Callable[[str], None],
        fetch: Callable[[], object] = lambda: None,
    ) -> None:
        """Makes and reads nothing.

        Args:
          file: on this machine.
          after_step: `open` cuts off the rows of later steps.
          report: shows one line about damage.
          fetch: brings the rows of earlier launches to `file`, if they are elsewhere. `open` calls it first. If it
            raises `OSError`, so does `open`, and the next `flush` begins with `open`.
        """
        self.file, self._after_step, self._report, self._fetch = file, after_step, report, fetch
        self.matches_prefix = False  # whether `open` found the rows of an earlier sync unchanged
        self.was_damaged = False  # whether `open` moved a file aside, and reported it
        self._descriptor: int | None = None
        self._synced = _NOTHING
        self._tail = bytearray()  # rows since the last sync
        self._tail_rows, self._tail_step = 0, -1
        self._written = 0  # where the whole rows in the file end

    @property
    def count(self) -> int:
        """How many rows there are, with those that are not written yet."""
        return self._synced.row_count + self._tail_rows

    @property
    def size(self) -> int:
        """The bytes of all rows, with those that are not written yet."""
        return self._synced.size + len(self._tail)

    @property
    def synced(self) -> Prefix:
        """The rows that were on disk when the file was last synced or opened."""
        return self._synced

    def open(self, known: Prefix = _NOTHING) -> None:
        """Opens the file and cuts it. It does not parse the rows of an earlier sync, `known`, if they are unchanged.

        A damaged file is kept aside under a new name, and its readable rows are carried over. Raises `OSError`.
        """
        self._fetch()
        self._set_aside_unless_regular()
        try:
            self._descriptor = _open(self.file)
            self.matches_prefix = _begins_with(self._descriptor, known)
            try:
                _end_last_line(self._descriptor)
                self._cut(known if self.matches_prefix else _NOTHING)
            except DamagedError as error:
                self.matches_prefix = False
                self.close()
                self._repair(str(error))
                self._descriptor = _open(self.file)
                self._cut(_NOTHING)
        except OSError:
            self.close()  # so that `flush` begins with `open`
            raise

    def append(self, step: int, row: Row) -> None:
        """Takes a row, which `flush` writes."""
        self._tail += json.dumps({"step": step, **row}).encode() + b"\n"
        self._tail_rows, self._tail_step = self._tail_rows + 1, step

    def flush(self) -> None:
        """Writes all rows that are not in the file yet, or none of them; raises `OSError`."""
        if self._descriptor is None:
            self.open()
        assert self._descriptor is not None
        position, pending = self._written, bytes(self._tail[self._written - self._synced.size :])
        try:
            while pending:
                length = os.pwrite(self._descriptor, pending, position)
                position, pending = position + length, pending[length:]
        except OSError:
            with suppress(OSError):  # the next attempt writes to the same place, whatever stays there
                os.ftruncate(self._descriptor, self._written)
            raise
        self._written = position

    def sync(self) -> None:
        """Writes all rows and puts them on disk; raises `OSError`."""
        self.flush()
        assert self._descriptor is not None
        try:
            os.fsync(self._descriptor)
        except OSError:
            self._written = self._synced.size  # the kernel may have dropped what it could not put on disk
            raise
        if self._tail:
            crc32 = zlib.crc32(self._tail, self._synced.crc32)
            self._synced = Prefix(self.count, self.size, crc32, self._tail_step)
            self._tail, self._tail_rows = bytearray(), 0

    def rows_from_byte(self, offset: int) -> list[Row]:
        """The readable rows that begin at or after a byte of the file, oldest first."""
        in_file = self._read(offset, self._synced.size) if offset < self._synced.size else b""
        lines = in_file + bytes(self._tail[max(offset - self._synced.size, 0) :])
        return [row for line in lines.split(b"\n") if (row := row_or_none(line)) is not None]

    def rows_from_step(self, step: int) -> list[Row]:
        """The readable rows from a step on, oldest first; reads from the end of the file."""
        newer = [row for row in self.rows_from_byte(self._synced.size) if row["step"] >= step]
        older: list[Row] = []
        if self._descriptor is not None:
            for _, line in lines_from_end(self._descriptor, self._synced.size):
                row = row_or_none(line)
                if row is not None and row["step"] < step:
                    break
                older += [row] if row is not None else []
        return [*reversed(older), *newer]

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self, start: int, end: int) -> bytes:
        return b"" if self._descriptor is None else os.pread(self._descriptor, end - start, start)

    def _cut(self, known: Prefix) -> None:
        """Truncates the file after the last row whose step is at most `after_step`; `DamagedError` for a bad line."""
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        cut, step, row_count = None, -1, known.row_count
        for start, line in lines_from_end(self._descriptor, size):
            if cut is not None and start < known.size:
                break  # the rest matches `known`
            row = row_or_none(line)
            if row is None:
                raise DamagedError("it has a line that is not a row of metrics")
            if row["step"] <= self._after_step:
                if cut is None:
                    cut, step = start + len(line), row["step"]
                row_count += start >= known.size
            elif cut is not None:
                raise DamagedError("its rows are not in the order of their steps")
            else:
                row_count -= start < known.size
        cut = cut or 0
        if cut < size:
            os.ftruncate(self._descriptor, cut)
            os.fsync(self._descriptor)
        if cut == 0:
            sync_folder(self.file.parent)  # the file may be new
        self._synced = Prefix(row_count, cut, _crc32(self._descriptor, cut), step)
        self._written = cut

    def _set_aside_unless_regular(self) -> None:
        try:
            mode = os.lstat(self.file).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISREG(mode):
            what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no regular file"
            aside = _aside(self.file)
            self.file.rename(aside)
            sync_folder(self.file.parent)
            self.was_damaged = True
            self._report(f"warning: {self.file} is {what}, and was moved to {aside.name}; it is begun anew")

    def _repair(self, problem: str) -> None:
        """Renames the damaged file and puts one with its readable rows in its place."""
        kept, aside = [], _aside(self.file)
        lines = self.file.read_bytes().removesuffix(b"\n").split(b"\n")
        for number, line in reversed(list(enumerate(lines, 1))):
            row = row_or_none(line)
            if row is None:
                problem = f"line {number} is not a row of metrics"  # in the end the first one: the loop runs backwards
            elif row["step"] <= self._after_step:
                kept.append(line.decode() + "\n")
        self.file.rename(aside)
        try:
            write_text(self.file, "".join(reversed(kept)))
        except OSError:
            aside.rename(self.file)
            raise
        self.was_damaged = True
        self._report(
            f"warning: {self.file} is damaged: {problem}; it is kept as {aside.name}, "
            f"and its {len(kept):,} readable rows up to step {self._after_step} are carried over"
        )


def _end_last_line(descriptor: int) -> None:
    """Handles a last line without a newline.

    A whole row gets its newline, and half a row is removed. Anything else raises `DamagedError`.
    """
    size = os.fstat(descriptor).st_size
    start, line = next(lines_from_end(descriptor, size), (0, b"\n"))
    if line.endswith(b"\n"):
        return
    if row_or_none(line) is not None:
        os.pwrite(descriptor, b"\n", size)
    elif is_torn(line):
        os.ftruncate(descriptor, start)
    else:
        raise DamagedError("its last line is not a row of metrics")


def _open(file: Path) -> int:
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def _aside(file: Path) -> Path:
    return file.with_name(f"{file.name}.damaged-{secrets.token_hex(4)}")


def _begins_with(descriptor: int, known: Prefix) -> bool:
    return known.size <= os.fstat(descriptor).st_size and _crc32(descriptor, known.size) == known.crc32


def _crc32(descriptor: int, size: int) -> int:
    crc32, position = 0, 0
    while position < size and (block := os.pread(descriptor, min(size - position, 1 << 20), position)):
        crc32, position = zlib.crc32(block, crc32), position + len(block)
    return crc32

"""Rows of metrics as lines of JSON: read whole, or from the end of a file."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.files import AnyPath, host_error

Row = dict[str, Any]

_CHUNK = 1 << 16


def read_rows(file: AnyPath) -> Iterator[Row]:
    """One row for each step of a file, with its metrics and those of its evaluation; none if there is no file.

    Skips a last line that a killed run left incomplete. Raises `UserError`, with the line number, for any other bad
    line, and if `file` is a folder or a link.
    """
    try:
        lines = contents(file).split(b"\n")
    except FileNotFoundError:
        return
    before: Row | None = None
    for number, line in enumerate(lines, 1):
        if number == len(lines) and (not line or (is_torn(line) and row_or_none(line) is None)):
            break
        try:
            row = _parse(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}, {error}") from error
        if before is not None and before["step"] == row["step"]:
            before = {**before, **row}
            continue
        if before is not None:
            yield before
        before = row
    if before is not None:
        yield before


def lines_from_end(descriptor: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file before byte `end`, with the byte at which each begins; the last line comes first."""
    tail, start, length = b"", end, _CHUNK
    while start > 0:
        begin = max(start - length, 0)
        block = os.pread(descriptor, start - begin, begin) + tail
        *whole, last = block.split(b"\n")
        lines = [line + b"\n" for line in whole] + ([last] if last else [])
        tail = lines.pop(0) if begin > 0 else b""  # it may begin before the block
        length = _CHUNK if lines else 2 * length  # so that a file without lines is read in a few blocks
        start, offset = begin, begin + len(block)
        for line in reversed(lines):
            offset -= len(line)
            yield offset, line


def _parse(line: bytes) -> Row:
    """The row in a line; raises `ValueError` with what the line is instead."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text: {error}") from error
    except RecursionError as error:
        raise ValueError("is not valid JSON: it is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(row, dict) or type(row.get("step")) is not int or not all(map(_is_value, row.values())):
        raise ValueError("is not a row of metrics")
    return row


def _is_value(value: object) -> bool:
    return (
        value is None
        or isinstance(value, int | float | str)
        or (isinstance(value, list) and all(isinstance(item, int | float | str) for item in value))
    )


def row_or_none(line: bytes) -> Row | None:
    """The row in a line; None if it is no row."""
    try:
        return _parse(line)
    except ValueError:
        return None


def is_torn(line: bytes) -> bool:
    """Whether a last line looks as a kill or a power failure leaves it: the beginning of a row, or zeros."""
    return line.startswith(b"{") or not line.strip(b"\0")


def contents(file: AnyPath) -> bytes:
    """The bytes of a file; raises `FileNotFoundError`, `UserError` for a folder or a link, and `HostError`."""
    try:
        if not isinstance(file, Path):
            return file.read_bytes()
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENOTDIR):
            raise UserError(f"{file} is a link or a folder, where a file of rows is expected") from error
        raise host_error(file, error) from error

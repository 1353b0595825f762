"""The lock of a workdir: one process at a time trains there, and a second one is told which."""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.errors import UserError

_BEAT_SECONDS = 10.0
_STALE_SECONDS = 60.0  # a lock of another host without a beat for so long is that of a dead process
_RACE_SECONDS = 0.5
_NO_FLOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, in its file `.lock`, until the block ends.

    The file names the holder: host, process and the time at which the process began. The kernel ends its `flock` with
    the process. Where `flock` is missing or is local to each host, the holder's name in the file decides: the holder
    touches the file every 10 s, and a lock is free if its process is gone from this host, or if another host's process
    has not touched it for 60 s.

    Raises `UserError` naming the holder if the lock is held, and `OSError` if the file cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder / ".lock", flags, 0o666)
    try:
        is_flocked = _flock(descriptor, folder)
        if (holder := _holder(descriptor)) is not None and not _is_gone(holder, descriptor):
            raise UserError(_held(folder, holder))
        own = {"host": socket.gethostname(), "pid": os.getpid(), "began": began(os.getpid())}
        _write(descriptor, json.dumps(own))
        if not is_flocked:  # another process may have written at the same time: the last one has it
            time.sleep(_RACE_SECONDS)
            if (holder := _holder(descriptor)) != own:
                raise UserError(_held(folder, holder))
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(descriptor, ended), name="beats of the lock", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            _write(descriptor, "")
    finally:
        os.close(descriptor)


def _flock(descriptor: int, folder: Path) -> bool:
    """Takes the kernel's lock; returns False where there is none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(_held(folder, _holder(descriptor))) from error
    except OSError as error:
        if error.errno not in _NO_FLOCKS:
            raise
        return False
    return True


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_SECONDS):
        with suppress(OSError):  # the next beat may succeed; a save notices a file system that stays away
            os.utime(descriptor)


def _holder(descriptor: int) -> dict[str, Any] | None:
    """The process that the file names; None if it names none."""
    try:
        value = json.loads(os.pread(descriptor, 1 << 12, 0))
    except (RecursionError, ValueError):
        return None
    return value if isinstance(value, dict) and {"host", "pid", "began"} <= value.keys() else None


def _is_gone(holder: dict[str, Any], descriptor: int) -> bool:
    if holder["host"] == socket.gethostname():
        return not isinstance(holder["pid"], int) or began(holder["pid"]) != holder["began"]
    before = os.fstat(descriptor)
    os.utime(descriptor)  # to read the clock of the file system, which may be another than ours
    now = os.fstat(descriptor).st_mtime
    os.utime(descriptor, ns=(before.st_atime_ns, before.st_mtime_ns))  # else repeated launches would keep it beating
    return now - before.st_mtime > _STALE_SECONDS


def began(pid: int) -> str | None:
    """When a process of this host began, in the kernel's words; None if there is none."""
    try:
        if sys.platform == "linux":
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:
        return "?"  # another user's process, whose beginning is not known
    return "?"


def _held(folder: Path, holder: dict[str, Any] | None) -> str:
    if holder is None:
        return f"another process is training in workdir {folder}"
    free = f"; if that host is gone, launch again {_STALE_SECONDS:.0f} s after its end"
    away = free if holder["host"] != socket.gethostname() else ""
    return f"another process is training in workdir {folder} (process {holder['pid']} on {holder['host']}){away}"


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)

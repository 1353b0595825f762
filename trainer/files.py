"""Small files of a workdir: read and written whole, on disk before anything depends on them, and never through a link.

A workdir may come from a stranger. Opening a file there follows no link, and temporary names cannot be predicted.
"""

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from etils import epath

from trainer.errors import HostError, UserError

AnyPath = Path | epath.Path

# Errors of a file's content or place, which stay as they are however often the file is read again.
_PERMANENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


class DamagedError(UserError):
    """A file that is there but does not hold what belongs in it; the message names the file."""


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket, such as `gs://bucket/runs/a`, and not on this machine."""
    return "://" in os.fspath(path)


def read_text(file: AnyPath) -> str:
    """The text of a file, UTF-8.

    Raises `FileNotFoundError` if nothing is there, `DamagedError` if it is no text, a folder or a link, and `HostError`
    if the machine cannot read it now.
    """
    with _read_errors(file):
        if is_bucket(file):
            return file.read_bytes().decode()
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
            return stream.read().decode()


def read_json(file: AnyPath) -> Any:
    """The JSON value of a file; errors are those of `read_text`, and `DamagedError` for anything but JSON."""
    text = read_text(file)
    with _read_errors(file):
        return json.loads(text)


@contextmanager
def _read_errors(file: AnyPath) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedError(f"{file} is a link, which is not followed in a workdir") from error
        if error.errno in _PERMANENT:
            raise DamagedError(f"{file} is not a file: {error.strerror}") from error
        raise host_error(file, error) from error
    except RecursionError as error:
        raise DamagedError(f"{file} is not valid JSON: it is nested too deep") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        kind = "text" if isinstance(error, UnicodeDecodeError) else "valid JSON"
        raise DamagedError(f"{file} is not {kind}: {error}") from error


def host_error(file: str | os.PathLike[str], error: OSError) -> HostError:
    """The one line for a file system that failed: the file and the cause."""
    return HostError(
        f"{os.fspath(file)}: {error.strerror or error}; nothing was removed, launch again when it is mended"
    )


def write_text(file: AnyPath, text: str) -> None:
    """Replaces or makes a file. After a crash, it holds either the old text or the new text, never a part.

    Raises `OSError`.
    """
    if is_bucket(file):
        file.write_text(text)  # a bucket object is replaced atomically
        return
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def open_append(file: Path) -> IO[bytes]:
    """A file to append bytes to, made if it is not there; unbuffered, and no link is followed. Raises `OSError`."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(file, flags, 0o666), "ab", buffering=0)


def sync_folder(folder: AnyPath) -> None:
    """Puts the entries of a folder on disk: names that were made, renamed or removed. Raises `OSError`."""
    if is_bucket(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: AnyPath) -> None:
    """Calls fsync on every file and folder below `folder`, on `folder` and on its parent. Raises `OSError`."""
    if is_bucket(folder):
        return
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(Path(place, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(place))
    sync_folder(folder.parent)

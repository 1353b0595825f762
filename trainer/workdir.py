"""The folder of one run: which run it holds, and that only one process trains in it."""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from trainer import config
from trainer.errors import UserError

Folder = Path | epath.Path


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket, such as `gs://bucket/runs/a`, and so in no folder of this machine."""
    return "://" in os.fspath(path)


class Mirror:
    """A folder of this machine to write in: the place itself or, for a bucket, one whose files are copied there."""

    def __init__(self, place: Folder) -> None:
        self._place, self._scratch = place, None
        if isinstance(place, Path):
            self.folder = place
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="trainer-")
            self.folder = Path(self._scratch.name)

    def push(self) -> None:
        """Copies every file to where it belongs, if it is not there."""
        if self._scratch is not None:
            for file in (path for path in self.folder.rglob("*") if path.is_file()):
                copy = self._place / file.relative_to(self.folder).as_posix()
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())

    def close(self) -> None:
        """Copies for the last time; a temporary folder is gone afterwards."""
        self.push()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


class Workdir:
    """Names of what lies in a workdir, a folder or a path in a bucket. Making one touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Folder = epath.Path(path) if is_bucket(path) else Path(path)
        self.config = self.path / "config.json"
        self.labels = self.path / "labels.txt"
        self.checkpoints = self.path / "checkpoints"

    def run(self) -> config.Run | None:
        """The resolved run kept here, or None.

        Raises:
          UserError: the JSON cannot be read.
        """
        if not self.config.is_file():
            return None
        try:
            return config.from_json(self.config.read_text())
        except (OSError, UserError) as error:
            raise UserError(f"{self.config} cannot be read: {error}") from error

    def check(self, run: config.Run) -> None:
        """Raises `UserError` if another run is kept here, or files that are no run's, or the path is no folder's."""
        if isinstance(self.path, Path):
            there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
            if not there.is_dir():
                what = "is" if there == self.path else f"lies below {there}, which is"
                raise UserError(f"workdir {self.path} {what} not a folder")
        kept = self.run()
        if kept is None:
            # Hidden files are our own: a launch that was killed before it wrote config.json may have left some.
            if self.path.is_dir() and any(not file.name.startswith(".") for file in self.path.iterdir()):
                raise UserError(f"workdir {self.path} holds files but no run (no config.json): choose a new folder")
            return
        found = config.differences(kept, run)
        if found and self.has_checkpoint():
            lengths = [re.match(r"(optimizer\..*\.run_steps) was ([1-9]\d*),", text) for text in found]
            flags = " ".join(f"--config.{length[1]}={length[2]}" for length in lengths if length)
            hint = f" (it follows total_steps: {flags} keeps the schedule as it was)" if flags else ""
            raise UserError(
                f"workdir {self.path} holds a run with other settings: {'; '.join(found[:4])}"
                f"{f' and {len(found) - 4} more' if len(found) > 4 else ''}{hint}; choose another --workdir"
            )

    def has_checkpoint(self) -> bool:
        """Whether any state was saved here; a run that has none may as well begin anew with other settings."""
        return self.checkpoints.is_dir() and any(path.name.isdecimal() for path in self.checkpoints.iterdir())

    def write(self, run: config.Run, labels: str) -> None:
        """Keeps the resolved run and its label table."""
        for file, text in ((self.config, config.to_json(run)), (self.labels, labels)):
            if is_bucket(file):  # where an object appears as a whole
                file.write_text(text)
                continue
            temporary = file.with_name(f".{file.name}.tmp")
            temporary.write_text(text)
            temporary.replace(file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and holds it for this process; the system lets go of it however the process ends.

        A bucket has no such locks: nothing keeps a second process out of it.
        """
        if is_bucket(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"nothing can be written in workdir {self.path}: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is training in workdir {self.path}") from error
            yield

"""The folder of one run, which holds its settings and lets only one process train in it."""

import copy
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from etils import epath

from trainer import config
from trainer.errors import UserError
from trainer.files import Folder, is_bucket


class Mirror:
    """A local folder to write in: the place itself or, for a bucket, a temporary folder that `push` copies there."""

    def __init__(self, place: Folder) -> None:
        self._place = place
        self._scratch = None if isinstance(place, Path) else tempfile.TemporaryDirectory(prefix="trainer-")
        self.folder = Path(self._scratch.name if self._scratch is not None else place)

    def push(self) -> None:
        """Copies every file to the bucket, if the place is one."""
        if self._scratch is not None:
            for file in (path for path in self.folder.rglob("*") if path.is_file()):
                target = self._place / file.relative_to(self.folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())

    def close(self) -> None:
        """Copies for the last time, and removes a temporary folder."""
        self.push()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


class Workdir:
    """The files of a workdir, a folder or a path in a bucket. Making one touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Folder = epath.Path(path) if is_bucket(path) else Path(path)
        names = ("config.json", "params.txt", "checkpoints")
        self.config, self.params, self.checkpoints = (self.path / name for name in names)

    def run(self) -> config.Run | None:
        """The resolved run kept here, or None; raises `UserError` if its JSON or a class that it names has changed."""
        try:
            return config.from_json(self.config.read_text()) if self.config.is_file() else None
        except (OSError, UserError) as error:
            raise UserError(f"{self.config} cannot be read: {error}") from error

    def check(self, run: config.Run) -> None:
        """Raises `UserError` if another run or other files are kept here, or if the path is that of a file."""
        if isinstance(self.path, Path) and self.path.exists() and not self.path.is_dir():
            raise UserError(f"workdir {self.path} is not a folder")
        if not self.config.is_file():
            # Hidden files are our own: a launch that was killed before it wrote config.json may have left some.
            if self.path.is_dir() and any(not file.name.startswith(".") for file in self.path.iterdir()):
                raise UserError(f"workdir {self.path} holds files but no run (no config.json): choose a new folder")
            return
        try:
            changes = config.differences(self.config.read_text(), run)
        except (OSError, UserError) as error:
            raise UserError(f"{self.config} cannot be read: {error}; choose another --workdir") from error
        if changes and self.has_checkpoint():
            more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
            raise UserError(
                f"workdir {self.path} holds a run with other settings: {'; '.join(changes[:4])}{more}"
                f"{_way_out(run, changes)}; choose another --workdir"
            )

    def has_checkpoint(self) -> bool:
        """Whether any state was saved here; a run without one may begin anew with other settings."""
        return self.checkpoints.is_dir() and any(path.name.isdecimal() for path in self.checkpoints.iterdir())

    def write(self, run: config.Run, params: str) -> None:
        """Keeps the resolved run and its table of parameters."""
        for file, text in ((self.config, config.to_json(run)), (self.params, params)):
            temporary = file if is_bucket(file) else file.with_name(f".{file.name}.tmp")  # objects appear at once
            temporary.write_text(text)
            if temporary != file:
                temporary.replace(file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, tries to write in it, and holds its lock until the block ends. A bucket has no locks."""
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                (self.path / ".trial").write_text("written to see whether it can be")
                (self.path / ".trial").unlink(missing_ok=True)
                if not is_bucket(self.path):
                    lock = stack.enter_context((self.path / ".lock").open("w"))
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is training in workdir {self.path}") from error
            except OSError as error:
                raise UserError(f"nothing can be written in workdir {self.path}: {error.strerror or error}") from error
            yield


def _way_out(run: config.Run, changes: Sequence[str]) -> str:
    """The flags by which a longer run keeps its schedules, or the reason why it cannot keep them."""
    kept = {m[1]: int(m[2]) for c in changes if (m := re.match(r"(optimizer\..*)\.run_steps was (\d+),", c))}
    if not kept:
        return ""
    run = copy.deepcopy(run)
    for path, steps in kept.items():
        config.schedules(run.optimizer)[path].run_steps = steps
    try:
        config.resolve(run)
    except UserError as error:
        return f" (run_steps follows total_steps, and its old value cannot be kept: {error})"
    flags = " ".join(f"--config.{path}.run_steps={steps}" for path, steps in kept.items())
    return f" (run_steps follows total_steps: {flags} keeps the schedule as it was)"

"""The folder of one run, which holds its settings and lets only one process train in it."""

import copy
import importlib.util
import json
import os
import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from trainer import config
from trainer.errors import UserError
from trainer.files import AnyPath, DamagedError, host_error, is_bucket, read_json, write_text
from trainer.lock import locked

_NAME_BYTES = 255  # the longest name of a file or folder


class Mirror:
    """A local folder to write in: the place itself or, for a bucket, a temporary folder that `push` copies there."""

    def __init__(self, place: AnyPath) -> None:
        self._place = place
        self.folder = place if isinstance(place, Path) else Path(tempfile.mkdtemp(prefix="trainer-"))
        # Also removes a temporary folder that an error left behind.
        self._remove = None if self.folder is place else weakref.finalize(self, shutil.rmtree, self.folder, True)

    def push(self) -> None:
        """Copies every file to the bucket, if the place is one."""
        if self._remove is not None and self._remove.alive:
            for file in (path for path in self.folder.rglob("*") if path.is_file()):
                target = self._place / file.relative_to(self.folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())

    def close(self) -> None:
        """Copies for the last time, and removes a temporary folder."""
        self.push()
        if self._remove is not None:
            self._remove()


class Workdir:
    """The files of a workdir, a folder or a path in a bucket. Making one touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: AnyPath = _folder(os.fspath(path))
        names = ("config.json", "params.txt", "checkpoints")
        self.config_file, self.params_file, self.checkpoints = (self.path / name for name in names)
        self._identity: tuple[int, int] | None = None  # device and inode when it was locked

    def stored_json(self) -> dict[str, Any] | None:
        """The JSON of the run stored here, None if there is none; raises `DamagedError` if the file is not one."""
        try:
            value = read_json(self.config_file)
        except FileNotFoundError:
            return None
        if not isinstance(value, dict) or value.get("$class") != f"{config.Run.__module__}:{config.Run.__qualname__}":
            raise DamagedError(f"{self.config_file} is not the JSON of a run")
        return value

    def stored_run(self) -> config.Run | None:
        """The resolved run stored here, or None; raises `UserError` if its JSON or a class it names has changed."""
        if (kept := self.stored_json()) is None:
            return None
        try:
            return config.from_json(json.dumps(kept))
        except UserError as error:
            raise UserError(f"{self.config_file} cannot be read: {error}") from error

    def check(self) -> None:
        """Raises `UserError` unless the path is free, or is a folder without links that is empty or holds a run."""
        if not isinstance(self.path, Path):
            return
        if self.path.is_symlink() and not self.path.exists():
            raise UserError(f"workdir {self.path} is a link that leads nowhere")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"workdir {self.path} is not a folder")
        files = list(self.path.iterdir()) if self.path.is_dir() else []
        for file in files:
            if file.is_symlink():
                raise UserError(f"{file} is a link, which is not followed in a workdir: put the file or folder there")
        if self.checkpoints in files and not self.checkpoints.is_dir():
            raise UserError(f"{self.checkpoints} is not a folder: move it elsewhere, or choose another --workdir")
        # Hidden files are our own: a launch that was killed before it wrote config.json may have left some.
        shown = [file for file in files if not file.name.startswith(".")]
        if self.has_checkpoint() or not shown:
            return  # a lost or damaged config.json is written again
        if not self.config_file.exists():
            raise UserError(f"workdir {self.path} holds files but no run (no config.json): choose a new folder")
        try:
            self.stored_json()
        except DamagedError as error:
            raise UserError(f"{error}; choose another --workdir") from error

    def check_run(self, run: config.Run) -> None:
        """Raises `UserError` if the stored run differs from `run` in a setting that is not harmless."""
        self.check()
        try:
            kept = self.stored_json() if self.has_checkpoint() else None
        except DamagedError:  # the checkpoint has a copy
            kept = None
        changed = [change.text for change in config.changed_settings(kept, run) if not change.harmless] if kept else []
        if changed:
            raise UserError(f"{self.other_settings(run, changed)}; choose another --workdir")

    def other_settings(self, run: config.Run, changed: Sequence[str]) -> str:
        """The beginning of an error: the settings that differ, and the flags that keep schedules as they were."""
        return f"workdir {self.path} holds a run with other settings: {listed(changed)}{_way_out(run, changed)}"

    def has_checkpoint(self) -> bool:
        """Whether any state was saved here; a run without one may begin anew with other settings."""
        return self.checkpoints.is_dir() and any(path.name.isdecimal() for path in self.checkpoints.iterdir())

    def accepted(self) -> list[dict[str, Any]]:
        """The changes of the trajectory that were accepted here: step, texts, and the hash of the config before."""
        try:
            found = (self.stored_json() or {}).get("$accepted", [])
        except DamagedError:
            return []
        return found if isinstance(found, list) else []

    def write(self, run: config.Run, table_text: str | None, accepted: Sequence[Mapping[str, Any]] = ()) -> None:
        """Keeps the resolved run, the changes that were accepted, and the table of parameters if it is known.

        Raises `HostError`.
        """
        kept = json.loads(config.to_json(run)) | ({"$accepted": list(accepted)} if accepted else {})
        for file, text in ((self.config_file, json.dumps(kept, indent=2) + "\n"), (self.params_file, table_text)):
            try:
                if text is not None:
                    write_text(file, text)
            except OSError as error:
                raise host_error(file, error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder, tries to write in it, and holds its lock until the block ends. A bucket has no locks."""
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_text(self.path / ".trial", "written to see whether it can be")
                (self.path / ".trial").unlink(missing_ok=True)
                if isinstance(self.path, Path):
                    stack.enter_context(locked(self.path))
                    self._identity = _identity(self.path)
            except OSError as error:
                raise UserError(f"nothing can be written in workdir {self.path}: {error.strerror or error}") from error
            yield

    def is_replaced(self) -> bool:
        """Whether the path no longer leads to the folder that was locked: it was moved, removed or replaced."""
        return self._identity is not None and _identity(self.path) != self._identity

    def beside(self) -> "Workdir":
        """A new workdir beside this one, or in the temporary folder if the parent is gone.

        It is for a state that can no longer be saved here.
        """
        parent = self.path.parent if self.path.parent.is_dir() else Path(tempfile.gettempdir())
        return Workdir(parent / f"{self.path.name}.rescued-{secrets.token_hex(4)}")


def listed(texts: Sequence[str], most: int = 4) -> str:
    """Some texts in one line."""
    more = f"; and {len(texts) - most} more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more


def _folder(path: str) -> AnyPath:
    """The path as an object. Raises `UserError` if no file system can have such a path."""
    if is_bucket(path):
        scheme = path.partition("://")[0]
        if scheme == "gs" and not _can_open_gs():
            raise UserError(f"workdir {path} is in a bucket, which needs: pip install 'belief-trainer[gcs]'")
        try:
            return epath.Path(path)
        except KeyError as error:
            raise UserError(f"workdir {path!r} is on {scheme}://, which is unknown; gs:// is a bucket") from error
    if "\0" in path:
        raise UserError(f"workdir {path!r} holds a null character, which no file system takes")
    if long := next((name for name in path.split("/") if len(os.fsencode(name)) > _NAME_BYTES), None):
        raise UserError(f"workdir has a name of {len(os.fsencode(long))} bytes; at most {_NAME_BYTES} are possible")
    return Path(path)


def _can_open_gs() -> bool:
    return any(map(importlib.util.find_spec, ("gcsfs", "tensorflow")))


def _identity(path: AnyPath) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _way_out(run: config.Run, changes: Sequence[str]) -> str:
    """The flags by which a longer run keeps its schedules, or the reason why it cannot keep them."""
    kept = {m[1]: int(m[2]) for c in changes if (m := re.match(r"(optimizer\..*)\.run_steps was (\d+),", c))}
    if not kept:
        return ""
    run = copy.deepcopy(run)
    for path, steps in kept.items():
        config.schedules_of(run.optimizer)[path].run_steps = steps
    try:
        config.resolve(run)
    except UserError as error:
        return f" (run_steps follows total_steps, and its old value cannot be kept: {error})"
    flags = " ".join(f"--config.{path}.run_steps={steps}" for path, steps in kept.items())
    return f" (run_steps follows total_steps: {flags} keeps the schedule as it was)"

"""The phase log of a training: a line for each phase, batch, save and restore, which another process can follow."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trainer import distributed
from trainer.errors import HostError, UserError


class PhaseLog:
    """Appends to `FOLDER/process_<i>.jsonl`; each line is in the file as soon as the method that writes it returns.

    Each launch begins with a line that has its process id, so one folder can hold several launches.
    """

    is_on = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Makes the folder. The number in the file's name is that of this process.

        Raises `HostError` if the file cannot be written, as does every method that writes a line.
        """
        self._path = Path(folder) / f"process_{distributed.index()}.jsonl"
        with self._write_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._write({"launch": os.getpid()})

    def phase(self, name: str, step: int) -> None:
        """Writes the line that says: the main thread enters a phase of an update.

        Args:
          name: "restore", "compile", "data", "step", "device", "evaluate" or "save".
          step: the update, counted from 1; 0 for "restore", and for "compile" where it makes a fresh state.
        """
        self._write({"phase": name, "step": step})

    def saving(self, step: int) -> None:
        """Writes the line that says: the state of `step` is on the host, and a thread writes it to disk."""
        self._write({"saving": step})

    def saved(self, step: int) -> None:
        """Writes the line that says: the checkpoint of `step` is safe on disk."""
        self._write({"saved": step})

    def batch(self, step: int, ids: np.ndarray | None, places: np.ndarray) -> None:
        """Writes the line that says: this process read these examples of the batch of an update.

        Args:
          step: the update that consumes it, counted from 1.
          ids: int64, the index in the source of each example that this process read. If None, no line is written.
          places: int64, the place of each of these examples in the global batch.
        """
        if ids is not None:
            self._write({"batch": step, "ids": ids.tolist(), "places": places.tolist()})

    def restored(self, step: int, state: Any) -> None:
        """Writes the line that says: the state of `step` was restored, with the SHA-256 of each array's bytes, by path.

        All processes call it together.
        """
        self._write({"restored": step, "digests": digests_of(state)})

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _write(self, line: dict[str, Any]) -> None:
        data = (json.dumps({**line, "time": round(time.monotonic(), 6)}) + "\n").encode()
        with self._write_errors():
            while data:  # one call, so that lines of two threads do not mix; on a disk that fills up the second fails
                data = data[os.write(self._file, data) :]

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HostError(f"{self._path} cannot be written: {error.strerror}") from error


class NoPhaseLog:
    """The phase log of a run that nobody follows: every method does nothing."""

    is_on = False

    def phase(self, name: str, step: int) -> None:
        """Does nothing."""

    def saving(self, step: int) -> None:
        """Does nothing."""

    def saved(self, step: int) -> None:
        """Does nothing."""

    def batch(self, step: int, ids: np.ndarray | None, places: np.ndarray) -> None:
        """Does nothing."""

    def restored(self, step: int, state: Any) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def digests_of(tree: Any) -> dict[str, str]:
    """The SHA-256 of the bytes of each array of a tree, by path.

    Arrays that are sharded over several processes are gathered, one at a time, so all processes must call it.
    """
    import jax
    from jax.experimental import multihost_utils

    from trainer.rules import path_of

    digests = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        digests[path_of(keys)] = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    return digests


class Follower:
    """Reads a file of a phase log while it grows."""

    def __init__(self, file: Path) -> None:
        """The file need not exist yet."""
        self._file, self._offset = file, 0

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """The complete lines that were added since the last call."""
        try:
            with self._file.open("rb") as stream:
                stream.seek(self._offset)
                text = stream.read()
        except FileNotFoundError:
            return
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            yield _parse(self._file, line)


def read_phase_log(folder: Path) -> list[Sequence[dict[str, Any]]]:
    """The lines of each process, in the order of their numbers; raises `UserError` if there are none.

    A process that was killed in the middle of a line, as on a full disk, leaves it incomplete: it is left out.
    """
    files = sorted(folder.glob("process_*.jsonl"), key=lambda file: int(file.stem.rpartition("_")[2]))
    if not files:
        raise UserError(f"{folder} holds no phase log")
    return [list(Follower(file).new_lines()) for file in files]


def _parse(file: Path, line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{file} holds a line that is not valid JSON: {line[:80]!r}") from error

"""The checkpoints of one run on disk. A thread saves them, and removes those that the settings do not keep."""

import math
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from trainer import config, distributed
from trainer.checkpoint.checksum import finite_and_checksums
from trainer.checkpoint.metadata import Metadata
from trainer.checkpoint.reading import arrays_handler, read_metadata, restore, short_message
from trainer.errors import HostError, UserError
from trainer.files import AnyPath, host_error, sync_folder, sync_tree
from trainer.state import TrainState

_TEMPORARY = ".orbax-checkpoint-tmp"


class Store:
    """The checkpoints of one run: a folder for each step.

    A folder gets the name of its step when the checkpoint is complete. Only in a bucket of `gs://` it has this name
    from the beginning, and Orbax writes its mark of completeness last.
    """

    def __init__(
        self, directory: AnyPath, settings: config.Checkpoint, *, on_saved: Callable[[int], None] = lambda step: None
    ) -> None:
        """Makes and reads nothing.

        A thread of the primary process calls `on_saved` with each step whose checkpoint is safe on disk.
        """
        self._directory = directory if isinstance(directory, epath.Path) else directory.absolute()
        self._settings, self._on_saved = settings, on_saved
        self._checkpointer: ocp.AsyncCheckpointer | None = None  # made at the first save
        self._saving: threading.Thread | None = None
        self._error: BaseException | None = None
        self.scores: dict[int, float] = {}
        """The value of `checkpoint.best_metric` by step, as far as known. The best checkpoint on disk is kept."""

    # Which checkpoints there are

    def steps(self) -> list[int]:
        """The steps of the checkpoints, ascending. Each call lists the folder: another process may save and remove."""
        return [step for step in self.step_names() if self._is_complete(self.path(step))]

    def step_names(self) -> list[int]:
        """All names that are step numbers, ascending; in a bucket only those of complete checkpoints.

        On a disk this includes, unlike `steps`, a name that is a file or a link: `set_aside` can move it away.
        """
        try:
            names = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
        except OSError as error:
            raise host_error(self._directory, error) from error
        steps = sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
        # In a bucket, a folder without its mark of completeness is left from a save that was killed.
        return [step for step in steps if isinstance(self._directory, Path) or self._is_complete(self.path(step))]

    def path(self, step: int) -> AnyPath:
        """The folder of a step."""
        return self._directory / str(step)

    def best_step(self) -> int | None:
        """The step on disk with the best metric, the earliest of equals.

        None if the run has no best metric, or if no checkpoint on disk has a score.
        """
        sign = 1 if self._settings.best_mode == "max" else -1
        values = self.scores.copy()  # in one step: the main thread may add one while a save ends
        known = [(-sign * value, step) for step, value in values.items() if not math.isnan(value)]
        kept = set(self.steps())
        return min(((value, step) for value, step in known if step in kept), default=(0, None))[1]

    def choose(self, step: int | str) -> int:
        """The step that a number, "latest" or "best" means; raises `UserError` if there is no such checkpoint."""
        if not (steps := self.steps()):
            raise UserError("there is no checkpoint yet")
        if step == "latest":
            return steps[-1]
        if step == "best":
            if self._settings.best_metric is None:
                raise UserError("no best checkpoint is kept: the run has no checkpoint.best_metric")
            if (best := self.best_step()) is None:
                raise UserError(f"no kept checkpoint has a {self._settings.best_metric} in metrics.jsonl")
            return best
        if not str(step).isdecimal() or int(step) not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"there is no checkpoint of step {str(step)!r}; there are {known}, latest, best")
        return int(step)

    # Saving

    def save(self, state: TrainState, metadata: Metadata) -> bool:
        """Waits for the previous save, then starts this one.

        Returns False and saves nothing if an array holds NaN or Inf. It copies the arrays to the host before it
        returns; a thread writes them afterwards. All processes call it. Raises `HostError` if this checkpoint cannot be
        written, and the error of the previous save.
        """
        self.wait()
        is_finite, checksums = finite_and_checksums(state)
        if not is_finite:
            return False
        metadata = metadata.with_state(state, checksums)
        if self._checkpointer is None:
            items = {"state": arrays_handler(), "metadata": ocp.JsonCheckpointHandler()}
            handler = ocp.CompositeCheckpointHandler(**items)
            # Otherwise Orbax would wait minutes for a folder that cannot be made.
            options = ocp.AsyncOptions(create_directories_asynchronously=False)
            self._checkpointer = ocp.AsyncCheckpointer(handler, async_options=options)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(metadata.to_json()))
        try:
            with self._write_errors(metadata.step):
                self._checkpointer.save(self.path(metadata.step), args=items)
        except HostError:
            self._close_checkpointer()
            raise
        self._saving = threading.Thread(target=self._finish, args=(metadata.step,), name="end of a save")
        self._saving.start()
        return True

    def _finish(self, step: int) -> None:
        """Waits until a save is complete.

        Then the primary process fsyncs its files and folders, calls `on_saved`, and removes older checkpoints.
        """
        assert self._checkpointer is not None
        try:
            with self._write_errors(step):
                self._checkpointer.wait_until_finished()
                if distributed.is_primary():
                    sync_tree(self.path(step))
            if distributed.is_primary():
                self._on_saved(step)
                self.remove_old()
        except BaseException as error:  # the main thread raises it in `raise_save_error`
            self._error = error
            self._close_checkpointer()

    def _close_checkpointer(self) -> None:
        """Ends the threads of Orbax; the next save makes new ones.

        After a failed save each of them may keep an error, which Orbax would raise, once, in the next save.
        """
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is None:
            return
        for _ in range(8):
            with suppress(OSError, RuntimeError, ValueError):
                checkpointer.close()
                return

    def remove_old(self) -> None:
        """Removes the checkpoints that the settings do not keep; never the newest one. Raises `HostError`."""
        steps, settings = self.steps(), self._settings
        kept = {*steps[-settings.keep_last :], self.best_step()}
        for step in steps:
            forever = settings.keep_every_steps is not None and step % settings.keep_every_steps == 0
            if step not in kept and not forever:
                # A rename first: if a kill interrupts the removal, no half of a checkpoint has the name of a step.
                doomed = self._directory / f".removed-{step}-{secrets.token_hex(4)}"
                try:
                    self.path(step).rename(doomed)
                    doomed.rmtree() if isinstance(doomed, epath.Path) else shutil.rmtree(doomed)
                except OSError as error:
                    newest = f"the newest checkpoint, of step {steps[-1]}, is complete"
                    raise HostError(f"checkpoint {step} cannot be removed: {short_message(error)}; {newest}") from error

    def is_saving(self) -> bool:
        """Whether a save is under way in the background."""
        return self._saving is not None and self._saving.is_alive()

    def raise_save_error(self) -> None:
        """Raises the error of a save that failed in the background, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Returns when every save is on disk; raises the error of a save that failed in the background."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        self.raise_save_error()

    def close(self, error: BaseException | None = None) -> None:
        """Waits for the save in the background and raises its error.

        If the run already ends with an `error`, a `HostError` of the save is dropped; any other is still raised.
        """
        try:
            self.wait()
        except HostError:
            if error is None:
                raise
        finally:
            self._close_checkpointer()

    @contextmanager
    def _write_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            steps = [s for s in self.steps() if s != step]
            last = f"the last good checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
            raise HostError(f"checkpoint {step} cannot be written: {short_message(error)}; {last}") from error

    # Reading

    def metadata(self, step: int) -> Metadata:
        """The metadata of a step; errors are those of `read_metadata`."""
        return read_metadata(self.path(step))

    def restore(self, like: TrainState, step: int, metadata: Metadata | None = None) -> TrainState:
        """The state at `step`, as `reading.restore` gives it."""
        return restore(self.path(step), like, metadata or self.metadata(step))

    # Checkpoints that are not used

    def set_aside(self, step: int, reason: str) -> AnyPath:
        """Moves a checkpoint into `set_aside/`, beside the folder of the checkpoints, and returns its new path."""
        folder = self._directory.parent / "set_aside"
        folder.mkdir(exist_ok=True)
        numbers = (f"-{i}" if i else "" for i in range(10**6))
        place = next(p for number in numbers if not (p := folder / f"{step}-{reason}{number}").exists())
        self.path(step).rename(place)
        sync_folder(folder)
        sync_folder(self._directory)
        return place

    def remove_incomplete(self) -> None:
        """Removes what killed saves and removals left behind; only the process that holds the workdir's lock may do so.

        In a bucket of `gs://` the folder of an incomplete save already has the name of its step, and would be in the
        way when the run saves this step again.
        """
        for path in self._directory.iterdir() if self._directory.is_dir() else ():
            is_left = re.fullmatch(rf"\d+{re.escape(_TEMPORARY)}.*|\.removed-\d+-\w+", path.name)
            if is_left or (path.name.isdecimal() and not isinstance(path, Path) and not self._is_complete(path)):
                path.rmtree() if isinstance(path, epath.Path) else shutil.rmtree(path)

    def _is_complete(self, path: AnyPath) -> bool:
        if isinstance(path, Path):  # a rename gives a complete save its name
            return path.is_dir() and not path.is_symlink()
        return ocp.utils.is_checkpoint_finalized(path)


def scores(rows: Iterable[Mapping[str, Any]], metric: str | None) -> dict[int, float]:
    """The value of a metric by step, from the rows of metrics.jsonl; a value that is null there is NaN."""
    found = {row["step"]: row[metric] for row in rows if metric is not None and metric in row}
    return {step: math.nan if value is None else float(value) for step, value in found.items()}

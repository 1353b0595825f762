"""The checkpoints of one run on disk: saved in the background, verified when they are read, removed by retention."""

import errno
import math
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from trainer import config, distributed
from trainer.checkpoint.checksum import check_state
from trainer.checkpoint.metadata import Metadata, from_json, leaves_of
from trainer.errors import HostError, UserError
from trainer.files import DamagedError, Folder, host_error, read_json, sync_folder, sync_tree
from trainer.rules import path_of
from trainer.state import TrainState

_WAITS = (0.2, 1.0, 3.0)  # seconds before a read is tried again that failed for a reason that may pass
_TEMPORARY = ".orbax-checkpoint-tmp"
# Causes that TensorStore and Orbax report as text, of which none means that a file is damaged.
_PASSING = re.compile(
    "permission.denied|unavailable|deadline.exceeded|resource.exhausted|no space left|input/output error|stale file"
    "|not connected|too many open files|cannot allocate|quota|timed? ?out|read-only file system",
    re.IGNORECASE,
)


class Store:
    """The checkpoints of one run: a folder for each step, which has its name only when it is complete."""

    def __init__(
        self, directory: Folder, settings: config.Checkpoint, *, on_saved: Callable[[int], None] = lambda step: None
    ) -> None:
        """Makes and reads nothing. `on_saved` is called in another thread with each step that is safe on disk."""
        self._directory = directory if isinstance(directory, epath.Path) else directory.absolute()
        self._settings, self._on_saved = settings, on_saved
        self._arrays = ocp.PyTreeCheckpointHandler(use_compression=False)  # which saves 8 % of noise, at twice the time
        self._checkpointer: ocp.AsyncCheckpointer | None = None  # of the first save
        self._saving: threading.Thread | None = None
        self._error: BaseException | None = None
        self.scores: dict[int, float] = {}
        """The best metric of each step that was evaluated, as far as known; it decides what is kept."""

    # Which checkpoints there are

    def steps(self) -> list[int]:
        """The steps that are there, ascending; they are listed anew, since another process may save and remove."""
        try:
            names = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
        except OSError as error:
            raise host_error(self._directory, error) from error
        steps = sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
        return [step for step in steps if self._is_complete(self.path(step))]

    def path(self, step: int) -> Folder:
        """The folder of a step."""
        return self._directory / str(step)

    def best_step(self) -> int | None:
        """The kept step with the best metric, the earliest of equals; None if the run has none or none is known."""
        sign = 1 if self._settings.best_mode == "max" else -1
        known = [(-sign * value, step) for step, value in self.scores.items() if not math.isnan(value)]
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
        """Starts to save, after the save before has ended; returns False, and saves nothing, if a number is not finite.

        The arrays are copied to the host before it returns, and written afterwards. All processes call it.
        """
        self.wait()
        finite, checksums = jax.device_get(check_state(state))
        if not finite:
            return False
        metadata = metadata.with_state(state, checksums)
        if self._checkpointer is None:
            items = {"state": self._arrays, "metadata": ocp.JsonCheckpointHandler()}
            handler = ocp.CompositeCheckpointHandler(**items)
            # Else Orbax would wait minutes for a folder that cannot be made.
            options = ocp.AsyncOptions(create_directories_asynchronously=False)
            self._checkpointer = ocp.AsyncCheckpointer(handler, async_options=options)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(metadata.to_json()))
        with self._write_errors(metadata.step):
            self._checkpointer.save(self.path(metadata.step), args=items)
        self._saving = threading.Thread(target=self._finish, args=(metadata.step,), name="end of a save")
        self._saving.start()
        return True

    def _finish(self, step: int) -> None:
        """Waits until a save is complete, puts its names on disk, too, and only then removes older checkpoints."""
        assert self._checkpointer is not None
        try:
            with self._write_errors(step):
                self._checkpointer.wait_until_finished()
                if distributed.is_primary():
                    sync_tree(self.path(step))
                    self._on_saved(step)
                    self.remove_old()
        except BaseException as error:  # raised where the main thread looks next
            self._error = error

    def remove_old(self) -> None:
        """Removes the checkpoints that the settings do not keep; never the newest one."""
        steps, settings = self.steps(), self._settings
        kept = {*steps[-settings.keep_last :], self.best_step()}
        for step in steps:
            forever = settings.keep_every_steps is not None and step % settings.keep_every_steps == 0
            if step not in kept and not forever:
                # Under a name that is no step, so that a kill in the middle leaves nothing like a checkpoint.
                doomed = self._directory / f".removed-{step}-{secrets.token_hex(4)}"
                self.path(step).rename(doomed)
                doomed.rmtree() if isinstance(doomed, epath.Path) else shutil.rmtree(doomed)

    def is_saving(self) -> bool:
        """Whether a save is under way in the background."""
        return self._saving is not None and self._saving.is_alive()

    def check(self) -> None:
        """Raises the error of a save that failed in the background, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Returns when every save is on disk; raises the error of a save that failed in the background."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        self.check()

    def close(self) -> None:
        """Waits for every save and raises their errors; without it, a failed save could go unnoticed."""
        try:
            self.wait()
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()

    @contextmanager
    def _write_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            steps = [s for s in self.steps() if s != step]
            last = f"the last good checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
            raise HostError(f"checkpoint {step} cannot be written: {_cause(error)}; {last}") from error

    # Reading

    def metadata(self, step: int) -> Metadata:
        """The metadata of a step.

        Raises `DamagedError` if they are damaged or those of another step, `HostError` if they cannot be read now, and
        `FileNotFoundError` if the checkpoint is gone.
        """
        file = self.path(step) / "metadata" / "metadata"
        try:
            metadata = from_json(self._retry(lambda: read_json(file), step))
        except DamagedError as error:
            raise DamagedError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from error
        if metadata.step != step:
            raise DamagedError(f"{self.path(step)} holds the checkpoint of step {metadata.step}")
        return metadata

    def restore(self, like: TrainState, step: int, metadata: Metadata | None = None) -> TrainState:
        """The state at `step`, sharded as `like` (arrays or `jax.ShapeDtypeStruct`), once its checksums were compared.

        The leaves must be those of the metadata: compare them first. Errors are those of `metadata`.
        """
        metadata = metadata or self.metadata(step)

        def read() -> TrainState:
            if leaves_of(self._tree(step)) != dict(metadata.leaves):
                raise DamagedError(f"{self.path(step)} holds other arrays than its metadata say")
            return self._read(jax.tree.map(ocp.utils.to_shape_dtype_struct, like), step)

        state = self._retry(read, step)
        self._compare(dict(zip(leaves_of(like), jax.tree.leaves(state), strict=True)), metadata, step)
        return state

    def restore_fitting(self, like: TrainState, step: int, metadata: Metadata) -> dict[str, jax.Array]:
        """The saved arrays that fit `like`, by path: those of the same shape, cast to its dtype if both are floating.

        Their checksums were compared. Errors are those of `metadata`.
        """
        wanted = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(like)}

        def abstract(keys: Any, leaf: Any) -> Any:
            target = wanted.get(path := path_of(keys))
            saved = metadata.leaves[path]
            floating = jnp.issubdtype(saved.dtype, jnp.floating)
            if target is None or saved.shape != tuple(target.shape):
                return ocp.PLACEHOLDER
            if saved.dtype != str(target.dtype) and not (floating and jnp.issubdtype(target.dtype, jnp.floating)):
                return ocp.PLACEHOLDER
            return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=target.sharding)

        tree = jax.tree_util.tree_map_with_path(abstract, self._tree(step), is_leaf=_is_leaf)
        restored = self._retry(lambda: self._read(tree, step), step)
        leaves = jax.tree_util.tree_leaves_with_path(restored)
        found = {path_of(keys): leaf for keys, leaf in leaves if leaf is not ocp.PLACEHOLDER}
        self._compare(found, metadata, step)
        return {path: jnp.asarray(x, wanted[path].dtype) for path, x in found.items()}

    def _compare(self, arrays: Mapping[str, jax.Array], metadata: Metadata, step: int) -> None:
        _, sums = jax.device_get(check_state(list(arrays.values())))
        damaged = [path for path, here in zip(arrays, sums, strict=True) if metadata.checksums[path] != int(here)]
        if damaged:
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            raise DamagedError(f"{self.path(step)} is damaged: the checksum of {', '.join(damaged[:3])}{more} differs")

    def _tree(self, step: int) -> Any:
        """The arrays of a step as Orbax's own metadata describe them, a tree of nested dicts."""
        return self._arrays.metadata(epath.Path(self.path(step) / "state")).tree

    def _read(self, like: Any, step: int) -> Any:
        """The arrays as they are on disk.

        Not through Orbax's checkpointer: at its end the processes wait for each other, and would wait for ever for one
        that cannot read.
        """
        if not isinstance(sys.unraisablehook, _DropLateReadErrors):  # before a read can fail
            sys.unraisablehook = _DropLateReadErrors(sys.unraisablehook)
        arguments = ocp.checkpoint_utils.construct_restore_args(like)
        place = epath.Path(self.path(step) / "state")
        return self._arrays.restore(place, args=ocp.args.PyTreeRestore(like, restore_args=arguments))

    def _retry(self, read: Callable[[], Any], step: int) -> Any:
        """The result of `read`, which is tried again after an error that may pass."""
        for wait in (*_WAITS, None):
            try:
                return read()
            except (HostError, DamagedError, FileNotFoundError) as error:
                if wait is None or not isinstance(error, HostError):
                    raise
            except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError, RecursionError) as error:
                if not self.path(step).exists():
                    raise FileNotFoundError(errno.ENOENT, "No such checkpoint", str(self.path(step))) from error
                if not _may_pass(error):
                    kind = type(error).__name__
                    raise DamagedError(f"{self.path(step)} cannot be read: {kind}: {_cause(error)}") from error
                if wait is None:
                    raise HostError(f"{self.path(step)} cannot be read now: {_cause(error)}; it is kept") from error
            time.sleep(wait)
        raise AssertionError("the last wait is None")

    # Checkpoints that are not used

    def set_aside(self, step: int, reason: str) -> Folder:
        """Moves a step into `set_aside/` beside the checkpoints, and returns its new place. Nothing is removed."""
        folder = self._directory.parent / "set_aside"
        folder.mkdir(exist_ok=True)
        numbers = (f"-{i}" if i else "" for i in range(10**6))
        place = next(p for number in numbers if not (p := folder / f"{step}-{reason}{number}").exists())
        self.path(step).rename(place)
        sync_folder(folder)
        sync_folder(self._directory)
        return place

    def remove_incomplete(self) -> None:
        """Removes what saves that were killed left behind; only the process that holds the workdir's lock may do so."""
        for path in self._directory.iterdir() if self._directory.is_dir() else ():
            if re.fullmatch(rf"\d+{re.escape(_TEMPORARY)}.*|\.removed-\d+-\w+", path.name):
                path.rmtree() if isinstance(path, epath.Path) else shutil.rmtree(path)

    def _is_complete(self, path: Folder) -> bool:
        if isinstance(path, Path):  # it gets its name by a rename, at its end
            return path.is_dir() and not path.is_symlink()
        return ocp.utils.is_checkpoint_finalized(path)


def _is_leaf(x: Any) -> bool:
    return hasattr(x, "dtype")


def _may_pass(error: BaseException) -> bool:
    """Whether an error says nothing about the content of a file: a permission, a network, a disk."""
    passing = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOSPC, errno.EMFILE)
    return getattr(error, "errno", None) in passing or _PASSING.search(str(error)) is not None


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


class _DropLateReadErrors:
    """Drops errors of TensorStore reads that end after an earlier read failed and Orbax closed their event loop."""

    def __init__(self, report: Callable[[Any], Any]) -> None:
        self._report = report

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._report(unraisable)


def scores(rows: Iterator[Mapping[str, Any]], metric: str | None) -> dict[int, float]:
    """The value of a metric by step, from the rows of metrics.jsonl; a value that is null there is NaN."""
    found = {row["step"]: row[metric] for row in rows if metric is not None and metric in row}
    return {step: math.nan if value is None else float(value) for step, value in found.items()}

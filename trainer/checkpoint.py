"""Checkpoints: states with their metadata, which Orbax saves in the background; the newest and the best are kept."""

import math
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from trainer import config
from trainer.errors import UserError
from trainer.files import Folder
from trainer.params import ParamTable
from trainer.rules import path_of
from trainer.state import TrainState

_PACKAGES = ("belief-trainer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def make_metadata(run: config.Run, params: ParamTable, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint, as JSON values: step, resolved config, fingerprint of the parameters, versions."""
    return {"step": step, "config": config.to_json(run), "params": params.fingerprint(), "versions": versions()}


def check_metadata(metadata: dict[str, Any], params: ParamTable) -> list[str]:
    """One text for each version changed since the checkpoint; raises `UserError` if parameters or labels differ."""
    if metadata["params"] != params.fingerprint():
        raise UserError(
            f"the code has changed since the checkpoint at step {metadata['step']}: its parameter table (params.txt in "
            "the workdir) is not that of the model now (see `inspect`); choose another --workdir"
        )
    now, old = versions(), metadata["versions"]
    return [f"{name} was {was}, is {now.get(name, 'missing')}" for name, was in old.items() if now.get(name) != was]


def versions() -> dict[str, str]:
    """The versions that decide the bits of a run. A package that is imported without being installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # trainer/ in a checkout that is not installed
            found[package] = version(package)
    return found


class Store:
    """The checkpoints of one run. An interrupted save leaves a folder that is not taken for a checkpoint later."""

    def __init__(self, directory: Folder, settings: config.Checkpoint, *, read_only: bool = False) -> None:
        """Opens `directory`, and makes it unless `read_only`."""
        self._directory, self._keeps_best = directory, settings.best_metric is not None
        kept: list[Any] = [policies.LatestN(settings.keep_last)]
        options: dict[str, Any] = {"create": not read_only, "read_only": read_only}
        if self._keeps_best:
            metric, reverse = _best_metric(settings), settings.best_mode == "min"
            kept += [policies.BestN(get_metric_fn=metric, reverse=reverse, n=1, keep_checkpoints_without_metrics=False)]
            # Without best_fn, Orbax forgets the metrics when the directory is opened again.
            options |= {"best_fn": metric, "best_mode": settings.best_mode}
        self._manager = ocp.CheckpointManager(
            directory.absolute() if isinstance(directory, Path) else directory,
            # Named, so that metadata can be read before anything was saved or restored.
            item_handlers={"state": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(preservation_policy=policies.AnyPreservationPolicy(kept), **options),
        )

    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the best metric; None if the run has no best metric, or no checkpoint has it."""
        return self._manager.best_step() if self._keeps_best else None

    def choose(self, step: int | str) -> int:
        """The step that a number, "latest" or "best" means; raises `UserError` if there is no such checkpoint."""
        if not (steps := self.steps()):
            raise UserError("there is no checkpoint yet")
        if step == "latest":
            return steps[-1]
        if step == "best":
            if (best := self.best_step()) is None:
                raise UserError("no best checkpoint is kept: the run has no checkpoint.best_metric")
            return best
        if not str(step).isdecimal() or int(step) not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"there is no checkpoint of step {str(step)!r}; there are {known}, latest, best")
        return int(step)

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Copies `state` to the host, and starts to write it under the metadata's step; `metrics` choose the best."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata))
        self._manager.save(metadata["step"], args=items, metrics=metrics, force=True)  # the loop decides when

    def wait(self) -> None:
        """Returns when every save is on disk; raises the error of a save that failed in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for every save and raises their errors; without it, a failed save could go unnoticed."""
        self._manager.close()

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata of a step."""
        with self._read_errors(step):
            return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]

    def restore(self, like: TrainState, step: int) -> TrainState:
        """The state at `step`, sharded as `like` (arrays or `jax.ShapeDtypeStruct`); `UserError` if leaves differ."""
        with self._read_errors(step):
            wanted, saved = _leaves(like), _leaves(self._manager.item_metadata(step)["state"].tree)
            for path in [*wanted, *saved]:  # Orbax would cast another dtype and accept a missing leaf without an error
                there, here = saved.get(path, "missing"), wanted.get(path, "missing")
                if there != here:
                    misfit = f"{path} is {there} there, {here} here"
                    raise UserError(f"the checkpoint at step {step} does not fit this run: {misfit}")
            return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]

    @contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        """Raises one line in place of the many that Orbax and TensorStore write when files are damaged or missing."""
        if not isinstance(sys.unraisablehook, _DropLateReadErrors):  # before a read can fail
            sys.unraisablehook = _DropLateReadErrors(sys.unraisablehook)
        try:
            yield
        except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            earlier = [s for s in self.steps() if s < step]
            then = f"go on from step {earlier[-1]}" if earlier else "begin anew"
            raise UserError(
                f"checkpoint {step} cannot be read ({type(error).__name__}: {reason}); "
                f"remove {self._directory / str(step)} to {then}"
            ) from error


def _best_metric(settings: config.Checkpoint) -> Callable[[dict[str, float]], float]:
    """The value of the best metric; NaN, which compares as neither better nor worse, becomes the worst value."""
    worst = -math.inf if settings.best_mode == "max" else math.inf

    def metric(metrics: dict[str, float]) -> float:
        value = metrics.get(settings.best_metric or "", worst)
        return worst if math.isnan(value) else value

    return metric


class _DropLateReadErrors:
    """Drops errors of TensorStore reads that end after an earlier read failed and Orbax closed their event loop."""

    def __init__(self, report: Callable[[Any], Any]) -> None:
        self._report = report

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._report(unraisable)


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "dtype"))
    return {path_of(keys): (tuple(leaf.shape), str(leaf.dtype)) for keys, leaf in leaves}

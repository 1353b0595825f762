"""A trained model out of a workdir: its variables, without the optimizer state and without its data."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from os import PathLike
from typing import TypeVar

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from trainer import config, distributed
from trainer.checkpoint import Metadata, Store, scores
from trainer.checkpoint.reading import read_keys, restore_leaves
from trainer.errors import UserError
from trainer.experiment import Batch, Experiment, Variables
from trainer.files import DamagedError
from trainer.observe.log import read_rows
from trainer.optional import Predicts, offered
from trainer.resume import recover_run
from trainer.workdir import Workdir

_TRIES = 5  # attempts to read a checkpoint while another process trains and removes old checkpoints
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model."""

    run: config.Run  # its description, resolved
    variables: Variables  # "params", the EMA params if the run keeps them, and the model's collections
    step: int  # steps made
    metrics: Mapping[str, float]  # of this step, as far as they were logged, such as "test/accuracy"

    def __repr__(self) -> str:
        """One line, with the evaluations and without the arrays: a notebook prints it."""
        count = sum(x.size for x in jax.tree.leaves(self.variables["params"]))
        found = {name: value for name, value in self.metrics.items() if not name.startswith("train/")}
        metrics = "".join(f", {name} {value:.4g}" for name, value in found.items())
        return f"Trained({type(self.experiment).__name__}, step {self.step}, {count:,} parameters{metrics})"

    @property
    def experiment(self) -> Experiment:
        """That of the run."""
        return self.run.experiment

    def predict(self, batch: Batch) -> Mapping[str, jax.Array]:
        """The predictions of the experiment for a batch, jitted. Raises `UserError` if the experiment makes none."""
        return self._predict(self.variables, batch)

    @functools.cached_property
    def _predict(self) -> Callable[[Variables, Batch], Mapping[str, jax.Array]]:
        return jax.jit(predictor(self.experiment).predict)


def predictor(experiment: Experiment) -> Predicts:
    """The experiment, if it makes predictions; raises `UserError` if not."""
    if (found := offered(experiment, Predicts)) is not None:
        return found
    raise UserError(f"{type(experiment).__name__} has no method predict(variables, batch)")


def load(
    workdir: str | PathLike[str],
    step: int | str = "latest",
    *,
    run: config.Run | None = None,
    sharding: jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> Trained:
    """The model of a checkpoint, whatever devices it was trained on.

    It reads only the collections and the parameters or EMA params, and z and b1 of a schedule-free optimizer.

    Args:
      workdir: the folder of the run, which may also be in a bucket.
      step: that of the checkpoint, or "latest", or "best" by `checkpoint.best_metric`.
      run: the description of the run; None for the one that the workdir holds.
      sharding: of each array, or a function that gives it for a path, such as "params/head/kernel", and a shape; None
        for the first device of this process. All processes of a run load together.

    Raises `UserError` if the workdir holds no such checkpoint, or one that is damaged.
    """
    folder = Workdir(workdir)
    run = run_of(folder, run)
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(metadata: Metadata) -> Variables:
        kept = ("params/" if run.optimizer.ema_decay is None else "ema/", "collections/")
        paths = [path for path in metadata.leaves if path.startswith(kept)]

        def like(path: str, of: str) -> jax.ShapeDtypeStruct:
            leaf = metadata.leaves[path]
            here = sharding(of, leaf.shape) if callable(sharding) else sharding or first
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

        schedule_free = {} if run.optimizer.ema_decay is not None else schedule_free_paths(metadata)
        wanted = {path: like(path, path) for path in paths}
        for name, (z, b1) in schedule_free.items():
            wanted |= {z: like(z, f"params/{name}"), b1: jax.ShapeDtypeStruct(*metadata.leaves[b1], sharding=first)}
        arrays = restore_leaves(store.path(metadata.step), metadata, wanted)
        numbers = {b1: np.asarray(arrays[b1]) for _, b1 in schedule_free.values()}
        for name, (z, b1) in schedule_free.items():
            y = arrays[f"params/{name}"]
            arrays[f"params/{name}"] = ((y - (1 - numbers[b1]) * arrays[z]) / numbers[b1]).astype(y.dtype)
        kept_arrays = {path: x for path, x in arrays.items() if not path.startswith("opt_state/")}
        return _variables(kept_arrays, metadata, read_keys(store.path(metadata.step)))

    rows = {row["step"]: row for row in read_rows(folder.path / "metrics.jsonl")}
    with closing(Store(folder.checkpoints, run.checkpoint)) as store:
        store.scores = scores(rows.values(), run.checkpoint.best_metric)
        chosen, variables = read_step(store, step, read)
    row = {name: math.nan if value is None else value for name, value in rows.get(chosen, {}).items() if name != "step"}
    metrics = {name: value for name, value in row.items() if isinstance(value, float | int)}  # "accepted" is a list
    return Trained(run, variables, chosen, metrics)


def run_of(folder: Workdir, run: config.Run | None) -> config.Run:
    """The run given, or else that of the workdir, resolved; raises `UserError` unless the workdir has a checkpoint."""
    run = config.resolve(run) if run is not None else recover_run(folder)
    if run is None or not folder.has_checkpoint():
        raise UserError(f"workdir {folder.path} holds no {'run' if run is None else 'checkpoint'}")
    return run


def _variables(arrays: Mapping[str, jax.Array], metadata: Metadata, keys: Mapping[str, tuple[str, ...]]) -> Variables:
    """The variables whose leaves have these paths in a state; EMA params in the dtypes of the parameters."""
    found = {}
    for path, x in arrays.items():
        kind, *names = keys[path]
        if kind == "collections":
            found[tuple(names)] = x
        else:
            found["params", *names] = x.astype(metadata.leaves[f"params/{path.partition('/')[2]}"].dtype)
    return {"params": {}, **unflatten_dict(found)}


def schedule_free_paths(metadata: Metadata) -> dict[str, tuple[str, str]]:
    """The paths of z and b1 for each parameter of a schedule-free optimizer, see `optim.evaluation_params`."""
    found = {}
    for path in metadata.leaves:
        if not path.startswith("opt_state/others/"):
            continue
        for match in re.finditer("/(?=z/)", path):  # a label may be z, too
            prefix, name = path[: match.start()], path[match.end() + 2 :]
            if {f"{prefix}/b1", f"{prefix}/max_lr"} <= metadata.leaves.keys():
                found[name] = path, f"{prefix}/b1"
    return found


def read_step(store: Store, step: int | str, read: Callable[[Metadata], _Result]) -> tuple[int, _Result]:
    """The checkpoint that `step` means, and the result of `read` for it.

    If a concurrent training process removes the checkpoint, this function chooses again. All processes call it
    together. Raises `UserError` if there is no such checkpoint, or if it is damaged.
    """
    gone = ""
    for _ in range(_TRIES):
        with distributed.collective_errors("the checkpoint"):
            chosen = json.loads(distributed.gather("the chosen step", json.dumps(store.choose(step)))[0])
            gone, result = "", None
            try:
                result = read(store.metadata(chosen))
            except DamagedError as error:
                others = [f"--step={s}" for s in store.steps() if s != chosen]
                raise DamagedError(f"{error}; {f'try {others[-1]}' if others else 'it is the only one'}") from error
            except FileNotFoundError:
                gone = f"checkpoint {chosen} was removed while it was read: training goes on and keeps the newest"
        gone = next(filter(None, distributed.gather("a removed checkpoint", gone)), "")
        if result is not None and not gone:
            return chosen, result
    raise UserError(gone)

"""The folder about a step that diverged: its state, its examples and its key, which `replay` reads."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np

from trainer import config, distributed
from trainer.checkpoint import Data, Store, check_leaves, make_metadata, versions
from trainer.checkpoint.checksum import check_state
from trainer.data.stream import Order
from trainer.errors import UserError
from trainer.experiment import Batch
from trainer.files import DamagedError, Folder, read_json, write_text
from trainer.metrics import Metrics
from trainer.program import Program, run_keys
from trainer.state import TrainState
from trainer.step import step_keys

_FILE, _STATE = "step.json", "state"


class Diverged(NamedTuple):
    """A step that diverged, as its folder tells."""

    step: int  # counted from 1
    seed: int
    key: list[int]  # the data of the step's key, uint32
    positions: list[int]  # of the batch in the order of the examples: the first, and the one after the last
    ids: list[int]  # the index in the source of each example of the batch
    reason: str  # why the run was stopped
    recomputed: str  # what a second computation of the step gave
    has_state: bool  # whether the folder holds the state before the step
    versions: Mapping[str, str]
    config: Mapping[str, Any]  # the JSON of the resolved run


def keep(
    program: Program,
    folder: Folder,
    step: int,
    reason: str,
    *,
    data: Data,
    restore: Callable[[], TrainState],
    batches: Callable[[int], Iterator[Batch]],
) -> str:
    """Writes `folder` about a step that diverged, and returns a text about it. All processes of a run call it.

    The state before the step was donated to it, so it is made again: a state from before is restored, and the steps
    between are repeated.

    Args:
      program: of the run, on the devices on which it diverged.
      folder: a new folder, such as WORKDIR/diverged/STEP.
      step: the step, counted from 1.
      reason: why the run is stopped.
      data: the number and fingerprint of the training examples.
      restore: gives the state of a checkpoint from before the step, or a fresh one.
      batches: gives the batches on the devices that follow after so many steps.

    Raises `HostError` if the folder cannot be written.
    """
    run, state = program.run, restore()
    start = int(state.step)
    following = batches(start)
    for batch in itertools.islice(following, step - 1 - start):
        state, _ = program.train_step(state, batch)
    metadata = make_metadata(run, program.param_table, data, step - 1)
    with closing(Store(folder / _STATE, run.checkpoint)) as store:
        saved = store.save(state, metadata)
        store.wait()
    state, metrics = program.train_step(state, next(following))
    if not saved:
        text = f"the state before step {step} is not finite either"
    elif problem := not_finite(state, metrics):
        text = f"recomputed, {problem} again"
    else:
        text = "recomputed, it is finite: suspect the hardware or nondeterminism"
    first, stop = (step - 1) * run.batch_size, step * run.batch_size
    key = jax.random.fold_in(run_keys(run)[1], step - 1)
    described = Diverged(
        step,
        run.seed,
        np.asarray(jax.random.key_data(key)).tolist(),
        [first, stop],
        Order(data.examples, run.seed)(first, stop).tolist(),
        reason,
        text,
        saved,
        versions(),
        json.loads(config.to_json(run)),
    )
    if distributed.is_primary():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _FILE, json.dumps(described._asdict(), indent=2) + "\n")
    return f"{text}; python -m trainer replay {folder} looks for the cause"


def not_finite(state: TrainState, metrics: Metrics) -> str:
    """A text that names what a step made that is not finite; "" if all is."""
    for name in ("loss", "grad_norm"):
        value = metrics[name].compute()
        if not math.isfinite(value) and float(np.asarray(metrics[name].weight)):
            return f"the {name} is {value}"
    return "" if bool(check_state(state)[0]) else "the state after it holds NaN or Inf"


def read(folder: Folder) -> Diverged:
    """What `keep` wrote; raises `UserError` for any other folder."""
    file = folder / _FILE
    try:
        value = read_json(file)
    except (FileNotFoundError, DamagedError) as error:
        known = "WORKDIR/diverged/STEP is expected, which a run that diverged leaves"
        raise UserError(f"{folder} is no folder of a diverged step ({_FILE} is missing or damaged); {known}") from error
    kinds = Diverged.__annotations__
    fits = isinstance(value, dict) and value.keys() == kinds.keys()
    fits = fits and isinstance(value["step"], int) and all(isinstance(i, int) for i in value["ids"])
    if not (fits and isinstance(value["config"], dict)):
        raise UserError(f"{file} does not describe a step that diverged")
    return Diverged(**value)


def read_state(folder: Folder, diverged: Diverged, like: TrainState) -> TrainState:
    """The state before the step, sharded as `like`; raises `UserError` if there is none, or none that fits."""
    if not diverged.has_state:
        raise UserError(f"{folder} holds no state: that before step {diverged.step} was not finite already")
    with closing(Store(folder / _STATE, config.Checkpoint())) as store:
        metadata = store.metadata(diverged.step - 1)
        check_leaves(metadata, like)
        return store.restore(like, diverged.step - 1, metadata)


def keys_of(run: config.Run, step: int) -> tuple[Any, Any]:
    """The key of a step, counted from 1, and that of its examples."""
    return step_keys(run_keys(run)[1], step - 1)

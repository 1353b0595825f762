"""The folder about a step that diverged: the state before it, its examples and its key; `replay` reads it."""

import itertools
import json
import math
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any, NamedTuple

import jax
import numpy as np

from trainer import config, distributed
from trainer.checkpoint import Store, check_leaves, make_metadata
from trainer.checkpoint.checksum import finite_and_checksums
from trainer.data.mixture import order_of
from trainer.errors import DivergedError, HostError, UserError
from trainer.files import AnyPath, DamagedError, read_json, write_text
from trainer.keys import run_keys, step_keys
from trainer.metrics import Metrics
from trainer.session import Session
from trainer.state import TrainState
from trainer.versions import versions

_FILE, _STATE = "step.json", "state"
RECOMPUTED_SPIKE = "recomputed, all is finite and the loss is a spike again"


class Diverged(NamedTuple):
    """A step that diverged, as its folder tells."""

    step: int  # counted from 1
    seed: int
    # The data of fold_in(key of all steps, step − 1), uint32, which `step_keys` splits. For people who look: `replay`
    # computes its keys from the config.
    key: list[int]
    positions: list[int]  # of the batch in the order of the examples: the first, and the one after the last
    ids: list[int]  # the index in the source of each example of the batch
    reason: str  # why the run was stopped
    recomputed: str  # what a second computation of the step gave
    has_state: bool  # whether the folder holds the state before the step
    versions: Mapping[str, str]
    config: Mapping[str, Any]  # the JSON of the resolved run


def explain(session: Session, error: DivergedError) -> DivergedError:
    """The error with the last checkpoint and the folder about the step, which is written here.

    All processes of a run call it. The folder is WORKDIR/diverged/STEP. If it exists, `-again` is appended until the
    name is free.
    """
    step, store = error.step, session.store
    with suppress(HostError):  # an earlier save may have failed; that did not cause the divergence
        store.wait()
    earlier = [saved for saved in store.steps() if saved < step]
    last = f"the last checkpoint is that of step {earlier[-1]}" if earlier else "there is no checkpoint yet"
    # All processes find the same name: Orbax makes them wait for each other before it makes the folder.
    names = (f"{step}{'-again' * i}" for i in itertools.count())
    folder = next(path for name in names if not (path := session.workdir.path / "diverged" / name).exists())
    try:
        about = f"{_keep(session, error, earlier[-1] if earlier else 0, folder)}"
        about += f"; python -m trainer replay {folder} looks for the cause"
    except HostError as fault:
        about = f"nothing more is known: {fault}"
    drop = "; --config.numerics.on_nonfinite=skip would drop such updates" if error.can_be_skipped else ""
    return error.explained(f"the run is stopped, {last}; {about}{drop}")


def _keep(session: Session, error: DivergedError, start: int, folder: AnyPath) -> str:
    """Writes a new folder about a step that diverged, and returns what a second computation of the step gave.

    The state before the step was donated to it, so it is made again: the state of the checkpoint at `start` is restored
    (start 0: the run's initial state is made), and the steps between are repeated. Raises `HostError` if the folder
    cannot be written.
    """
    program, run, step = session.program, session.program.run, error.step
    plan = session.init_plan
    if start:
        state = session.store.restore(program.state, start)
    else:
        state, start = (program.init(), 0) if plan is None else (plan.state(), plan.start)
    batches = map(program.strategy.shard_batch, session.host_batches(start))
    for batch in itertools.islice(batches, step - 1 - start):
        state, _ = program.train_step(state, batch)
    metadata = make_metadata(run, program.param_table, session.resumed.data, step - 1)
    with closing(Store(folder / _STATE, run.checkpoint)) as store:
        has_state = store.save(state, metadata)
        store.wait()
    state, metrics = program.train_step(state, next(batches))
    if not has_state:
        text = f"the state before step {step} is not finite either"
    elif problem := not_finite(state, metrics):
        text = f"recomputed, {problem} again"
    elif "skipped" in metrics and metrics["skipped"].compute():
        text = RECOMPUTED_SPIKE
    else:
        text = "recomputed, it is finite: suspect the hardware or nondeterminism"
    first, stop = (step - 1) * run.batch_size, step * run.batch_size
    key = jax.random.fold_in(run_keys(run)[1], step - 1)
    described = Diverged(
        step,
        run.seed,
        np.asarray(jax.random.key_data(key)).tolist(),
        [first, stop],
        order_of(session.train_source, run.seed)(np.arange(first, stop)).tolist(),
        str(error),
        text,
        has_state,
        versions(),
        json.loads(config.to_json(run)),
    )
    if distributed.is_primary():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _FILE, json.dumps(described._asdict(), indent=2) + "\n")
    return text


def not_finite(state: TrainState, metrics: Metrics) -> str:
    """A text that names what a step made that is not finite; "" if all is."""
    for name in ("loss", "grad_norm"):
        value = metrics[name].compute()
        if not math.isfinite(value) and float(np.asarray(metrics[name].weight)):
            return f"the {name} is {value}"
    return "" if finite_and_checksums(state)[0] else "the state after it holds NaN or Inf"


def read(folder: AnyPath) -> Diverged:
    """The description that `explain` wrote; raises `UserError` for any other folder."""
    file = folder / _FILE
    try:
        value = read_json(file)
    except (FileNotFoundError, DamagedError) as error:
        steps = sorted(str(path) for path in (folder / "diverged").iterdir()) if (folder / "diverged").is_dir() else []
        known = "WORKDIR/diverged/STEP is expected, which a run that diverged leaves"
        known += f"; here are {', '.join(steps)}" if steps else ""
        raise UserError(f"{folder} is no folder of a diverged step ({_FILE} is missing or damaged); {known}") from error
    kinds = Diverged.__annotations__
    fits = isinstance(value, dict) and value.keys() == kinds.keys()
    fits = fits and isinstance(value["step"], int) and all(isinstance(i, int) for i in value["ids"])
    if not (fits and isinstance(value["config"], dict)):
        raise UserError(f"{file} does not describe a step that diverged")
    return Diverged(**value)


def read_state(folder: AnyPath, diverged: Diverged, like: TrainState) -> TrainState:
    """The state before the step, sharded as `like`; raises `UserError` if there is none, or none that fits."""
    if not diverged.has_state:
        raise UserError(f"{folder} holds no state: that before step {diverged.step} was not finite already")
    with closing(Store(folder / _STATE, config.Checkpoint())) as store:
        metadata = store.metadata(diverged.step - 1)
        check_leaves(metadata, like)
        return store.restore(like, diverged.step - 1, metadata)


def keys_of(run: config.Run, step: int) -> tuple[Any, Any]:
    """The keys of a step, counted from 1: that of its loss, and that from which its examples get theirs."""
    return step_keys(run_keys(run)[1], step - 1)

"""Evaluation: every example of a split once, whatever the batch size and the devices."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from os import PathLike

import jax
import numpy as np

from trainer import config, distributed
from trainer.checkpoint import Store, check_leaves, scores
from trainer.data import load
from trainer.data.stream import eval_batches, prefetch
from trainer.errors import UserError
from trainer.experiment import RandomAccessSource
from trainer.files import DamagedError
from trainer.metrics import Mean
from trainer.observe.log import read_rows
from trainer.program import Program, compile_program
from trainer.resume import kept_run
from trainer.state import TrainState
from trainer.workdir import Workdir

_TRIES = 5  # of reading a checkpoint that a training beside removes


@distributed.fail_fast()
def evaluate(
    workdir: str | PathLike[str], run: config.Run | None = None, *, step: int | str = "latest", split: str | None = None
) -> dict[str, float]:
    """Evaluates a checkpoint of a run on every example of a split. Writes nothing. All processes of a run call it.

    Args:
      workdir: the folder of the run.
      run: its description; None for the one that the workdir holds.
      step: that of the checkpoint, or "latest", or "best" by `checkpoint.best_metric`.
      split: the split given to the experiment's `source`; None for `evaluation.split`.

    Returns the metrics by name, such as "test/loss", "test/examples" (their number), and "step", the checkpoint's.
    Raises `UserError` if the workdir holds no such checkpoint, or one of another run, or there is no such split.
    """
    folder = Workdir(workdir)
    with distributed.collective_errors("the run"):
        run = config.resolve(run) if run is not None else kept_run(folder)
        if run is None or not folder.has_checkpoint():
            raise UserError(f"workdir {folder.path} holds no {'run' if run is None else 'checkpoint'}")
        folder.check_run(run)
        evaluation = dataclasses.replace(run.evaluation, split=run.evaluation.split if split is None else split)
        # `compile_program` would raise if this split lacked the best metric. The store below keeps the run's settings.
        checkpoint = dataclasses.replace(run.checkpoint, best_metric=None)
        program = compile_program(dataclasses.replace(run, evaluation=evaluation, checkpoint=checkpoint))
        source = load(program.eval_source, run.loading.in_memory_bytes)
    with closing(Store(folder.checkpoints, run.checkpoint)) as store:
        if step == "best":
            store.scores = scores(read_rows(folder.path / "metrics.jsonl"), run.checkpoint.best_metric)
        chosen, state = _restore(store, program, step)
    return evaluate_split(program, state, source) | {"step": chosen}


def _restore(store: Store, program: Program, step: int | str) -> tuple[int, TrainState]:
    """The checkpoint that `step` means, and its state. A training beside may remove it meanwhile: then another."""
    gone = ""
    for _ in range(_TRIES):
        with distributed.collective_errors("the checkpoint"):
            chosen = json.loads(distributed.gather("the chosen step", json.dumps(store.choose(step)))[0])
            gone, state = "", None
            try:
                metadata = store.metadata(chosen)
                check_leaves(metadata, program.state)
                state = store.restore(program.state, chosen, metadata)
            except DamagedError as error:
                others = [f"--step={s}" for s in store.steps() if s != chosen]
                raise DamagedError(f"{error}; {f'try {others[-1]}' if others else 'it is the only one'}") from error
            except FileNotFoundError:
                gone = f"checkpoint {chosen} was removed while it was read: training goes on and keeps the newest"
        gone = next(filter(None, distributed.gather("a removed checkpoint", gone)), "")
        if state is not None and not gone:
            return chosen, state
    raise UserError(gone)


def evaluate_split(
    program: Program, state: TrainState, source: RandomAccessSource, on_batch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """The metrics of `source` by name, such as "test/accuracy", and "test/examples", how many examples there are.

    `on_batch` is called after each batch; an exception of it ends the evaluation.
    """
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    strategy, size = program.strategy, program.eval_spec["mask"].shape[0]
    # Two batches keep the devices busy. On fake devices XLA:CPU deadlocks when programs with collectives overlap.
    fake = len(strategy.devices) > 1 and strategy.devices[0].platform == "cpu"
    local, threads = strategy.local_examples(size), program.run.loading.threads
    batches = eval_batches(source, size, local_examples=local, threads=threads)
    on_devices = prefetch(batches, strategy.shard_batch)
    for metrics in prefetch(on_devices, lambda batch: program.eval_step(state, batch), 0 if fake else 2):
        for name, mean in jax.device_get(metrics).items():
            sums[name] += (float(mean.total), float(mean.weight))
        on_batch()
    seen = round(sums.pop("examples")[0])
    if seen != len(source):
        raise UserError(f"the evaluation saw {seen} examples of {len(source)}")
    split = program.run.evaluation.split
    return {f"{split}/{name}": Mean(*sums[name]).compute() for name in sorted(sums)} | {f"{split}/examples": seen}

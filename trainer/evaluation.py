"""Evaluation: every example of a split once, whatever the batch size and the devices."""

import dataclasses
from collections.abc import Callable
from contextlib import closing
from os import PathLike

from trainer import config, distributed
from trainer.checkpoint import Metadata, Store, check_leaves, scores
from trainer.data import load
from trainer.data.stream import eval_batches, prefetch
from trainer.errors import UserError
from trainer.experiment import RandomAccessSource
from trainer.metrics import Metrics, add, numbers
from trainer.observe.log import read_rows
from trainer.program import Program, compile_program
from trainer.restore import read_step, run_of
from trainer.state import TrainState
from trainer.workdir import Workdir


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
        run = run_of(folder, run)
        folder.check_run(run)
        evaluation = dataclasses.replace(run.evaluation, split=run.evaluation.split if split is None else split)
        # `compile_program` would raise if this split lacked the best metric. The store below keeps the run's settings.
        checkpoint = dataclasses.replace(run.checkpoint, best_metric=None)
        program = compile_program(dataclasses.replace(run, evaluation=evaluation, checkpoint=checkpoint))
        source = load(program.eval_source, run.loading.in_memory_bytes)
    with closing(Store(folder.checkpoints, run.checkpoint)) as store:
        if step == "best":
            store.scores = scores(read_rows(folder.path / "metrics.jsonl"), run.checkpoint.best_metric)

        def restore(metadata: Metadata) -> TrainState:
            check_leaves(metadata, program.state)
            return store.restore(program.state, metadata.step, metadata)

        chosen, state = read_step(store, step, restore)
    return evaluate_split(program, state, source) | {"step": chosen}


def evaluate_split(
    program: Program, state: TrainState, source: RandomAccessSource, on_batch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """The metrics of `source` by name, such as "test/accuracy", and "test/examples", how many examples there are.

    `on_batch` is called after each batch; an exception of it ends the evaluation.
    """
    sums: Metrics | None = None
    strategy, size = program.strategy, program.eval_spec["mask"].shape[0]
    # Two batches keep the devices busy. On fake devices XLA:CPU deadlocks when programs with collectives overlap.
    fake = len(strategy.devices) > 1 and strategy.devices[0].platform == "cpu"
    local, threads = strategy.local_examples(size), program.run.loading.threads
    batches = eval_batches(source, size, local_examples=local, threads=threads)
    on_devices = prefetch(batches, strategy.shard_batch)
    for metrics in prefetch(on_devices, lambda batch: program.eval_step(state, batch), 0 if fake else 2):
        sums = add(sums, metrics)
        on_batch()
    assert sums is not None  # a split has examples
    seen = round(float(sums["examples"].total))
    if seen != len(source):
        raise UserError(f"the evaluation saw {seen} examples of {len(source)}")
    split = program.run.evaluation.split
    own = {name: metric for name, metric in sums.items() if name != "examples"}
    return {**numbers(own, split), f"{split}/examples": seen}

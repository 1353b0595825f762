"""Evaluation: each example of a split, or of its first `max_examples`, once, also if the last batch is not full."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from os import PathLike

from trainer import config, distributed
from trainer.checkpoint import Metadata, Store, check_leaves, scores
from trainer.data.memory import load_into_memory
from trainer.data.stream import eval_batches, prefetch
from trainer.errors import UserError, did_you_mean
from trainer.experiment import Batch, RandomAccessSource
from trainer.metrics import Metrics, add, numbers
from trainer.observe.log import read_rows
from trainer.optional import Evaluates, Reports, offered
from trainer.program import Program, build_program
from trainer.report import ReportWriter
from trainer.restore import read_step, run_of
from trainer.state import TrainState
from trainer.step import evaluation_variables
from trainer.workdir import Workdir


@distributed.fail_fast()
def evaluate(
    workdir: str | PathLike[str], run: config.Run | None = None, *, step: int | str = "latest", split: str | None = None
) -> dict[str, float]:
    """Evaluates a checkpoint on one of the run's evaluations or on every example of another split. Writes nothing.

    All processes of a run call it.

    Args:
      workdir: the folder of the run.
      run: its description; None for the one that the workdir holds.
      step: that of the checkpoint, or "latest", or "best" by `checkpoint.best_metric`.
      split: the split given to the experiment's `source`, or the name of one of `Run.evaluations`; None for
        `evaluation.split`.

    Returns the metrics by name, such as "test/loss", "test/examples" (their number), and "step", the checkpoint's.
    Raises `UserError` if the workdir holds no such checkpoint, or one of another run, or there is no such split.
    """
    folder = Workdir(workdir)
    with distributed.collective_errors("the run"):
        run = run_of(folder, run)
        folder.check_run(run)
        name = run.evaluation.split if split is None else split
        named = {name: run.evaluations[name]} if name in run.evaluations else {}
        is_configured = bool(named) or name == run.evaluation.split
        main = run.evaluation if is_configured else dataclasses.replace(run.evaluation, split=name, max_examples=None)
        # `build_program` would raise if this split lacked the best metric. The store below keeps the run's settings.
        checkpoint = dataclasses.replace(run.checkpoint, best_metric=None)
        alone = dataclasses.replace(run, evaluation=main, evaluations=named, checkpoint=checkpoint)
        program = build_program(alone)
        source = load_into_memory(program.evaluations[name].source, run.loading.in_memory_bytes)
    with closing(Store(folder.checkpoints, run.checkpoint)) as store:
        if step == "best":
            store.scores = scores(read_rows(folder.path / "metrics.jsonl"), run.checkpoint.best_metric)

        def restore(metadata: Metadata) -> TrainState:
            check_leaves(metadata, program.state)
            return store.restore(program.state, metadata.step, metadata)

        chosen, state = read_step(store, step, restore)
    return evaluate_split(program, state, source, name=name) | {"step": chosen}


def evaluate_split(
    program: Program,
    state: TrainState,
    source: RandomAccessSource,
    on_batch: Callable[[], None] = lambda: None,
    name: str | None = None,
) -> dict[str, float]:
    """The metrics of `source` by name, such as "test/accuracy", and "test/examples", how many examples there are.

    Args:
      program: of the run.
      state: on the devices.
      source: the examples of the evaluation, perhaps in memory.
      on_batch: called after each batch; an exception of it ends the evaluation.
      name: of the evaluation in `program.evaluations`; None for the main one.
    """
    name = name or next(iter(program.evaluations))
    one, strategy, experiment = program.evaluations[name], program.strategy, program.run.experiment
    size = one.spec["mask"].shape[0]
    local, threads = strategy.local_positions(size), program.run.loading.threads
    batches = partial(eval_batches, source, size, local_positions=local, threads=threads)
    values: Mapping[str, float] | None = None
    if (evaluates := offered(experiment, Evaluates)) is not None:
        variables = evaluation_variables(state, ema=one.settings.ema)
        taken = prefetch(batches(), strategy.global_batch)
        own = evaluates.evaluate(name, variables, _beating(taken, on_batch))
        if not isinstance(own, Mapping | None):
            raise UserError(f"evaluate returned a {type(own).__name__}; a mapping of names to numbers is expected")
        values = distributed.same_numbers("evaluate of the experiment", None if own is None else numbers(own, name))
    if values is None:
        sums: Metrics | None = None
        on_devices = prefetch(batches(), strategy.shard_batch)
        # Two batches keep the devices busy. On fake devices XLA:CPU deadlocks when programs with collectives overlap.
        fake = len(strategy.devices) > 1 and strategy.devices[0].platform == "cpu"
        for metrics in prefetch(on_devices, lambda batch: one.step(state, batch), 0 if fake else 2):
            sums = add(sums, metrics)
            on_batch()
        assert sums is not None  # a split has examples
        seen = round(float(sums["examples"].total))
        if seen != len(source):
            raise UserError(f"the evaluation saw {seen} examples of {len(source)}")
        values = numbers({key: metric for key, metric in sums.items() if key != "examples"}, name)
    best = program.run.checkpoint.best_metric
    if best and best not in values and config.evaluation_of(best, program.evaluations) == name:
        raise UserError(f"checkpoint.best_metric {best!r} is not evaluated{did_you_mean(best, values)}")
    return {**values, f"{name}/examples": len(source)}


def _beating(batches: Iterator[Batch], on_batch: Callable[[], None]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        on_batch()


def report(program: Program, state: TrainState, name: str, writer: ReportWriter) -> None:
    """Calls `Experiment.report`, if there is one, after the main evaluation. All processes call this."""
    reports, settings = offered(program.run.experiment, Reports), program.evaluations[name].settings
    if reports is not None and name == next(iter(program.evaluations)):
        reports.report(writer.step, evaluation_variables(state, ema=settings.ema), writer)
        writer.show_written()

"""Variants of a run: under another strategy, with another batch."""

import dataclasses
from typing import Any

from trainer import config
from trainer.plan.topology import Topology
from trainer.sharding import STRATEGIES, axis_sizes


def with_strategy(run: config.Run, strategy: str) -> config.Run:
    """The run under another strategy, without the sizes of mesh axes that this strategy does not use."""
    parallel = run.parallel
    if strategy == parallel.strategy:
        return run
    unused: dict[str, Any] = {axis: None for axis in ("fsdp", "tensor") if axis not in STRATEGIES[strategy].opt_state}
    return dataclasses.replace(run, parallel=dataclasses.replace(parallel, strategy=strategy, **unused))


def axis_changes(run: config.Run, variant: config.Run) -> tuple[str, ...]:
    """The sizes of mesh axes in which a variant differs from its run, such as "parallel.fsdp=None"."""
    new, old = variant.parallel, run.parallel
    return tuple(
        f"parallel.{axis}={getattr(new, axis)}"
        for axis in ("fsdp", "tensor")
        if getattr(new, axis) != getattr(old, axis)
    )


def with_batch(run: config.Run, batch_size: int, microbatches: int, eval_batch_size: int | None = None) -> config.Run:
    """The run with another batch.

    Schedules in epochs or examples become constant: they need not fit the run's steps with this batch, and memory does
    not depend on them.

    Args:
      run: resolved.
      batch_size: of training.
      microbatches: into how many parts gradient accumulation divides the batch.
      eval_batch_size: of evaluation; by default that of training if it was equal before, and otherwise unchanged.
    """
    if eval_batch_size is None:
        eval_batch_size = None if run.evaluation.batch_size == run.batch_size else run.evaluation.batch_size
    groups = {
        label: dataclasses.replace(
            group,
            schedule=group.schedule and _constant_unless_in_steps(group.schedule),
            decay_schedule=group.decay_schedule and _constant_unless_in_steps(group.decay_schedule),
        )
        for label, group in run.optimizer.groups.items()
    }
    schedule = _constant_unless_in_steps(run.optimizer.schedule)
    changed = dataclasses.replace(
        run,
        batch_size=batch_size,
        microbatches=microbatches,
        evaluation=dataclasses.replace(run.evaluation, batch_size=eval_batch_size),
        optimizer=dataclasses.replace(run.optimizer, schedule=schedule, groups=groups),
    )
    return config.resolve(changed)


def _constant_unless_in_steps(schedule: config.Schedule) -> config.Schedule:
    return config.Schedule(peak=schedule.peak) if schedule.unit in ("epochs", "examples") else schedule


def batch_shards(run: config.Run, topology: Topology) -> int:
    """The number of devices that each batch is sharded over.

    Raises:
      UserError: the sizes of the mesh's axes do not divide the devices.
    """
    sizes = axis_sizes(run.parallel, len(topology.devices), topology.slices)
    return sizes["data"] * sizes["fsdp"]

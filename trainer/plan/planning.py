"""Plans a run on a topology: each strategy compiled in the layout that communicates least, with what it takes."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from trainer import config
from trainer.plan.compiling import FAST, Figures, TooLarge, compile_for
from trainer.plan.topology import Topology
from trainer.program import Program, compile_program
from trainer.sharding.mesh import axis_sizes

# Above this size in MiB XLA splits matrix products into loops that compute and send in turn; raised, it never does.
UNSPLIT = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a compiled step can have that the strategy leaves open.

    Attributes:
      torus: whether fsdp has a mesh axis for each dimension of the torus.
      unsplit: whether the compiler is told not to split matrix products into loops.
    """

    torus: bool
    unsplit: bool = False

    @property
    def options(self) -> Mapping[str, str]:
        """What the compiler is told."""
        return UNSPLIT if self.unsplit else {}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A strategy on a topology, in bytes on one device.

    Attributes:
      run: as compiled.
      layout: the one chosen.
      tried: how many layouts were compared.
      parameters: all that the device holds of the parameters.
      moments: of the optimizer's state.
      mean: of the mean of the parameters, which is evaluated in their place; 0 where none is kept.
      gradients: of all gradients at once, where the model is not frozen; the compiler may need fewer at a time.
      train: the train step.
      evaluation: the evaluation step; what it does not read stays where it is meanwhile, and is not in its figures.
      hbm: memory of the device; 0 where it is not known.
    """

    run: config.Run
    layout: Layout
    tried: int
    parameters: int
    moments: int
    mean: int
    gradients: int
    train: Figures | TooLarge
    evaluation: Figures | TooLarge
    hbm: int

    @property
    def fits(self) -> bool:
        """Whether both steps fit, evaluation with the moments beside it, and the parameters where it reads the mean."""
        train, evaluation = self.train, self.evaluation
        return (
            isinstance(train, Figures)
            and isinstance(evaluation, Figures)
            and (evaluation.peak + self.moments + (self.parameters if self.mean else 0) <= self.hbm)
        )


def strategies() -> tuple[str, ...]:
    """The names of all strategies."""
    field = next(f for f in dataclasses.fields(config.Parallel) if f.name == "strategy")
    return field.metadata["choices"]


def with_strategy(run: config.Run, strategy: str) -> config.Run:
    """The run under another strategy; sizes of axes that it does not use are left to it."""
    parallel = run.parallel
    if strategy == parallel.strategy:
        return run
    fsdp = parallel.fsdp if "fsdp" in strategy or "zero1" in strategy else None
    tensor = parallel.tensor if "tensor" in strategy else None
    return dataclasses.replace(run, parallel=dataclasses.replace(parallel, strategy=strategy, fsdp=fsdp, tensor=tensor))


def with_batch(run: config.Run, batch_size: int, microbatches: int, evaluated: int | None = None) -> config.Run:
    """The run with another batch.

    Schedules in epochs or examples become constants: a batch for which they do not fit the steps of the run, which is
    for its user to mend, takes the memory that it takes.

    Args:
      run: resolved.
      batch_size: of training.
      microbatches: its program.
      evaluated: of evaluation; by default the same as of training where it was the same, or else what it was.
    """
    if evaluated is None:
        evaluated = None if run.evaluation.batch_size == run.batch_size else run.evaluation.batch_size
    evaluation = dataclasses.replace(run.evaluation, batch_size=evaluated)
    optimizer = dataclasses.replace(
        run.optimizer,
        schedule=_timeless(run.optimizer.schedule),
        groups={
            label: dataclasses.replace(
                group,
                schedule=group.schedule and _timeless(group.schedule),
                decay_schedule=group.decay_schedule and _timeless(group.decay_schedule),
            )
            for label, group in run.optimizer.groups.items()
        },
    )
    changed = dataclasses.replace(
        run, batch_size=batch_size, microbatches=microbatches, evaluation=evaluation, optimizer=optimizer
    )
    return config.resolve(changed)


def _timeless(schedule: config.Schedule) -> config.Schedule:
    return config.Schedule(peak=schedule.peak) if schedule.unit in ("epochs", "examples") else schedule


def batch_shards(run: config.Run, topology: Topology) -> int:
    """Into how many program a batch is split.

    Raises:
      UserError: the strategy's axes do not divide the devices.
    """
    sizes = axis_sizes(run.parallel, len(topology.devices), topology.slices)
    return sizes["data"] * sizes["fsdp"]


def plan(run: config.Run, topology: Topology, *, fast: bool, note: Callable[[str], None] = lambda _: None) -> Plan:
    """Compiles both steps of a run, in the better of the layouts that its strategy leaves open.

    The layouts are compared with the fast compiler: that which fits and sends the fewest bytes, and of those within
    2 % the one that takes the least memory.

    Args:
      run: resolved.
      topology: what to compile for.
      fast: whether the fast compiler is all there is.
      note: is told what goes on.

    Raises:
      UserError: the run does not fit the topology's number of devices.
    """
    parts_of: dict[Layout, Program] = {}
    tried: dict[Layout, Figures | TooLarge] = {}
    for layout in _layouts(run, topology, tried):
        note(f"layout {len(tried) + 1}, to compare")
        parts_of[layout] = built(run, topology, layout)
        tried[layout] = _train(parts_of[layout], topology, layout, fast=True)
    layout = best(tried) if tried else Layout(run.parallel.torus)
    program = parts_of.get(layout) or built(run, topology, layout)
    note("train step")
    train = tried.get(layout)
    if not fast or train is None:
        train = _train(program, topology, layout, fast=fast)
    note("evaluation step")
    evaluation = compile_for(
        program.eval_step,
        (program.state, program.strategy.abstract_batch(program.eval_spec)),
        len(topology.devices),
        _options(layout, fast),
    )
    return _summed(program, layout, len(tried), train, evaluation, topology.hbm_bytes)


def here(program: Program) -> Plan:
    """The plan of a run on the devices that are there, for which its program are built."""
    steps = ((program.train_step, program.train_spec), (program.eval_step, program.eval_spec))
    train, evaluation = (
        compile_for(step, (program.state, program.strategy.abstract_batch(spec)), len(program.strategy.devices), {})
        for step, spec in steps
    )
    return _summed(program, Layout(program.run.parallel.torus), 0, train, evaluation, 0)


def _summed(
    program: Program, layout: Layout, tried: int, train: Figures | TooLarge, evaluation: Figures | TooLarge, hbm: int
) -> Plan:
    params, moments, mean = (
        sum(map(shard_bytes, jax.tree.leaves(tree)))
        for tree in (program.state.params, program.state.opt_state, program.state.ema)
    )
    return Plan(program.run, layout, tried, params, moments, mean, _gradient_bytes(program), train, evaluation, hbm)


def train_only(run: config.Run, topology: Topology) -> Figures | TooLarge:
    """The train step of a run by the fast compiler, in the layout that its config says."""
    layout = Layout(run.parallel.torus)
    return _train(built(run, topology, layout), topology, layout, fast=True)


def shard_bytes(leaf: Any) -> int:
    """Bytes of an array's part on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def _layouts(run: config.Run, topology: Topology, tried: Mapping[Layout, Figures | TooLarge]) -> Iterator[Layout]:
    """The layouts worth a try, given what those before came to; none where there is nothing to choose."""
    strategy, torus = run.parallel.strategy, run.parallel.torus
    if strategy in ("data", "pmap"):
        return
    several = strategy != "tensor" and sum(size > 1 for size in topology.shape) > 1
    for layout in (Layout(torus), Layout(False)) if torus and several else (Layout(torus),):
        yield layout
        found = tried[layout]
        if isinstance(found, TooLarge) or found.program.windowed:
            yield dataclasses.replace(layout, unsplit=True)


def best(tried: Mapping[Layout, Figures | TooLarge]) -> Layout:
    """Of layouts that fit, and send within 2 % of the fewest bytes, that which takes the least memory."""
    fitting = {layout: found for layout, found in tried.items() if isinstance(found, Figures)}
    if not fitting:
        return min(tried, key=lambda layout: tried[layout].needed)  # pyrefly: ignore[missing-attribute] - none fits
    least = min(map(sent_bytes, fitting.values()))
    near = [layout for layout, found in fitting.items() if sent_bytes(found) <= 1.02 * least]
    return min(near, key=lambda layout: fitting[layout].peak)


def sent_bytes(figures: Figures) -> float:
    """Bytes that every chip sends in a step, at least."""
    return sum(c.sent for c in figures.program.collectives)


def built(run: config.Run, topology: Topology, layout: Layout) -> Program:
    """The program of a run, on the devices of a topology."""
    parallel = dataclasses.replace(run.parallel, torus=layout.torus, num_slices=topology.slices, devices=None)
    return compile_program(dataclasses.replace(run, parallel=parallel), topology.devices)


def _options(layout: Layout, fast: bool) -> dict[str, str]:
    return {**layout.options, **(FAST if fast else {})}


def _train(program: Program, topology: Topology, layout: Layout, *, fast: bool) -> Figures | TooLarge:
    batch = program.strategy.abstract_batch(program.train_spec)
    return compile_for(program.train_step, (program.state, batch), len(topology.devices), _options(layout, fast))


def _gradient_bytes(program: Program) -> int:
    """A gradient has its parameter's shape, is at least float32 if so reduced, and is sharded as the moments are."""
    least = np.float32 if program.run.parallel.reduce_dtype == "float32" else None
    total = 0
    for param in program.params.rows:
        if program.run.optimizer.groups[param.label].frozen:
            continue
        dtype = jax.numpy.promote_types(param.dtype, least) if least else np.dtype(param.dtype)
        shards = math.prod(program.strategy.sizes[axis] for axis in param.spec.axes if axis)
        total += param.size * dtype.itemsize // shards
    return total

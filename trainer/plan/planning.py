"""The plan of a run: both steps compiled for a topology, in the layout that communicates least."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from trainer import config
from trainer.plan.compiling import FAST, CompiledStep, OutOfMemory, compile_step
from trainer.plan.topology import Topology
from trainer.program import Program, build_program
from trainer.sharding import STRATEGIES

# XLA:TPU makes windowed einsums of matrix products above this many MiB: with this value, of none.
NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Choices of compilation that a strategy leaves open.

    Attributes:
      torus: whether fsdp has a mesh axis for each dimension of the torus.
      windowed: whether XLA may make windowed einsums, loops that compute and send parts of a matrix product in turn.
    """

    torus: bool
    windowed: bool = True

    @property
    def options(self) -> Mapping[str, str]:
        """Options for the compiler."""
        return {} if self.windowed else NO_WINDOWED_EINSUM


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a topology; sizes are bytes on one device.

    Attributes:
      run: the run.
      layout: the layout that it was compiled in.
      layouts_compared: the number of layouts among which it is the best.
      params: size of the parameters' shards.
      moments: size of the optimizer state's shards.
      ema: size of the EMA params' shards, which evaluation reads instead of the parameters; 0 without EMA.
      gradients: size of all gradients together, none for frozen parameters; XLA may hold fewer at a time.
      train: the train step.
      evaluation: the evaluation step; the state that it does not read stays in memory, outside of its sizes.
      fast: whether both were compiled with little effort.
      hbm_bytes: memory of a device; 0 if unknown.
    """

    run: config.Run
    layout: Layout
    layouts_compared: int
    params: int
    moments: int
    ema: int
    gradients: int
    train: CompiledStep | OutOfMemory
    evaluation: CompiledStep | OutOfMemory
    fast: bool
    hbm_bytes: int

    @property
    def fits(self) -> bool:
        """Whether both steps fit, the evaluation step beside all state that it does not read."""
        train, evaluation = self.train, self.evaluation
        unread = self.moments + (self.params if self.ema else 0)
        return (
            isinstance(train, CompiledStep)
            and isinstance(evaluation, CompiledStep)
            and evaluation.peak + unread <= self.hbm_bytes
        )


def plan(run: config.Run, topology: Topology, *, fast: bool, progress: Callable[[str], None] = lambda _: None) -> Plan:
    """Compiles both steps of a run, in the best layout.

    The fast compiler compares the layouts: the best one sends the fewest bytes, to 2 %, and takes the least memory.

    Args:
      run: resolved.
      topology: the devices to compile for.
      fast: whether to compile with little effort only.
      progress: receives a message before each compilation.

    Raises:
      UserError: the batch or the mesh does not divide over the devices.
    """
    programs: dict[Layout, Program] = {}
    compared: dict[Layout, CompiledStep | OutOfMemory] = {}
    for layout in _layouts(run, topology, compared):
        progress(f"layout {len(compared) + 1}, to compare")
        programs[layout] = program_for(run, topology, layout)
        compared[layout] = _compile_train(programs[layout], topology, layout, fast=True)
    layout = best(compared) if compared else Layout(run.parallel.torus)
    program = programs.get(layout) or program_for(run, topology, layout)
    progress("train step")
    train = compared.get(layout)
    if not fast or train is None:
        train = _compile_train(program, topology, layout, fast=fast)
    progress("evaluation step")
    batch = program.strategy.abstract_batch(program.main.spec)
    options = _options(layout, fast)
    evaluation = compile_step(program.main.step, (program.state, batch), len(topology.devices), options)
    return _plan(program, layout, len(compared), train, evaluation, fast, topology.hbm_bytes)


def plan_here(program: Program) -> Plan:
    """The plan of a program that was compiled for the devices of this process."""
    steps = ((program.train_step, program.train_spec), (program.main.step, program.main.spec))
    train, evaluation = (
        compile_step(step, (program.state, program.strategy.abstract_batch(spec)), len(program.strategy.devices), {})
        for step, spec in steps
    )
    return _plan(program, Layout(program.run.parallel.torus), 0, train, evaluation, fast=False, hbm_bytes=0)


def compile_train_fast(run: config.Run, topology: Topology) -> CompiledStep | OutOfMemory:
    """The train step of a run, compiled with little effort in the layout of its config."""
    layout = Layout(run.parallel.torus)
    return _compile_train(program_for(run, topology, layout), topology, layout, fast=True)


def program_for(run: config.Run, topology: Topology, layout: Layout) -> Program:
    """The program of a run on the devices of a topology."""
    parallel = dataclasses.replace(run.parallel, torus=layout.torus, num_slices=topology.slices, devices=None)
    return build_program(dataclasses.replace(run, parallel=parallel), topology.devices)


def best(compared: Mapping[Layout, CompiledStep | OutOfMemory]) -> Layout:
    """The layout of least memory, of those that fit and send at most 2 % more bytes than the fewest."""
    fitting = {layout: step for layout, step in compared.items() if isinstance(step, CompiledStep)}
    needed = {layout: step.needed for layout, step in compared.items() if isinstance(step, OutOfMemory)}
    if not fitting:
        return min(needed, key=needed.__getitem__)
    sent = {layout: sum(c.sent_bytes for c in step.hlo.collectives) for layout, step in fitting.items()}
    near = [layout for layout in fitting if sent[layout] <= 1.02 * min(sent.values())]
    return min(near, key=lambda layout: fitting[layout].peak)


def shard_bytes(leaf: Any) -> int:
    """The size of an array's shard on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def _layouts(
    run: config.Run, topology: Topology, compared: Mapping[Layout, CompiledStep | OutOfMemory]
) -> Iterator[Layout]:
    """The layouts to compare, given the results of those before; none if the strategy leaves nothing open."""
    torus, axes = run.parallel.torus, STRATEGIES[run.parallel.strategy].opt_state
    if not axes:
        return
    dimensions = sum(size > 1 for size in topology.shape)
    for layout in (Layout(True), Layout(False)) if torus and "fsdp" in axes and dimensions > 1 else (Layout(torus),):
        yield layout
        step = compared[layout]
        if isinstance(step, OutOfMemory) or step.hlo.windowed:
            yield dataclasses.replace(layout, windowed=False)


def _options(layout: Layout, fast: bool) -> dict[str, str]:
    return {**layout.options, **(FAST if fast else {})}


def _compile_train(program: Program, topology: Topology, layout: Layout, *, fast: bool) -> CompiledStep | OutOfMemory:
    batch = program.strategy.abstract_batch(program.train_spec)
    options = _options(layout, fast)
    return compile_step(program.train_step, (program.state, batch), len(topology.devices), options)


def _plan(
    program: Program,
    layout: Layout,
    layouts_compared: int,
    train: CompiledStep | OutOfMemory,
    evaluation: CompiledStep | OutOfMemory,
    fast: bool,
    hbm_bytes: int,
) -> Plan:
    params, moments, ema = (
        sum(map(shard_bytes, jax.tree.leaves(tree)))
        for tree in (program.state.params, program.state.opt_state, program.state.ema)
    )
    sizes = params, moments, ema, _gradient_bytes(program)
    return Plan(program.run, layout, layouts_compared, *sizes, train, evaluation, fast, hbm_bytes)


def _gradient_bytes(program: Program) -> int:
    """Gradients have the shapes of the parameters, the shardings of the moments, and the dtype they are reduced in."""
    least = np.float32 if program.run.parallel.reduce_dtype == "float32" else None
    total = 0
    for param in program.param_table.rows:
        if program.run.optimizer.groups[param.label].frozen:
            continue
        dtype = jax.numpy.promote_types(param.dtype, least) if least else np.dtype(param.dtype)
        shards = math.prod(program.strategy.sizes[axis] for axis in param.spec.axes if axis)
        total += param.size * dtype.itemsize // shards
    return total

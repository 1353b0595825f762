"""The plan of a run: both steps compiled for a topology.

A strategy may leave choices of compilation open. Of those that fit and send at most 2 % more bytes than the fewest, the
plan takes the one of least memory. If none fits, it takes the one that needs the least memory.
"""

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

# XLA:TPU uses windowed einsums for products larger than this many MiB. This value turns them off.
NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@dataclasses.dataclass(frozen=True)
class CompileChoice:
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
      choice: the choice with which it was compiled.
      choices_compared: the number of choices among which this one is the best; 0 if none were compared.
      param_bytes: size of the parameters' shards.
      moment_bytes: size of the optimizer state's shards.
      ema_bytes: size of the EMA params' shards, which evaluation reads instead of the parameters; 0 without EMA.
      gradient_bytes: size of all gradients together, none for frozen parameters; XLA may hold fewer at a time.
      train: the train step.
      evaluation: the evaluation step; its sizes leave out state that it does not read, which still occupies memory.
      fast: whether both were compiled with little effort.
      hbm_bytes: memory of a device; 0 if unknown.
    """

    run: config.Run
    choice: CompileChoice
    choices_compared: int
    param_bytes: int
    moment_bytes: int
    ema_bytes: int
    gradient_bytes: int
    train: CompiledStep | OutOfMemory
    evaluation: CompiledStep | OutOfMemory
    fast: bool
    hbm_bytes: int

    @property
    def fits(self) -> bool:
        """Whether both steps fit, the evaluation step beside all state that it does not read.

        Always False if the memory of a device is unknown.
        """
        train, evaluation = self.train, self.evaluation
        unread = self.moment_bytes + (self.param_bytes if self.ema_bytes else 0)
        return (
            isinstance(train, CompiledStep)
            and isinstance(evaluation, CompiledStep)
            and evaluation.peak_bytes + unread <= self.hbm_bytes
        )


def make_plan(
    run: config.Run, topology: Topology, *, fast: bool, progress: Callable[[str], None] = lambda _: None
) -> Plan:
    """Compiles both steps of a run, with the best choice of compilation: see `best`.

    To compare the choices, each train step is compiled with little effort.

    Args:
      run: resolved.
      topology: the devices to compile for.
      fast: whether to compile with little effort only.
      progress: receives a message before each compilation.

    Raises:
      UserError: the batch or the mesh does not divide over the devices.
    """
    programs: dict[CompileChoice, Program] = {}
    compared: dict[CompileChoice, CompiledStep | OutOfMemory] = {}
    for choice in _choices(run, topology, compared):
        progress(f"compile choice {len(compared) + 1}, to compare")
        programs[choice] = program_for(run, topology, choice)
        compared[choice] = _compile_train(programs[choice], topology, choice, fast=True)
    choice = best(compared) if compared else CompileChoice(run.parallel.torus)
    program = programs.get(choice) or program_for(run, topology, choice)
    progress("train step")
    train = compared.get(choice)
    if not fast or train is None:
        train = _compile_train(program, topology, choice, fast=fast)
    progress("evaluation step")
    batch = program.strategy.abstract_batch(program.main_evaluation.spec)
    options = _options(choice, fast)
    evaluation = compile_step(program.main_evaluation.step, (program.state, batch), len(topology.devices), options)
    return _plan(program, choice, len(compared), train, evaluation, fast, topology.hbm_bytes)


def plan_here(program: Program) -> Plan:
    """Compiles both steps of a program for the devices of this process, and returns their plan."""
    steps = ((program.train_step, program.train_spec), (program.main_evaluation.step, program.main_evaluation.spec))
    train, evaluation = (
        compile_step(step, (program.state, program.strategy.abstract_batch(spec)), len(program.strategy.devices), {})
        for step, spec in steps
    )
    return _plan(program, CompileChoice(program.run.parallel.torus), 0, train, evaluation, fast=False, hbm_bytes=0)


def compile_train_fast(run: config.Run, topology: Topology) -> CompiledStep | OutOfMemory:
    """The train step of a run, compiled with little effort and with the choice in its config."""
    choice = CompileChoice(run.parallel.torus)
    return _compile_train(program_for(run, topology, choice), topology, choice, fast=True)


def program_for(run: config.Run, topology: Topology, choice: CompileChoice) -> Program:
    """The program of a run on the devices of a topology."""
    parallel = dataclasses.replace(run.parallel, torus=choice.torus, num_slices=topology.slices, devices=None)
    return build_program(dataclasses.replace(run, parallel=parallel), topology.devices)


def best(compared: Mapping[CompileChoice, CompiledStep | OutOfMemory]) -> CompileChoice:
    """The choice of least memory, of those that fit and send at most 2 % more bytes than the fewest.

    If none fits, the choice that needs the least memory.
    """
    fitting = {choice: step for choice, step in compared.items() if isinstance(step, CompiledStep)}
    needed = {choice: step.needed_bytes for choice, step in compared.items() if isinstance(step, OutOfMemory)}
    if not fitting:
        return min(needed, key=needed.__getitem__)
    sent = {choice: sum(c.sent_bytes for c in step.hlo.collectives) for choice, step in fitting.items()}
    near = [choice for choice in fitting if sent[choice] <= 1.02 * min(sent.values())]
    return min(near, key=lambda choice: fitting[choice].peak_bytes)


def shard_bytes(leaf: Any) -> int:
    """The size of an array's shard on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def _choices(
    run: config.Run, topology: Topology, compared: Mapping[CompileChoice, CompiledStep | OutOfMemory]
) -> Iterator[CompileChoice]:
    """The choices to compare, given the results of those before; none if the strategy leaves nothing open."""
    torus, axes = run.parallel.torus, STRATEGIES[run.parallel.strategy].opt_state
    if not axes:
        return
    dimensions = sum(size > 1 for size in topology.shape)
    for value in (True, False) if torus and "fsdp" in axes and dimensions > 1 else (torus,):
        choice = CompileChoice(value)
        yield choice
        step = compared[choice]
        if isinstance(step, OutOfMemory) or step.hlo.windowed:
            yield dataclasses.replace(choice, windowed=False)


def _options(choice: CompileChoice, fast: bool) -> dict[str, str]:
    return {**choice.options, **(FAST if fast else {})}


def _compile_train(
    program: Program, topology: Topology, choice: CompileChoice, *, fast: bool
) -> CompiledStep | OutOfMemory:
    batch = program.strategy.abstract_batch(program.train_spec)
    options = _options(choice, fast)
    return compile_step(program.train_step, (program.state, batch), len(topology.devices), options)


def _plan(
    program: Program,
    choice: CompileChoice,
    choices_compared: int,
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
    return Plan(program.run, choice, choices_compared, *sizes, train, evaluation, fast, hbm_bytes)


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

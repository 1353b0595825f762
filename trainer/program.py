"""Builds a `Program` (steps, optimizer, shardings) from a resolved run, and checks it before any file is written."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer import config
from trainer.compilation import AheadCompiled, compile_ahead
from trainer.data import FirstExamples, batch_spec, eval_source, open_source
from trainer.errors import UserError, did_you_mean, model_errors
from trainer.experiment import Batch, RandomAccessSource
from trainer.experiment_checks import abstract_params
from trainer.garbage import gc_paused
from trainer.guard import new_guard
from trainer.keys import run_keys
from trainer.metrics import numbers
from trainer.optim import Groups, build_groups, build_optimizer, build_schedules, build_statistics
from trainer.optional import Evaluates, augmentation, offered
from trainer.params import ParamTable, label_tree, param_table
from trainer.sharding import Strategy, build_strategy, check_divides
from trainer.state import TrainState, init_state
from trainer.step import StepSettings, eval_step, train_step

BatchSpec = Mapping[str, jax.ShapeDtypeStruct]


class Due(NamedTuple):
    """The work after a step."""

    log: bool
    evaluate: tuple[str, ...]  # names of evaluations
    save: bool


@dataclasses.dataclass(frozen=True)
class EvalProgram:
    """One evaluation of a run."""

    settings: config.Evaluation  # with `every_steps` computed from `every`
    source: RandomAccessSource  # not loaded into memory yet
    spec: BatchSpec  # shapes and dtypes of a global batch
    step: AheadCompiled  # jitted: (state, batch) → metrics


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything that a run computes. A program knows no workdir: it reads and writes no file there."""

    run: config.Run  # resolved
    train_source: RandomAccessSource  # not loaded into memory yet
    train_spec: BatchSpec  # shapes and dtypes of a global batch
    evaluations: Mapping[str, EvalProgram]  # by the name that their metrics have; the main one first
    param_table: ParamTable
    groups: Groups  # the parameter group of each label; None where it is frozen
    optimizer: optax.GradientTransformation  # turns gradients into updates
    strategy: Strategy  # how the steps spread over the devices
    state: TrainState  # abstract: a `jax.ShapeDtypeStruct` with its sharding for each array
    init: Any  # jitted: makes the first state on the devices
    train_step: AheadCompiled  # jitted: (state, batch) → (state, metrics); donates the state

    @property
    def main_evaluation(self) -> EvalProgram:
        """The main evaluation."""
        return next(iter(self.evaluations.values()))

    def due(self, step: int) -> Due:
        """The work that is due after a step, counted from 1."""
        return due(self.run, {name: one.settings for name, one in self.evaluations.items()}, step)


def due(run: config.Run, evaluations: Mapping[str, config.Evaluation], step: int) -> Due:
    """As `Program.due`: what the step number decides. `Session.due` adds a signal, a hook and the clock."""
    last = step == run.total_steps
    names = [name for name, e in evaluations.items() if last or (e.every_steps and step % e.every_steps == 0)]
    return Due(is_logged(run, step), tuple(names), last or step % run.checkpoint.every_steps == 0)


def is_logged(run: config.Run, step: Any) -> Any:
    """Whether a row of metrics is due; `step` may be traced."""
    return (step == run.total_steps) | (step % run.logging.every_steps == 0)


@gc_paused()
def build_program(run: config.Run, devices: Sequence[jax.Device] | None = None, *, compiles: bool = False) -> Program:
    """The program of a resolved run, whose train step and evaluation steps are traced here.

    Args:
      run: as `config.resolve` returns it.
      devices: the devices to compile for, which need not exist; by default `run.parallel` chooses from those of JAX.
      compiles: whether XLA begins to compile the train step, in a thread, while the evaluation steps are traced.

    Raises:
      UserError: data that is not there, batches that do not divide over the devices, labels that do not cover the
        parameters, a model and a batch that do not fit each other.
    """
    experiment, numerics = run.experiment, run.numerics
    train_source = open_source(experiment, run.loading.split)
    train_spec = batch_spec(train_source, run.batch_size, augmentation(experiment))
    # Two independent streams of keys, so that no step's key is that of the initial parameters.
    init_key, step_key = run_keys(run)
    # `jax.jit` caches the trace, so the uses of `init_variables` below trace the model only once.
    init_variables = partial(jax.jit(lambda key: experiment.init(key, zeros(train_spec)), inline=True), init_key)
    boxed = abstract_params(experiment, init_variables, train_spec)
    strategy = build_strategy(run.parallel, boxed, devices)
    check_divides(run, strategy.batch_shards)

    params = nn.unbox(boxed)
    labels = label_tree(params, run.optimizer.labels, run.optimizer.groups)
    schedules = build_schedules(run, len(train_source))
    groups = build_groups(run.optimizer, schedules)
    optimizer = build_optimizer(run.optimizer, groups, labels, run.seed)
    settings = StepSettings(
        experiment,
        optimizer,
        schedules["optimizer.schedule"],
        step_key,
        microbatches=run.microbatches,
        replica_axis=strategy.axis_name,
        reduce_dtype=run.parallel.reduce_dtype,
        constrain_gradients=strategy.constrain_gradients,
        ema_decay=run.optimizer.ema_decay,
        frozen=jax.tree.map(lambda label: run.optimizer.groups[label].frozen, labels),
        spike=None if numerics.spike_quantile is None else (numerics.spike_quantile, numerics.spike_factor),
        statistics=build_statistics(groups, labels, run.optimizer.clip_norm),
        is_logged=partial(is_logged, run),
    )

    def init() -> TrainState:
        ema = run.optimizer.ema_decay is not None
        may_drop = numerics.on_nonfinite == "skip" or settings.spike is not None
        guard = new_guard() if may_drop else None
        return init_state(init_variables(), optimizer, ema=ema, guard=guard)

    abstract_state = strategy.abstract_state(init)
    jitted = strategy.jit_train(partial(train_step, settings), abstract_state)
    program = Program(
        run,
        train_source,
        train_spec,
        _evaluations(run, train_source, strategy, abstract_state),
        param_table(params, labels, run.optimizer, strategy.specs),
        groups,
        optimizer,
        strategy,
        abstract_state,
        strategy.jit_init(init, abstract_state),
        AheadCompiled(jitted, (abstract_state, strategy.abstract_batch(train_spec))),
    )
    _check_steps(program, compiles)
    return program


def _evaluations(
    run: config.Run, train_source: RandomAccessSource, strategy: Strategy, state: TrainState
) -> dict[str, EvalProgram]:
    sources, found = {run.loading.split: train_source}, {}
    for name, settings in config.evaluations_in_steps(run, len(train_source)).items():
        if settings.split not in sources:
            sources[settings.split] = open_source(run.experiment, settings.split)
        source = eval_source(sources[settings.split])
        source = source if settings.max_examples is None else FirstExamples(source, settings.max_examples)
        spec = batch_spec(source, settings.batch_size or run.batch_size)
        jitted = strategy.jit_eval(partial(eval_step, run.experiment, strategy.axis_name, settings.ema), state)
        found[name] = EvalProgram(settings, source, spec, AheadCompiled(jitted, (state, strategy.abstract_batch(spec))))
    return found


def _check_steps(program: Program, compiles: bool) -> None:
    """Traces the train step and every evaluation step, which checks what the experiment and the optimizer return."""
    run, state, strategy = program.run, program.state, program.strategy
    with model_errors(program.train_spec):
        jax.eval_shape(program.train_step.jitted, state, strategy.abstract_batch(program.train_spec))
    if compiles:
        compile_ahead(program.train_step)
    best, known = run.checkpoint.best_metric, dict[str, float]()
    for name, one in program.evaluations.items():
        with model_errors(one.spec):
            metrics = jax.eval_shape(one.step.jitted, state, strategy.abstract_batch(one.spec))
        # Only the names that `numbers` returns are needed, so the values are all 1.
        known |= numbers(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), metrics), name)
    # The metric names of `Experiment.evaluate` are known only after it has run.
    may_come = offered(run.experiment, Evaluates) is not None and config.evaluation_of(best or "", program.evaluations)
    if best is not None and best not in known and not may_come:
        raise UserError(f"checkpoint.best_metric {best!r} is not evaluated{did_you_mean(best, known)}")


def zeros(spec: BatchSpec) -> Batch:
    """A batch of zeros."""
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in spec.items()}

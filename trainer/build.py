"""From the description of a run to its parts: everything is checked here, before anything is written to disk."""

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from trainer import config
from trainer.data.source import batch_spec
from trainer.errors import UserError, nearest
from trainer.experiment import Batch, Experiment, Metrics, RandomAccessSource
from trainer.optim.labels import Row, label_table, label_tree
from trainer.optim.optimizer import build_optimizer, build_treatments
from trainer.optim.schedules import Length, build_schedule
from trainer.optim.statistics import build_statistics
from trainer.parallel import Parallel, build_parallel, check_divides
from trainer.state import TrainState, init_state
from trainer.step import eval_step, train_step


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
      run: the resolved description.
      rows: the label table.
      parallel: the strategy.
      train_source: the examples to train on, not loaded yet.
      eval_source: the examples to evaluate on.
      spec: a global batch of training, in shapes and dtypes.
      eval_spec: one of evaluation.
      labels: a tree like the parameters, with a label for each leaf.
      length: what schedules are measured by.
      optimizer: makes updates of gradients.
      make_state: makes the first state; pure.
      state: the state in shapes, dtypes and shardings.
      train_step: the compiled update, (state, device batch) → (state, metrics); consumes the state.
      eval_step: the compiled evaluation, (state, device batch) → metrics.
    """

    run: config.Run
    rows: list[Row]
    parallel: Parallel
    train_source: RandomAccessSource
    eval_source: RandomAccessSource
    spec: Mapping[str, jax.ShapeDtypeStruct]
    eval_spec: Mapping[str, jax.ShapeDtypeStruct]
    labels: Any
    length: Length
    optimizer: optax.GradientTransformation
    make_state: Callable[[], TrainState]
    state: TrainState
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[TrainState, Batch], Metrics]


def build(run: config.Run, devices: Sequence[jax.Device] | None = None) -> Parts:
    """The parts of a resolved run.

    Args:
      run: the description.
      devices: those to compile for, which need not be there; by default what `run.parallel` says of this machine's.

    Raises:
      UserError: data that is not there, batches that do not divide over the devices, labels that do not cover the
        parameters, a model and a batch that do not fit each other.
    """
    experiment = run.experiment
    train_source, eval_source = _source(experiment, run.loading.split), _source(experiment, run.evaluation.split)
    spec = batch_spec(train_source, run.batch_size)
    eval_spec = batch_spec(eval_source, run.evaluation.batch_size)

    # Two independent streams of keys, so that no step's key is that of the initial parameters.
    init_key, step_key = jax.random.split(jax.random.key(run.seed))
    with _blaming_the_model(spec):
        boxed = jax.eval_shape(lambda: dict(experiment.init(init_key, _zeros(spec))))
    variables = nn.unbox(boxed)
    if "params" not in variables or not jax.tree.leaves(variables["params"]):
        raise UserError(f"{type(experiment).__name__}.init returned no parameters, only {sorted(variables)}")
    parallel = build_parallel(run.parallel, boxed["params"], devices)
    check_divides(run, parallel.row_shards)
    labels = label_tree(variables["params"], run.optimizer.labels, run.optimizer.groups)
    length = Length(run.total_steps, run.batch_size, len(train_source))
    treatments = build_treatments(run.optimizer, labels, length)
    optimizer = build_optimizer(run.optimizer, treatments, run.seed)

    def make_state() -> TrainState:
        return init_state(experiment, optimizer, init_key, _zeros(spec), ema=run.optimizer.ema_decay > 0)

    state = parallel.abstract(make_state)
    axis_name = parallel.axis_name
    update = train_step(
        experiment,
        optimizer,
        build_schedule(run.optimizer.schedule, length),
        step_key,
        microbatches=run.microbatches,
        axis_name=axis_name,
        reduce_dtype=run.parallel.reduce_dtype,
        place_gradients=parallel.place_gradients,
        ema_decay=run.optimizer.ema_decay,
        frozen=jax.tree.map(lambda label: run.optimizer.groups[label].frozen, labels),
        statistics=build_statistics(treatments, labels, run.optimizer.clip_norm or None),
        measured=lambda step: (step % run.logging.every_steps == 0) | (step == run.total_steps),  # as it is logged
    )
    compiled_update = parallel.compile_train(update, state)
    compiled_eval = parallel.compile_eval(eval_step(experiment, axis_name=axis_name), state)
    with _blaming_the_model(spec):
        after, _ = jax.eval_shape(compiled_update, state, parallel.abstract_batch(spec))
    _check_unchanged(state, after)
    with _blaming_the_model(eval_spec):
        evaluated = jax.eval_shape(compiled_eval, state, parallel.abstract_batch(eval_spec))
    _check_best_metric(run, evaluated)

    rows = label_table(variables["params"], labels, run.optimizer.groups)
    return Parts(
        run,
        rows,
        parallel,
        train_source,
        eval_source,
        spec,
        eval_spec,
        labels,
        length,
        optimizer,
        make_state,
        state,
        compiled_update,
        compiled_eval,
    )


def _zeros(spec: Batch) -> Batch:
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in spec.items()}


@contextmanager
def _blaming_the_model(spec: Batch) -> Iterator[None]:
    """Turns what a model raises while it is traced into one line that says where, and what the batch was."""
    try:
        yield
    except (TypeError, ValueError, KeyError, flax.errors.FlaxError) as error:
        # The last frame outside of libraries is the line of the model or of the experiment to look at.
        frames = traceback.extract_tb(error.__traceback__)
        ours = [
            f
            for f in frames
            if "site-packages" not in f.filename and Path(__file__).parent not in Path(f.filename).parents
        ]
        where = f" ({ours[-1].filename}:{ours[-1].lineno})" if ours else ""
        message = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        batch = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in spec.items())
        raise UserError(
            f"the model does not fit its batch{where}: {type(error).__name__}: {message}; the batch has {batch} "
            "(--traceback shows the whole error)"
        ) from error


def _check_unchanged(before: TrainState, after: TrainState) -> None:
    """A step must return the state it was given, in structure, shapes and dtypes."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise UserError(
            "the loss must return the mutable collections it was given: "
            f"{_names(before.collections)}, not {_names(after.collections)}"
        )
    flat = jax.tree_util.tree_leaves_with_path(before)
    for (path, old), new in zip(flat, jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"a step turns {name} from {old.dtype}{list(old.shape)} into {new.dtype}{list(new.shape)}")


def _names(collections: dict) -> str:
    return ", ".join(sorted(collections)) or "none"


def _check_best_metric(run: config.Run, evaluated: Metrics) -> None:
    best, known = run.checkpoint.best_metric, [f"{run.evaluation.split}/{name}" for name in evaluated]
    if best and best not in known:
        raise UserError(f"checkpoint.best_metric {best!r} is not evaluated{nearest(best, known)}")


def _source(experiment: Experiment, split: str) -> RandomAccessSource:
    """The examples of a split, if they are what the protocol says."""
    name = f"{type(experiment).__name__}.source({split!r})"
    try:
        source = experiment.source(split)
    except KeyError as error:
        raise UserError(f"{name}: KeyError: {error}; is there such a split? (--traceback shows where)") from error
    if not isinstance(source, RandomAccessSource):
        raise UserError(f"{name} is a {type(source).__name__}, which has no length and indices")
    if not len(source):
        raise UserError(f"{name} has no example")
    if not isinstance(source[0], Mapping):
        raise UserError(f"{name} holds examples of type {type(source[0]).__name__}; a mapping from names is expected")
    return source

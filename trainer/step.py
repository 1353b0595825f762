"""One update and one evaluation, as pure functions of (state, batch).

Under `jax.jit` the arrays are global and XLA adds the communication between devices. Under `jax.pmap` a step sees one
replica's share of the batch, and sums over `replica_axis` are written out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32, Key

from trainer.experiment import Batch, Experiment, Variables, set_replica_axis
from trainer.experiment_checks import carried_collections, check_loss, check_same_shapes
from trainer.guard import drop_bad_update
from trainer.keys import per_example_keys, step_keys
from trainer.metrics import Mean, Metrics
from trainer.optim import Statistics, divide, evaluation_params, global_norm, statistics_if
from trainer.sharding.reduction import with_float32_sums
from trainer.state import TrainState, update_ema


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Everything that an update needs besides its state and its batch."""

    experiment: Experiment
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule  # of the run; reported only
    key: Key[Array, ""]  # of all steps: `step_keys` makes that of one step, from which each microbatch gets its own
    # Microbatch j has the examples j, j + microbatches, … of the batch, so that every device keeps its own examples.
    microbatches: int = 1
    replica_axis: str | None = None  # the axis of `jax.pmap`; None under `jax.jit`
    reduce_dtype: str = "float32"  # in which gradients are summed: "float32" or "bfloat16" (see `config.Parallel`)
    # Gives gradients their sharding, before they are added up or used.
    constrain_gradients: Callable[[Any], Any] = lambda gradients: gradients
    ema_decay: float | None = None  # of the EMA params; None where none are kept
    frozen: Any = False  # a tree of bools like the parameters, or a prefix of one: True where nothing is updated
    spike: tuple[float, float] | None = None  # (quantile, factor) of the spike limit, see `drop_bad_update`
    statistics: Statistics | None = None  # per-label numbers, from gradients, new parameters and new optimizer state
    # Whether a step, counted from 1, is logged. Statistics of other steps have weight 0 and cost nothing.
    is_logged: Callable[[Int32[Array, ""]], Bool[Array, ""]] = lambda step: jnp.asarray(True)


def train_step(settings: StepSettings, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One update.

    The gradient is that of Σ total / Σ weight of the metric "loss": both are summed over microbatches and replicas and
    divided once. Besides the experiment's metrics there are "grad_norm", of that gradient, "learning_rate", the
    statistics and, if the state has a guard, the metrics of `drop_bad_update`.
    """
    axis = settings.replica_axis
    key, example_key = step_keys(settings.key, state.step)
    batch = {**batch, "example_key": per_example_keys(example_key, len(batch["mask"]), axis)}
    if axis is not None:  # each replica draws its own dropout masks; under jit one mask covers the global arrays
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    # A frozen parameter is None from here on, which JAX takes for no leaf: it has no gradient and no update.
    trainable = jax.tree.map(lambda frozen, p: None if frozen else p, settings.frozen, state.params)

    def loss(trainable: Any, collections: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Any]:
        params = jax.tree.map(lambda p, new: p if new is None else new, state.params, trainable)
        variables = {"params": params, **collections}
        with set_replica_axis(axis):
            metrics, collections = check_loss(settings.experiment.loss(variables, batch, key=key, train=True))
        return metrics["loss"].total, (metrics, carried_collections(state.collections, collections))

    gradient = _summed_in(settings.reduce_dtype, jax.grad(loss, has_aux=True))

    def one_microbatch(collections: Any, batch: Batch, index: Int32[Array, ""]) -> tuple[Any, tuple[Any, Metrics]]:
        grads, (metrics, collections) = gradient(trainable, collections, batch, jax.random.fold_in(key, index))
        return collections, (settings.constrain_gradients(grads), metrics)

    collections, (sums, metrics) = accumulate(one_microbatch, state.collections, batch, settings.microbatches)
    if axis is not None:
        sums = _sum_over_replicas(sums, axis, settings.reduce_dtype)
        metrics = jax.lax.psum(metrics, axis)
        collections = jax.lax.pmean(collections, axis)  # those that the model did not average itself
    # A batch in which every example is masked has gradient 0, not 0/0.
    weight = jnp.maximum(metrics["loss"].weight, jnp.finfo(jnp.float32).tiny)
    grads = divide(sums, weight)

    updates, opt_state = settings.optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p if u is None else (p + u).astype(p.dtype), state.params, updates)
    made = state.step if state.guard is None else state.opt_state.count  # updates before this one
    ema = None if settings.ema_decay is None else update_ema(state.ema, params, made, settings.ema_decay)

    own = {"grad_norm": global_norm(jax.tree.leaves(sums)) / weight, "learning_rate": settings.learning_rate(made)}
    metrics = {**metrics, **{name: Mean.single(value) for name, value in own.items()}}
    if settings.statistics is not None:
        is_logged = settings.is_logged(state.step + 1)
        metrics |= statistics_if(is_logged, settings.statistics, sums, weight, params, opt_state)
    after = TrainState(state.step + 1, params, collections, opt_state, ema)
    check_same_shapes(dataclasses.replace(state, guard=None), after)
    if state.guard is not None:
        after, dropped = drop_bad_update(state, after, metrics["loss"], own["grad_norm"], settings.spike)
        metrics |= dropped
    return after, metrics


def eval_step(experiment: Experiment, replica_axis: str | None, ema: bool, state: TrainState, batch: Batch) -> Metrics:
    """The metrics of one batch as sums, with "examples", the number of examples that are not masked."""
    with set_replica_axis(replica_axis):
        variables = evaluation_variables(state, ema=ema)
        metrics, _ = check_loss(experiment.loss(variables, batch, key=jax.random.key(0), train=False))
    metrics = {**metrics, "examples": Mean(jnp.sum(batch["mask"]), jnp.ones((), jnp.float32))}
    return metrics if replica_axis is None else jax.lax.psum(metrics, replica_axis)


def evaluation_variables(state: TrainState, *, ema: bool) -> Variables:
    """The EMA params if the state has any and `ema` is true, else the average of a schedule-free optimizer, if any."""
    params = evaluation_params(state.params, state.opt_state)
    if ema and state.ema is not None:
        params = jax.tree.map(lambda p, average: average.astype(p.dtype), state.params, state.ema)
    return {"params": params, **state.collections}


def accumulate(
    one_microbatch: Callable[[Any, Batch, Int32[Array, ""]], tuple[Any, Any]],
    collections: Any,
    batch: Batch,
    microbatches: int,
) -> tuple[Any, Any]:
    """Gradient accumulation: one pass over the microbatches, which carries collections and sums everything else.

    Args:
      one_microbatch: (collections, microbatch, index) → (collections, tree to sum).
      collections: before the first microbatch.
      batch: arrays [B, …]; B is a multiple of `microbatches`.
      microbatches: 1 or more; 1 makes no loop.

    Returns:
      The collections after the last microbatch, and the sums.
    """
    if microbatches == 1:
        return one_microbatch(collections, batch, jnp.zeros((), jnp.int32))

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)

    parts = (jax.tree.map(split, batch), jnp.arange(microbatches))
    _, shapes = jax.eval_shape(one_microbatch, collections, *jax.tree.map(lambda x: x[0], parts))

    def body(carry: tuple[Any, Any], part: tuple[Batch, Array]) -> tuple[tuple[Any, Any], None]:
        collections, sums = carry
        collections, addends = one_microbatch(collections, *part)
        return (collections, jax.tree.map(jnp.add, sums, addends)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, (collections, zeros), parts)[0]


def _summed_in(reduce_dtype: str, gradient: Callable) -> Callable:
    """A gradient function whose sums over examples and devices are made in float32 if that is asked for."""
    if reduce_dtype != "float32":
        return gradient

    def in_float32(*arguments: Any) -> tuple[Any, Any]:
        grads, aux = gradient(*arguments)
        return jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads), aux

    return with_float32_sums(in_float32)


def _sum_over_replicas(grads: Any, axis: str, reduce_dtype: str) -> Any:
    if reduce_dtype == "float32":  # `_summed_in` has cast the gradients to it
        return jax.lax.psum(grads, axis)
    narrow = jax.lax.psum(jax.tree.map(lambda g: g.astype(reduce_dtype), grads), axis)
    return jax.tree.map(lambda g, s: s.astype(g.dtype), grads, narrow)

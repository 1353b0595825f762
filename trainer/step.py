"""One update and one evaluation, as pure functions of (state, batch)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32, Key

from trainer.errors import UserError
from trainer.experiment import Batch, Collections, Experiment, Mean, Metrics
from trainer.optim.statistics import Statistics
from trainer.optim.treatment import norm
from trainer.reduction import sum_in_float32
from trainer.state import TrainState, update_ema

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch], Metrics]


def train_step(
    experiment: Experiment,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    key: Key[Array, ""],
    *,
    microbatches: int = 1,
    axis_name: str | None = None,
    reduce_dtype: str = "float32",
    place_gradients: Callable[[Any], Any] = lambda gradients: gradients,
    ema_decay: float = 0.0,
    frozen: Any = False,
    statistics: Statistics | None = None,
    measured: Callable[[Int32[Array, ""]], Bool[Array, ""]] = lambda step: jnp.asarray(True),
) -> TrainStep:
    """One update.

    The gradient is that of Σ total / Σ weight of the metric "loss", summed over microbatches and replicas and divided
    once. Beside the experiment's own metrics there are "grad_norm", of that gradient, "learning_rate", and the
    statistics.

    Args:
      experiment: gives the loss.
      optimizer: makes updates of gradients.
      schedule: only to report the learning rate.
      key: all randomness of step k comes from `fold_in(key, k)`.
      microbatches: parts to process one after the other; part j has the rows j, j + microbatches, …, so that every
        device keeps its own rows.
      axis_name: the replica axis when the step runs under `jax.pmap`; the batch is then the replica's share.
      reduce_dtype: the dtype in which gradients are summed: "float32", or "bfloat16" as `config.Parallel` has it.
      place_gradients: lays a gradient out over the devices, before it is added up or used.
      ema_decay: of the mean of the parameters, if the state has one.
      frozen: a tree of bools like the parameters, or a prefix of one: those whose gradient is 0, at no cost.
      statistics: numbers to log of gradients, new parameters and new optimizer state.
      measured: whether the statistics of a step, given its number from 1, are computed; otherwise their weight is 0.
    """

    def loss(params: Any, collections: Any, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Any]:
        params = jax.tree.map(lambda still, p: jax.lax.stop_gradient(p) if still else p, frozen, params)
        metrics, collections = _checked(
            experiment.loss({"params": params, **collections}, batch, key=key, train=True, axis_name=axis_name)
        )
        return metrics["loss"].total, (metrics, collections)

    def gradient(*arguments: Any) -> tuple[Any, Any]:
        grads, aux = jax.grad(loss, has_aux=True)(*arguments)
        return jax.tree.map(_wide, grads) if reduce_dtype == "float32" else grads, aux

    if reduce_dtype == "float32":
        gradient = sum_in_float32(gradient)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        step_key, rows_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = {**batch, "row_key": _row_keys(rows_key, len(batch["mask"]), axis_name)}
        step_key = _replica_key(step_key, axis_name)

        def part(collections: Any, inputs: tuple[Batch, Array]) -> tuple[Any, Any]:
            rows, index = inputs
            grads, (metrics, collections) = gradient(
                state.params, collections, rows, jax.random.fold_in(step_key, index)
            )
            return collections, (place_gradients(grads), metrics)

        if microbatches == 1:
            collections, (grads, metrics) = part(state.collections, (batch, jnp.zeros((), jnp.int32)))
        else:
            collections, (grads, metrics) = _sum_over_parts(part, state.collections, batch, microbatches)
        grads = _sum_gradients(grads, axis_name, reduce_dtype)
        metrics = sum_over_replicas(metrics, axis_name)
        if axis_name is not None:  # statistics the model did not share between replicas are averaged
            collections = jax.lax.pmean(collections, axis_name)

        # A batch in which every row is masked has no gradient: 0, not 0/0.
        weight = jnp.maximum(metrics["loss"].weight, jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        moved = optax.apply_updates(state.params, updates)
        # What is frozen is not even added to: XLA:CPU would flush a subnormal number to 0.
        params = jax.tree.map(lambda still, old, new: old if still else new, frozen, state.params, moved)
        ema = None if state.ema is None else update_ema(state.ema, params, state.step, ema_decay)
        metrics = {
            **metrics,
            "grad_norm": _single(norm(jax.tree.leaves(grads))),
            "learning_rate": _single(schedule(state.step)),
        }
        if statistics is not None:
            metrics |= _when(measured(state.step + 1), statistics, grads, params, opt_state)
        return TrainState(state.step + 1, params, collections, opt_state, ema), metrics

    return update


def eval_step(experiment: Experiment, *, axis_name: str | None = None) -> EvalStep:
    """The metrics of one batch as sums, with "examples", the number of rows that are not masked.

    They are those of the mean of the parameters if the state has one.
    """

    def evaluation(state: TrainState, batch: Batch) -> Metrics:
        params = state.params
        if state.ema is not None:
            params = jax.tree.map(lambda p, mean: mean.astype(p.dtype), params, state.ema)
        variables = {"params": params, **state.collections}
        metrics, _ = _checked(
            experiment.loss(variables, batch, key=jax.random.key(0), train=False, axis_name=axis_name)
        )
        examples = Mean(jnp.sum(batch["mask"]), jnp.ones((), jnp.float32))
        return sum_over_replicas({**metrics, "examples": examples}, axis_name)

    return evaluation


def _checked(result: Any) -> tuple[Metrics, Collections]:
    """What a loss returned, if it is what the protocol says; runs while a step is traced, so it costs nothing."""
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Mapping) for part in result)):
        raise UserError(
            "loss must return a pair of mappings, (metrics, collections); without collections, (metrics, {})"
        )
    metrics, collections = result
    if "loss" not in metrics:
        raise UserError(f"loss must return a metric named 'loss', not only {sorted(metrics)}")
    for name, mean in metrics.items():
        if not isinstance(mean, Mean):
            kind = type(mean).__name__
            raise UserError(f"metric {name!r} must be a Mean, such as Mean.of(values, batch['mask']), not a {kind}")
        if jnp.shape(mean.total) or jnp.shape(mean.weight):
            raise UserError(f"metric {name!r} is not a pair of sums: {jnp.shape(mean.total)}, {jnp.shape(mean.weight)}")
    return metrics, collections


def _when(condition: Bool[Array, ""], statistics: Statistics, *arguments: Any) -> Metrics:
    """The statistics if the condition holds; otherwise, at no cost, means without a weight."""

    def measure(*arguments: Any) -> Metrics:
        return {name: _single(value) for name, value in statistics(*arguments).items()}

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure, *arguments))
    return jax.lax.cond(condition, measure, lambda *_: nothing, *arguments)


def sum_over_replicas(tree: Any, axis_name: str | None) -> Any:
    """The sums over the replica axis; `tree` itself where there is none."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _sum_gradients(grads: Any, axis_name: str | None, reduce_dtype: str) -> Any:
    """The sums over replicas; under `jit` XLA has made them where the gradients were computed."""
    if axis_name is None or reduce_dtype == "float32":  # to which they were cast
        return sum_over_replicas(grads, axis_name)
    narrow = jax.tree.map(lambda g: g.astype(reduce_dtype), grads)
    return jax.tree.map(lambda g, s: s.astype(g.dtype), grads, sum_over_replicas(narrow, axis_name))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum_over_parts(part: Callable, collections: Any, batch: Batch, microbatches: int) -> tuple[Any, Any]:
    """Scans `part` over the microbatches, carrying collections and adding up all else that it returns."""

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)

    parts = (jax.tree.map(split, batch), jnp.arange(microbatches))
    first = jax.tree.map(lambda x: x[0], parts)
    _, sums = jax.eval_shape(part, collections, first)

    def body(carry: tuple[Any, Any], inputs: Any) -> tuple[tuple[Any, Any], None]:
        collections, sums = carry
        collections, addends = part(collections, inputs)
        return (collections, jax.tree.map(jnp.add, sums, addends)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    return jax.lax.scan(body, (collections, zeros), parts)[0]


def _row_keys(key: Key[Array, ""], rows: int, axis_name: str | None) -> Key[Array, " rows"]:
    """A key for each row, by its place in the global batch."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(rows))


def _replica_key(key: Key[Array, ""], axis_name: str | None) -> Key[Array, ""]:
    """Under pmap each replica draws its own masks; under jit the global arrays get one mask."""
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def _single(value: Any) -> Mean:
    return Mean(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))

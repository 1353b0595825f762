"""TrainState: everything a run carries from one step to the next, as arrays."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key

from trainer.experiment import Batch, Experiment
from trainer.metrics import Mean, Metrics

RECENT = 128  # losses that the limit of a loss spike is made of


@flax.struct.dataclass
class Guard:
    """What decides whether an update is dropped, and how many were; all of it is replicated.

    Attributes:
      losses: the newest losses of updates that were kept, a ring; zeros until it is full.
      count: how many losses were put into the ring.
      in_row: updates dropped since the newest one that was kept.
      dropped: updates dropped in the whole run.
    """

    losses: Float[Array, " recent"]
    count: Int32[Array, ""]
    in_row: Int32[Array, ""]
    dropped: Int32[Array, ""]


@flax.struct.dataclass
class TrainState:
    """Arrays only: no functions, no config and no random key, since keys and data follow from (seed, step).

    Attributes:
      step: the number of updates made.
      params: the trained parameters.
      collections: every other variable collection of the model, such as "batch_stats"; empty for many models.
      opt_state: the optimizer's state, moments and counts.
      ema: EMA params, an exponential moving average of the parameters in float32 or wider; None where none is kept.
      guard: a `Guard`; None where no update is ever dropped.
    """

    step: Int32[Array, ""]
    params: Any
    collections: Any
    opt_state: Any
    ema: Any = None
    guard: Any = None


def init_state(
    experiment: Experiment,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    batch: Batch,
    *,
    ema: bool = False,
    guard: bool = False,
) -> TrainState:
    """The state before the first step, with EMA params if `ema`, and a `Guard` if `guard`.

    Pure: call it in `jax.jit` or `jax.eval_shape`.
    """
    variables = dict(nn.unbox(experiment.init(key, batch)))
    params = variables.pop("params")
    variables.pop("intermediates", None)  # sown, and different at every call
    averages = jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params) if ema else None
    zero = jnp.zeros((), jnp.int32)
    fresh = Guard(jnp.zeros(RECENT, jnp.float32), zero, zero, zero) if guard else None
    return TrainState(zero, params, variables, optimizer.init(params), averages, fresh)


def drop_bad_update(
    before: TrainState, after: TrainState, loss: Mean, grad_norm: Float[Array, ""], spike: tuple[float, float] | None
) -> tuple[TrainState, Metrics]:
    """The state after an update, or `before` with the next step if the loss or the gradient is bad.

    Args:
      before: with a `Guard`.
      after: the state that the update makes.
      loss: of the whole batch, over all microbatches and replicas, so that all of them decide alike.
      grad_norm: the norm of the whole gradient.
      spike: a quantile q and a factor f: a loss is bad above f times the q-quantile of the newest `RECENT` losses,
        once there are so many. (Of a negative quantile, the limit is as far above it.) None for no such limit.

    Returns:
      The state, and the metrics "skipped" (0 or 1), "skipped_in_row", "skipped_so_far", and "spike_limit" if there is
      one, Inf until it is known.
    """
    guard, value = before.guard, (loss.total / loss.weight).astype(jnp.float32)
    is_empty = loss.weight == 0  # every example is masked
    good = jnp.isfinite(grad_norm) & (jnp.isfinite(value) | is_empty)
    limits: dict[str, Any] = {}
    if spike is not None:
        limit = spike_limit(guard, *spike)
        good, limits = good & ((value <= limit) | is_empty), {"spike_limit": limit}
    counted = good & ~is_empty
    place = guard.count % RECENT
    new = Guard(
        guard.losses.at[place].set(jnp.where(counted, value, guard.losses[place])),
        guard.count + counted,
        jnp.where(good, 0, guard.in_row + 1),
        guard.dropped + ~good,
    )
    old, updated = (dataclasses.replace(state, guard=None) for state in (before, after))
    kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), updated, old)
    numbers = {"skipped": ~good, "skipped_in_row": new.in_row, "skipped_so_far": new.dropped, **limits}
    metrics = {name: Mean.single(number) for name, number in numbers.items()}
    return dataclasses.replace(kept, step=after.step, guard=new), metrics


def spike_limit(guard: Guard, quantile: float, factor: float) -> Float[Array, ""]:
    """The largest loss that is no spike, Inf until there are `RECENT` losses."""
    middle = jnp.quantile(guard.losses, quantile)
    return jnp.where(guard.count < RECENT, jnp.inf, middle + (factor - 1) * jnp.abs(middle))


def update_ema(ema: Any, params: Any, step: Int32[Array, ""], decay: float) -> Any:
    """The EMA params after an update: e + (p − e)·(1 − d), where d = min(decay, t / (t + 1)) after t earlier updates.

    So the first 1 / (1 − decay) updates count equally, and the initial parameters do not count.

    Args:
      ema: the EMA params before, in float32 or wider.
      params: the parameters after the update.
      step: t.
      decay: at least 0, below 1.
    """
    weight = jnp.maximum(1 - decay, 1 / (step + 1))

    def average(ema: Any, param: Any) -> Any:
        wide = param.astype(ema.dtype)
        # `param` was just rounded to its dtype. XLA would drop that cast together with this one, and so the rounding.
        if param.dtype != ema.dtype:
            info = jnp.finfo(param.dtype)
            wide = jax.lax.reduce_precision(wide, info.nexp, info.nmant)
        return ema + (wide - ema) * weight.astype(ema.dtype)

    return jax.tree.map(average, ema, params)

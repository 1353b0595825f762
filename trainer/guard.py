"""Dropping the update of a step whose loss or gradient norm is not finite, or whose loss is a spike."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from trainer.metrics import Mean, Metrics
from trainer.state import TrainState

RECENT = 128  # number of recent losses from which the spike limit is computed


@flax.struct.dataclass
class Guard:
    """The numbers that decide whether an update is dropped, and how many were; all of it is replicated.

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


def new_guard() -> Guard:
    """The `Guard` of a new run."""
    zero = jnp.zeros((), jnp.int32)
    return Guard(jnp.zeros(RECENT, jnp.float32), zero, zero, zero)


def drop_bad_update(
    before: TrainState, after: TrainState, loss: Mean, grad_norm: Float[Array, ""], spike: tuple[float, float] | None
) -> tuple[TrainState, Metrics]:
    """The state after an update; if the loss or the gradient is bad, `before` with its step counter increased by one.

    Args:
      before: with a `Guard`.
      after: the state that the update makes.
      loss: of the whole batch, over all microbatches and replicas, so that all of them decide alike.
      grad_norm: the norm of the whole gradient.
      spike: (quantile, factor f): a loss is bad above f · q, where q is that quantile of the newest `RECENT` losses,
        once there are so many. (If q is negative, the limit is q + (f − 1)·|q|.) None for no such limit.

    Returns:
      The state with a new guard, and the metrics "skipped" (0 or 1), "skipped_in_row", "skipped_so_far", and
      "spike_limit" if there is one, Inf until it is known.
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

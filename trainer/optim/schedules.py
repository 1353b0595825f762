"""Schedules in steps as functions of the updates already made, built from `optax.schedules`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer import config
from trainer.optim.precision import opaque


def build_schedule(in_steps: config.Schedule) -> optax.Schedule:
    """The schedule that `config.schedule_in_steps` returned, as a traceable function of an int32 count of updates.

    Peak and final value are read through `opaque`, so that the compiled function is the same for all values.
    """
    numbers = jnp.asarray([in_steps.peak, in_steps.final], float)

    def values(count: jax.typing.ArrayLike) -> jax.Array:
        peak, final = opaque(numbers)
        pieces = _pieces(in_steps, peak, final)
        joined = optax.join_schedules([piece for _, piece in pieces], [start for start, _ in pieces[1:]])
        # Under x64 an int32 count would be divided in float32, an int64 count is divided in float64.
        return jnp.asarray(joined(jnp.asarray(count, int)), float)

    return values


def _pieces(in_steps: config.Schedule, peak: Any, final: Any) -> list[tuple[int, optax.Schedule]]:
    """The parts of a schedule: the first count of each, and a function of the counts since then."""
    warmup, end, descent = int(in_steps.warmup), int(in_steps.end or 0), int(in_steps.descent or 0)
    pieces: list[tuple[int, optax.Schedule]] = []
    if warmup:
        pieces.append((0, optax.linear_schedule(0.0, peak, warmup)))
    match in_steps.name:
        case "constant":
            pieces.append((warmup, optax.constant_schedule(peak)))
        case "linear":
            pieces.append((warmup, optax.linear_schedule(peak, final, end - warmup)))
        case "cosine":
            alpha = final / peak if in_steps.peak else 0.0
            pieces.append((warmup, optax.cosine_decay_schedule(peak, end - warmup, alpha)))
        case "polynomial":
            # JAX computes x**2 and x**2.0 differently. The float keeps a resumed run equal bit for bit.
            pieces.append((warmup, optax.polynomial_schedule(peak, final, float(in_steps.power), end - warmup)))
        case "wsd":
            pieces.append((warmup, optax.constant_schedule(peak)))
            pieces.append((end - descent, optax.linear_schedule(peak, final, descent)))
        case "step":
            factors = {int(boundary) - warmup: in_steps.factor for boundary in in_steps.boundaries}
            pieces.append((warmup, optax.piecewise_constant_schedule(peak, factors)))
        case "inverse_sqrt":
            pieces.append((warmup, _inverse_sqrt(peak, warmup)))
    if end:  # a cosine alone ends at peak · (final / peak), which may be off by a rounding
        pieces.append((end, optax.constant_schedule(final)))
    return pieces


def _inverse_sqrt(peak: Any, warmup: int) -> optax.Schedule:
    scale = max(warmup, 1)
    return lambda count: peak * jnp.sqrt(scale / jnp.maximum(count + warmup, scale))

"""Numbers as functions of the updates already made, built from `optax.schedules`."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from trainer import config
from trainer.errors import UserError


@dataclasses.dataclass(frozen=True)
class Length:
    """What the units of a schedule are measured by.

    Attributes:
      total_steps: updates of the run.
      batch_size: examples per update.
      examples: how many there are to train on.
    """

    total_steps: int
    batch_size: int
    examples: int


def build_schedule(schedule: config.Schedule, length: Length, path: str = "optimizer.schedule") -> optax.Schedule:
    """The schedule that a resolved config describes, as a traceable function of an int32 count.

    Args:
      schedule: its settings.
      length: that of the run.
      path: the place of the settings in the run, to name in an error.

    Raises:
      UserError: rounded to whole updates, times fall together, or come after the run.
    """
    exact = _in_steps(schedule, length, path)
    peak, final = exact.peak, exact.final
    warmup, end, descent = int(exact.warmup), int(exact.end or 0), int(exact.descent or 0)
    pieces: list[tuple[int, optax.Schedule]] = []  # (first count, function of the counts since then)
    if warmup:
        pieces.append((0, optax.linear_schedule(0.0, peak, warmup)))
    match exact.name:
        case "constant":
            pieces.append((warmup, optax.constant_schedule(peak)))
        case "linear":
            pieces.append((warmup, optax.linear_schedule(peak, final, end - warmup)))
        case "cosine":
            pieces.append((warmup, optax.cosine_decay_schedule(peak, end - warmup, final / peak if peak else 0.0)))
        case "polynomial":
            # As a float: a whole exponent would be computed in another way than the same exponent read from JSON.
            pieces.append((warmup, optax.polynomial_schedule(peak, final, float(exact.power), end - warmup)))
        case "wsd":
            pieces.append((warmup, optax.constant_schedule(peak)))
            pieces.append((end - descent, optax.linear_schedule(peak, final, descent)))
        case "step":
            factors = {int(boundary) - warmup: exact.factor for boundary in exact.boundaries}
            pieces.append((warmup, optax.piecewise_constant_schedule(peak, factors)))
        case "inverse_sqrt":
            pieces.append((warmup, _inverse_sqrt(peak, warmup)))
    if end:  # a cosine alone ends at peak · (final / peak), which may be off by a rounding
        pieces.append((end, optax.constant_schedule(final)))
    joined = optax.join_schedules([piece for _, piece in pieces], [start for start, _ in pieces[1:]])

    def values(count: jax.typing.ArrayLike) -> jax.Array:
        # Under x64 an int32 count would be divided in float32, an int64 count is divided in float64.
        return jnp.asarray(joined(jnp.asarray(count, int)), float)

    return values


def _inverse_sqrt(peak: float, warmup: int) -> optax.Schedule:
    scale = max(warmup, 1)
    return lambda count: peak * jnp.sqrt(scale / jnp.maximum(count + warmup, scale))


def _in_steps(schedule: config.Schedule, length: Length, path: str) -> config.Schedule:
    """The same schedule with every time in whole updates, and the end of the run written out."""
    run = schedule.run_steps or length.total_steps
    scale, each = {
        "steps": (1.0, "step"),
        "epochs": (length.examples / length.batch_size, "epoch"),
        "examples": (1 / length.batch_size, "example"),
        "percent": (run / 100, "percent"),
    }[schedule.unit]
    measure = f"{scale:.6g} steps per {each}"

    def steps(name: str, time: int | float) -> int:
        count = round(time * scale)
        if time and not count:
            raise UserError(f"{path}.{name} has {time:.12g} {schedule.unit}, which is no step ({measure})")
        return count

    warmup, end, descent = (steps(name, getattr(schedule, name) or 0) or None for name in ("warmup", "end", "descent"))
    warmup, whole = warmup or 0, end or run
    if descent and descent > 1 and warmup + descent == whole + 1:  # both were rounded up
        descent -= 1
    boundaries = tuple(steps("boundaries", boundary) for boundary in schedule.boundaries)
    exact = dataclasses.replace(schedule, unit="steps", warmup=warmup, end=end, descent=descent, boundaries=boundaries)
    try:
        config.check_schedule(exact, path, run)
    except UserError as error:
        raise UserError(f"{error} (in steps: {measure})") from error
    if schedule.name in config.DESCENTS:
        exact.end = whole
    return exact

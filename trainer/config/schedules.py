"""What the settings of a schedule mean together: which of them its name uses, and the order of its times."""

import dataclasses
import itertools
import math

from trainer.config.settings import Run, Schedule
from trainer.errors import UserError

# Those that reach `final` at `end`.
DESCENTS = ("linear", "cosine", "polynomial", "wsd")
# The settings that only some schedules use, and which.
_USED_BY = {
    "final": DESCENTS,
    "end": DESCENTS,
    "descent": ("wsd",),
    "boundaries": ("step",),
    "factor": ("step",),
    "power": ("polynomial",),
}


def resolve_schedule(schedule: Schedule, path: str, run: Run) -> None:
    """Checks the schedule at `path` of `run`, and fills in `run_steps` if it follows the run's length.

    Raises:
      UserError: settings contradict each other. What takes the length of the data is checked when it is built.
    """
    times = (schedule.warmup, schedule.end or 0, schedule.descent or 0, *schedule.boundaries)
    to_the_end = schedule.name in DESCENTS and not schedule.end
    steps = schedule.run_steps or run.total_steps
    if to_the_end or (schedule.unit == "percent" and any(times)):
        schedule.run_steps = steps
    length = {"steps": steps, "epochs": math.inf, "examples": steps * run.batch_size, "percent": 100}
    check_schedule(schedule, path, length[schedule.unit])


def check_schedule(schedule: Schedule, path: str, length: float) -> None:
    """Raises `UserError` if the settings of the schedule at `path` contradict each other.

    Args:
      schedule: its fields are of the right types and within their ranges.
      path: such as `optimizer.schedule`.
      length: that of the run in the schedule's unit; infinite when it is not known yet.
    """
    name, unit = schedule.name, schedule.unit
    _check_used(schedule, path)
    if name == "step" and not schedule.boundaries:
        raise UserError(f"{path}.boundaries is empty; a step schedule needs the {unit} after which it steps down")
    if name == "wsd" and not schedule.descent:
        raise UserError(f"{path}.descent is None; a wsd schedule needs the {unit} of its descent")
    if not schedule.power:
        raise UserError(f"{path}.power is 0; it must be above 0")
    if name in DESCENTS and schedule.final > schedule.peak:
        raise UserError(
            f"{path}.final is {schedule.final}; a {name} descent ends at or below its peak, {schedule.peak}"
        )
    _check_unit(schedule, path)
    _check_order(schedule, path, length)


def _check_used(schedule: Schedule, path: str) -> None:
    """A setting that does nothing is a mistake: most likely the name is."""
    for field in dataclasses.fields(schedule):
        users, value = _USED_BY.get(field.name), getattr(schedule, field.name)
        if users and schedule.name not in users and value != field.default:
            raise UserError(
                f"{path}.{field.name} is {value!r}, which a schedule named {schedule.name!r} does not use "
                f"(used by {', '.join(users)})"
            )


def _check_unit(schedule: Schedule, path: str) -> None:
    names = ("warmup", "end", "descent", *["boundaries"] * len(schedule.boundaries))
    times = (schedule.warmup, schedule.end or 0, schedule.descent or 0, *schedule.boundaries)
    for name, time in zip(names, times, strict=True):
        if schedule.unit == "percent" and time > 100:
            raise UserError(f"{path}.{name} has {time:.12g} percent; of a run there are at most 100")
        if schedule.unit in ("steps", "examples") and time % 1:
            raise UserError(f"{path}.{name} has {time:.12g} {schedule.unit}; a whole number is expected")


def _check_order(schedule: Schedule, path: str, length: float) -> None:
    unit, warmup, boundaries = schedule.unit, schedule.warmup, schedule.boundaries
    whole = schedule.end or length  # only a descent has an end of its own, which may lie past that of the run
    hint = "" if schedule.end else f"; for a run cut short, set {path}.run_steps to its full length"
    if warmup >= whole:
        raise UserError(f"{path}.warmup is {warmup:.12g}, but the whole schedule has only {whole:.12g} {unit}{hint}")
    # The tolerance is for sums such as 0.1 + 0.2.
    if warmup + (schedule.descent or 0) > whole * (1 + 1e-9):
        raise UserError(
            f"{path}.descent is {schedule.descent:.12g}, but the warm-up leaves only {whole - warmup:.12g} of "
            f"{whole:.12g} {unit}{hint}"
        )
    if any(first >= second for first, second in itertools.pairwise((warmup, *boundaries))):
        raise UserError(
            f"{path}.boundaries is {boundaries}; they must ascend, the first above the warm-up ({warmup:.12g} {unit})"
        )
    if boundaries and boundaries[-1] >= length:
        raise UserError(f"{path}.boundaries is {boundaries}, but the run has only {length:.12g} {unit}{hint}")

"""Schedules and evaluations in whole updates, with their checks."""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

from trainer.config.optimizer import Schedule
from trainer.config.settings import Evaluation, Run
from trainer.errors import UserError

DESCENTS = ("linear", "cosine", "polynomial", "wsd")  # schedules that reach `final` at `end`
# The settings that only some schedules use, with the names of these schedules.
_USED_BY = {"final": DESCENTS, "end": DESCENTS, "descent": ("wsd",), "power": ("polynomial",)}
_USED_BY |= {"boundaries": ("step",), "factor": ("step",)}


def schedule_in_steps(schedule: Schedule, path: str, run: Run, examples: int | None = None) -> Schedule:
    """The schedule at `path` of `run` with its times in whole updates, and the end of a descent written out.

    `examples`, the length of the training split, gives the length of an epoch. Without it, times in epochs are not
    converted: only their order is checked. Raises `UserError` if settings contradict each other, if a time rounds to 0
    updates, or if it lies after the end of the schedule: its own `end`, which may be after the run, or else the run's.
    """
    _check_used(schedule, path)
    unit, length = schedule.unit, schedule.run_steps or run.total_steps
    per_epoch = examples / run.batch_size if examples else None
    scale = {"steps": 1.0, "epochs": per_epoch, "examples": 1 / run.batch_size, "percent": length / 100}[unit]
    measure = _measure(unit, scale)

    def steps(name: str, time: float) -> Any:
        return _in_steps(f"{path}.{name}", time, unit, scale)

    given = {name: time for name in ("warmup", "end", "descent") if (time := getattr(schedule, name)) is not None}
    times: dict[str, Any] = {name: steps(name, time) for name, time in given.items()}
    times["boundaries"] = tuple(steps("boundaries", time) for time in schedule.boundaries)
    run_end = length if scale else math.inf
    end = times.get("end", run_end)
    whole = run_end / (scale or 1) if schedule.end is None else schedule.end
    fits = schedule.warmup + (schedule.descent or 0) <= whole * (1 + 1e-9)  # the tolerance is for sums as 0.1 + 0.2
    if fits and times.get("descent", 0) > 1 and times["warmup"] + times["descent"] == end + 1:  # both were rounded up
        times["descent"] -= 1
    in_steps = dataclasses.replace(schedule, **times, unit="steps" if scale else unit)
    _check_order(schedule, in_steps, path, run_end, measure, fits)
    return dataclasses.replace(in_steps, end=end) if scale and schedule.name in DESCENTS else in_steps


def _measure(unit: str, scale: float | None) -> str:
    """The length of a unit, for an error: " (in steps: 0.0625 per example)"; "" for steps, or if it is not known."""
    return f" (in steps: {scale:.6g} per {unit.removesuffix('s')})" if scale and unit != "steps" else ""


def _in_steps(path: str, time: float, unit: str, scale: float | None) -> Any:
    """A time in whole updates, `scale` of which make a unit; the time itself if `scale` is None, not known yet.

    Raises `UserError` if it is more than the run, a part of a step or an example, or rounds to 0 updates.
    """
    if unit == "percent" and time > 100:
        raise UserError(f"{path} is {time:.12g} percent; a run has at most 100 percent")
    if unit in ("steps", "examples") and time % 1:
        raise UserError(f"{path} has {time:.12g} {unit}; a whole number is expected")
    count = time if scale is None else round(time * scale)
    if time and not count:
        raise UserError(f"{path} has {time:.12g} {unit}, which rounds to 0 steps{_measure(unit, scale)}")
    return count


def _check_used(schedule: Schedule, path: str) -> None:
    """Raises `UserError` for settings that a schedule of this name does not use, and for missing ones."""
    name, unit = schedule.name, schedule.unit
    for field in dataclasses.fields(schedule):
        users, value = _USED_BY.get(field.name), getattr(schedule, field.name)
        if users and name not in users and value != field.default:
            used = f"(used by {', '.join(users)})"
            raise UserError(f"{path}.{field.name} is {value!r}, which a schedule named {name!r} does not use {used}")
    if name == "step" and not schedule.boundaries:
        raise UserError(f"{path}.boundaries is empty; a step schedule needs the {unit} after which it steps down")
    if name == "wsd" and not schedule.descent:
        raise UserError(f"{path}.descent is {schedule.descent}; a wsd schedule needs the {unit} of its descent")
    if name in DESCENTS and schedule.final > schedule.peak:
        peak = f"a {name} descent ends at or below its peak, {schedule.peak}"
        raise UserError(f"{path}.final is {schedule.final}; {peak}")


def _check_order(given: Schedule, in_steps: Schedule, path: str, length: float, measure: str, fits: bool) -> None:
    """Checks the order of times in steps, or in epochs of unknown length; errors show them as they were given."""
    unit, warmup, hint = given.unit, f"{given.warmup:.12g} {given.unit}", measure
    if given.end is None:
        whole, end = length, f"{length} steps"
        hint += f"; to try a few steps of a run give --until, or set {path}.run_steps to its full length"
    else:  # a descent with an end of its own, which may lie past that of the run
        whole, end = in_steps.end or 0, f"{given.end:.12g} {unit}"
    if in_steps.warmup >= whole:
        raise UserError(f"{path}.warmup is {warmup}, but the whole schedule has only {end}{hint}")
    if not fits or in_steps.warmup + (in_steps.descent or 0) > whole * (1 + 1e-9):
        left = f"{whole - in_steps.warmup:.12g} of {whole:.12g} {in_steps.unit if math.isinf(length) else 'steps'}"
        raise UserError(f"{path}.descent is {given.descent:.12g} {unit}, but the warm-up leaves only {left}{hint}")
    boundaries = f"{path}.boundaries is {given.boundaries} {unit}"
    if any(first >= second for first, second in itertools.pairwise((in_steps.warmup, *in_steps.boundaries))):
        raise UserError(f"{boundaries}; they must ascend, the first above the warm-up ({warmup}){measure}")
    if in_steps.boundaries and in_steps.boundaries[-1] >= length:
        raise UserError(f"{boundaries}, but the run has only {length} steps{hint}")


def evaluations(run: Run) -> dict[str, Evaluation]:
    """Every evaluation of a run by the name that its metrics have; the main one first."""
    return {run.evaluation.split: run.evaluation, **run.evaluations}


def evaluation_of(metric: str, names: Iterable[str]) -> str | None:
    """The evaluation, among those with these names, that gives a metric such as "test/loss"; None if none does."""
    return max((name for name in names if metric.startswith(f"{name}/")), key=len, default=None)


def evaluations_in_steps(run: Run, examples: int) -> dict[str, Evaluation]:
    """As `evaluations`, with `every_steps` of each computed from `every`; `examples` are those of an epoch.

    An interval is rounded to whole steps once, so that every interval of an evaluation has the same length. Raises
    `UserError` for an interval that a schedule would refuse, see `schedule_in_steps`, and if checkpoints fall between
    the evaluations of `checkpoint.best_metric`.
    """
    epoch, percent = examples / run.batch_size, run.total_steps / 100
    scales = {"epochs": epoch, "examples": 1 / run.batch_size, "percent": percent}

    def path_of(name: str) -> str:
        return "evaluation" if name == run.evaluation.split else f"evaluations.{name}"

    def in_steps(name: str, evaluation: Evaluation) -> Evaluation:
        if (every := evaluation.every) is None:
            return evaluation
        steps = _in_steps(f"{path_of(name)}.every", every, evaluation.unit, scales[evaluation.unit])
        return dataclasses.replace(evaluation, every_steps=steps)

    found = {name: in_steps(name, evaluation) for name, evaluation in evaluations(run).items()}
    if (best := run.checkpoint.best_metric) is not None:
        name = evaluation_of(best, found) or run.evaluation.split
        evaluated = found[name].every_steps
        if evaluated is None or run.checkpoint.every_steps % evaluated:
            rule = f"({run.checkpoint.every_steps}) must be a multiple of {path_of(name)}.every_steps ({evaluated})"
            need = f"checkpoint.best_metric {best!r} needs an evaluation at every checkpoint"
            raise UserError(f"{need}: checkpoint.every_steps {rule}")
    return found


def number_text(number: float | Schedule) -> str:
    """A number or a schedule in a few characters, such as `0.1`, `cosine 0.1` or `cosine 0.1 → 0.01`."""
    if not isinstance(number, Schedule):
        return f"{number:g}"
    if number.name == "constant" and not number.warmup:
        return f"{number.peak:g}"
    return f"{number.name} {number.peak:g}" + (f" → {number.final:g}" if number.final else "")

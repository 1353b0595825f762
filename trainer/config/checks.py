"""Checks of a run before any device is touched: types, ranges, names, and settings that contradict each other."""

import copy
import dataclasses
import itertools
import math
import operator
import re
import typing
from collections.abc import Iterator
from typing import Any

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from trainer.config.encoding import to_json
from trainer.config.settings import Optimizer, Run, Schedule
from trainer.errors import UserError, did_you_mean
from trainer.experiment import Experiment

_SMALLEST = 2.0**-126  # the smallest normal float32; all arithmetic of an update is at least float32
_LARGEST = 2.0**127 * (2 - 2.0**-23)  # the largest float32
_IS_WRONG = {"minimum": operator.lt, "maximum": operator.gt, "above": operator.le, "below": operator.ge}
_BOUNDS = {"minimum": "at least", "maximum": "at most", "above": "above", "below": "below"}
_DESCENTS = ("linear", "cosine", "polynomial", "wsd")  # schedules that reach `final` at `end`
# The settings that only some schedules use, with the names of these schedules.
_USED_BY = {"final": _DESCENTS, "end": _DESCENTS, "descent": ("wsd",), "power": ("polynomial",)}
_USED_BY |= {"boundaries": ("step",), "factor": ("step",)}


def resolve(run: Run) -> Run:
    """A checked copy of `run` in which every None that stands for another setting is replaced by its value.

    Raises `UserError` if a value has the wrong type or is out of range, or if settings contradict each other.
    """
    run = copy.deepcopy(run)
    check_types(run)
    _check_optimizer(run.optimizer)
    for path, schedule in schedules(run.optimizer).items():
        schedule_in_steps(schedule, path, run)
        to_the_end = schedule.name in _DESCENTS and schedule.end is None
        steps = schedule.run_steps or run.total_steps
        times = (schedule.warmup, schedule.end, schedule.descent, *schedule.boundaries)
        if to_the_end or (schedule.unit == "percent" and any(times)):  # it follows the length of the run
            schedule.run_steps = steps
        falls_to_0 = to_the_end and schedule.peak and not schedule.final and not path.endswith(".decay_schedule")
        if falls_to_0 and steps < run.total_steps:
            idle = f"is 0 from step {steps + 1} to the last step, {run.total_steps}, because its run_steps is {steps}"
            longer = f"to stretch the {schedule.name} over all steps, choose a new --workdir and leave run_steps out"
            keep = "to keep run_steps, set a final above 0; or, if 0 is meant, set the end at which it is reached"
            raise UserError(f"{path} {idle}: {longer}; {keep}")
    if run.batch_size % run.microbatches:
        raise UserError(f"batch_size {run.batch_size} does not divide into {run.microbatches} microbatches")
    if run.evaluation.batch_size is None:
        run.evaluation.batch_size = run.batch_size
    best, evaluated = run.checkpoint.best_metric, run.evaluation.every_steps
    if best is not None and (evaluated is None or run.checkpoint.every_steps % evaluated):
        rule = f"({run.checkpoint.every_steps}) must be a multiple of evaluation.every_steps ({evaluated})"
        need = f"checkpoint.best_metric {best!r} needs an evaluation at every checkpoint"
        raise UserError(f"{need}: checkpoint.every_steps {rule}")
    return run


def schedules(optimizer: Optimizer) -> dict[str, Schedule]:
    """Every schedule of an optimizer by its path in the run, such as `optimizer.schedule`."""
    return {path: value for path, _, value, _ in _fields(optimizer, "optimizer.") if isinstance(value, Schedule)}


def schedule_in_steps(schedule: Schedule, path: str, run: Run, examples: int | None = None) -> Schedule:
    """The schedule at `path` of `run` with its times in whole updates, and the end of a descent written out.

    `examples`, the length of the training split, gives the length of an epoch. Without it, times in epochs are not
    converted: only their order is checked. Raises `UserError` if settings contradict each other, or if a time rounds to
    0 updates or lies after the end of the run.
    """
    _check_used(schedule, path)
    unit, length = schedule.unit, schedule.run_steps or run.total_steps
    per_epoch = examples / run.batch_size if examples else None
    scale = {"steps": 1.0, "epochs": per_epoch, "examples": 1 / run.batch_size, "percent": length / 100}[unit]
    measure = f" (in steps: {scale:.6g} per {unit.removesuffix('s')})" if scale and unit != "steps" else ""

    def steps(name: str, time: float) -> Any:
        if unit == "percent" and time > 100:
            raise UserError(f"{path}.{name} has {time:.12g} percent; of a run there are at most 100")
        if unit in ("steps", "examples") and time % 1:
            raise UserError(f"{path}.{name} has {time:.12g} {unit}; a whole number is expected")
        count = time if scale is None else round(time * scale)
        if time and not count:
            raise UserError(f"{path}.{name} has {time:.12g} {unit}, which rounds to 0 steps{measure}")
        return count

    given = {name: time for name in ("warmup", "end", "descent") if (time := getattr(schedule, name)) is not None}
    times: dict[str, Any] = {name: steps(name, time) for name, time in given.items()}
    times["boundaries"] = tuple(steps("boundaries", time) for time in schedule.boundaries)
    run_end = length if scale else math.inf
    end = times.get("end", run_end)
    whole = run_end / (scale or 1) if schedule.end is None else schedule.end
    fits = schedule.warmup + (schedule.descent or 0) <= whole * (1 + 1e-9)  # the tolerance is for sums as 0.1 + 0.2
    if fits and times.get("descent", 0) > 1 and times["warmup"] + times["descent"] == end + 1:  # both were rounded up
        times["descent"] -= 1
    exact = dataclasses.replace(schedule, **times, unit="steps" if scale else unit)
    _check_order(schedule, exact, path, run_end, measure, fits)
    return dataclasses.replace(exact, end=end) if scale and schedule.name in _DESCENTS else exact


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
    if name in _DESCENTS and schedule.final > schedule.peak:
        peak = f"a {name} descent ends at or below its peak, {schedule.peak}"
        raise UserError(f"{path}.final is {schedule.final}; {peak}")


def _check_order(given: Schedule, exact: Schedule, path: str, length: float, measure: str, fits: bool) -> None:
    """Checks the order of times in steps, or in epochs of unknown length; errors show them as they were given."""
    unit, warmup, hint = given.unit, f"{given.warmup:.12g} {given.unit}", measure
    if given.end is None:
        whole, end = length, f"{length} steps"
        hint += f"; for a run cut short, set {path}.run_steps to its full length"
    else:  # a descent with an end of its own, which may lie past that of the run
        whole, end = exact.end or 0, f"{given.end:.12g} {unit}"
    if exact.warmup >= whole:
        raise UserError(f"{path}.warmup is {warmup}, but the whole schedule has only {end}{hint}")
    if not fits or exact.warmup + (exact.descent or 0) > whole * (1 + 1e-9):
        left = f"{whole - exact.warmup:.12g} of {whole:.12g} {exact.unit if math.isinf(length) else 'steps'}"
        raise UserError(f"{path}.descent is {given.descent:.12g} {unit}, but the warm-up leaves only {left}{hint}")
    boundaries = f"{path}.boundaries is {given.boundaries} {unit}"
    if any(first >= second for first, second in itertools.pairwise((exact.warmup, *exact.boundaries))):
        raise UserError(f"{boundaries}; they must ascend, the first above the warm-up ({warmup}){measure}")
    if exact.boundaries and exact.boundaries[-1] >= length:
        raise UserError(f"{boundaries}, but the run has only {length} steps{hint}")


def _check_optimizer(optimizer: Optimizer) -> None:
    """Raises `UserError` for settings that contradict each other or that would do nothing."""
    for name in ("eps", "eps_root"):
        if 0 < getattr(optimizer, name) < _SMALLEST:
            raise UserError(f"optimizer.{name} is {getattr(optimizer, name)}, which is 0 in float32")
    names = {optimizer.name, *(group.optimizer or optimizer.name for group in optimizer.groups.values())}
    for path, _, value, _ in _fields(optimizer, "optimizer."):
        if isinstance(value, int | float) and abs(value) > _LARGEST:
            raise UserError(f"{path} is {value}, which is infinite in float32")
    if optimizer.eps == optimizer.eps_root == 0 and names != {"sgd"}:
        raise UserError("optimizer.eps and optimizer.eps_root are both 0: a gradient of zero would be divided by zero")
    if optimizer.rectify and optimizer.amsgrad:
        raise UserError("optimizer.rectify and optimizer.amsgrad cannot be combined")
    if not optimizer.sgd_fallback and not optimizer.rectify:
        raise UserError("optimizer.sgd_fallback is False, which has an effect only if optimizer.rectify is True")
    for name in ("rectify", "amsgrad"):
        if getattr(optimizer, name) and names != {"adabelief"}:
            other = ", ".join(sorted(names - {"adabelief"}))
            raise UserError(f"optimizer.{name} works with adabelief only, but the run uses {other}")
    for label, group in optimizer.groups.items():
        if group.decay_schedule is not None and group.weight_decay:
            raise UserError(f"optimizer.groups.{label} has a weight_decay and a decay_schedule; give one of them")
        if group.nu_dtype is not None and (group.optimizer or optimizer.name) == "sgd":
            raise UserError(f"optimizer.groups.{label} has a nu_dtype, but sgd has no second moment")
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if group.frozen and field.name != "frozen" and value != field.default:
                raise UserError(f"optimizer.groups.{label} is frozen, so its {field.name}, {value}, does nothing")
    if optimizer.groups and all(group.frozen for group in optimizer.groups.values()):
        raise UserError("every group of optimizer.groups is frozen: there is nothing to train")


def check_types(run: Run) -> None:
    """Raises `UserError` for the first value whose type or range is not as its setting declares."""
    if not isinstance(run, Run):
        raise UserError(f"get_config() must return a trainer.config.Run, not {type(run).__name__}")
    if isinstance(run.experiment, type):
        raise UserError(f"experiment is the class {run.experiment.__name__}; an instance is expected, as a call makes")
    if not isinstance(run.experiment, Experiment) or not dataclasses.is_dataclass(run.experiment):
        kind = type(run.experiment).__name__
        raise UserError(f"experiment is {kind}, which is not a dataclass with init, loss and source")
    to_json(run)
    for path, field, value, hint in _fields(run):
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            raise UserError(f"{path} is {value!r}; {type_name(hint)} is expected") from error
        kinds = typing.get_args(hint) or (hint,)
        if isinstance(value, bool) and bool not in kinds and {int, float} & {*kinds}:  # Python counts True as 1
            raise UserError(f"{path} is {value}; {type_name(hint)} is expected")
        for name, bound in field.metadata.get("bounds", {}).items() if isinstance(value, int | float) else ():
            if _IS_WRONG[name](value, bound):
                raise UserError(f"{path} is {value}; it must be {_BOUNDS[name]} {bound}")
        choices = field.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise UserError(f"{path} is {value!r}{did_you_mean(value, choices)}")


def _fields(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any, Any]]:
    """(path, field, value, declared type) of every setting below `node`, dataclasses in dicts included."""
    hints = _types(node)
    for field in dataclasses.fields(node):
        path, value = prefix + field.name, getattr(node, field.name)
        if hints[field.name] is not Experiment:  # a protocol, which `check_types` checks by itself
            yield path, field, value, hints[field.name]
        for name, child in value.items() if isinstance(value, dict) else [("", value)]:
            if dataclasses.is_dataclass(child):
                yield from _fields(child, f"{path}.{name}." if name else f"{path}.")


def _types(node: Any) -> dict[str, Any]:
    """The declared type of each field of a dataclass."""
    try:
        hints = typing.get_type_hints(type(node))
    except NameError as error:  # `from __future__ import annotations` leaves types as text
        raise UserError(f"{type(node).__qualname__} has a field of a type that cannot be found: {error}") from error
    return {field.name: hints[field.name] for field in dataclasses.fields(node)}


def type_name(hint: Any) -> str:
    """A declared type without the modules of its classes."""
    return hint.__name__ if isinstance(hint, type) else re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(hint))


def setting_at(run: Run, path: str) -> tuple[Any, str, Any]:
    """The dataclass or dict that holds the setting at a path such as `optimizer.b1`, its name, and its declared type.

    Raises `UserError`, with the most similar name, if there is no such setting.
    """
    owner, name, hint, node, walked = None, "", Run, run, "config"
    for name in path.split("."):
        if dataclasses.is_dataclass(node):
            known = _types(node)
        elif isinstance(node, dict):
            known = dict.fromkeys(node, (typing.get_args(hint) or (Any,))[-1])
        else:
            first = f"; create it first: in the config file, or by --{walked}=build" if node is None else ""
            raise UserError(f"{walked} is {node!r} and has no field {name!r}{first}")
        if name not in known:
            raise UserError(f"{walked} has no field {name!r}{did_you_mean(name, known)}")
        owner, hint, walked = node, known[name], f"{walked}.{name}"
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    return owner, name, hint

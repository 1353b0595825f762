"""Checks of a run before any device is touched: types, ranges, names, and settings that contradict each other."""

import copy
import dataclasses
import operator
import re
import typing
from collections.abc import Iterator
from typing import Any

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from trainer.config.encoding import to_json
from trainer.config.optimizer import FUSED_OPTIMIZERS, Group, Transform
from trainer.config.schedules import DESCENTS, evaluations, evaluations_in_steps, schedule_in_steps
from trainer.config.settings import Optimizer, Run, Schedule
from trainer.errors import UserError, did_you_mean
from trainer.experiment import Experiment

_SMALLEST = 2.0**-126  # the smallest normal float32; all arithmetic of an update is at least float32
_LARGEST = 2.0**127 * (2 - 2.0**-23)  # the largest float32
_IS_WRONG = {"minimum": operator.lt, "maximum": operator.gt, "above": operator.le, "below": operator.ge}
# Settings that only `FUSED_OPTIMIZERS` use.
_FUSED = ("b1", "b2", "eps", "eps_root", "nesterov", "mu_dtype", "nu_dtype")
_BOUNDS = {"minimum": "at least", "maximum": "at most", "above": "above", "below": "below"}


def resolve(run: Run) -> Run:
    """A checked copy of `run` in which missing values are filled in.

    These are the `batch_size` of each evaluation, and the `run_steps` of each schedule that depends on the length of
    the run. Raises `UserError` if a value has the wrong type or is out of range, or if settings contradict each other.
    """
    run = copy.deepcopy(run)
    check_types(run)
    _check_optimizer(run.optimizer)
    for path, schedule in schedules_of(run.optimizer).items():
        schedule_in_steps(schedule, path, run)
        to_the_end = schedule.name in DESCENTS and schedule.end is None
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
    for name, evaluation in evaluations(run).items():
        if evaluation.batch_size is None:
            evaluation.batch_size = run.batch_size
        if evaluation.every is not None and evaluation.every_steps is not None:
            path = f"evaluations.{name}" if name in run.evaluations else "evaluation"
            raise UserError(f"{path} has every and every_steps; give one of them")
        if name in run.evaluations and (not re.fullmatch(r"[\w.-]+", name) or name in ("train", run.evaluation.split)):
            other = f"other than 'train' and {run.evaluation.split!r}, the split of the main one"
            raise UserError(
                f"evaluations has the name {name!r}; letters, digits, '_', '.' and '-' are expected, {other}"
            )
    if run.evaluation.every is None and not any(e.every for e in run.evaluations.values()):
        evaluations_in_steps(run, 1)  # checks what it can before the data are read
    return run


def schedules_of(optimizer: Optimizer) -> dict[str, Schedule]:
    """Every schedule of an optimizer by its path in the run, such as `optimizer.schedule`."""
    return {path: value for path, _, value, _ in _fields(optimizer, "optimizer.") if isinstance(value, Schedule)}


def _check_optimizer(optimizer: Optimizer) -> None:
    """Raises `UserError` for settings that contradict each other or that would do nothing."""
    for name in ("eps", "eps_root"):
        if 0 < getattr(optimizer, name) < _SMALLEST:
            raise UserError(f"optimizer.{name} is {getattr(optimizer, name)}, which is 0 in float32")
    names = {_kind(optimizer.name), *(_kind(g.optimizer or optimizer.name) for g in optimizer.groups.values())}
    for path, _, value, _ in _fields(optimizer, "optimizer."):
        if isinstance(value, int | float) and abs(value) > _LARGEST:
            raise UserError(f"{path} is {value}, which is infinite in float32")
    if optimizer.eps == optimizer.eps_root == 0 and names & {"adabelief", "adam"}:
        raise UserError("optimizer.eps and optimizer.eps_root are both 0: a gradient of zero would be divided by zero")
    if optimizer.rectify and optimizer.amsgrad:
        raise UserError("optimizer.rectify and optimizer.amsgrad cannot be combined")
    if not optimizer.sgd_fallback and not optimizer.rectify:
        raise UserError("optimizer.sgd_fallback is False, which has an effect only if optimizer.rectify is True")
    _check_fused_settings(optimizer, names - {*FUSED_OPTIMIZERS}, is_all=not names & {*FUSED_OPTIMIZERS})
    for name in ("rectify", "amsgrad"):
        if getattr(optimizer, name) and names != {"adabelief"}:
            other = ", ".join(sorted(names - {"adabelief"}))
            raise UserError(f"optimizer.{name} works with adabelief only, but the run uses {other}")
    for label, group in optimizer.groups.items():
        if group.decay_schedule is not None and group.weight_decay:
            raise UserError(f"optimizer.groups.{label} has a weight_decay and a decay_schedule; give one of them")
        if group.nu_dtype is not None and (group.optimizer or optimizer.name) == "sgd":
            raise UserError(f"optimizer.groups.{label} has a nu_dtype, but sgd has no second moment")
        _check_options(f"optimizer.groups.{label}", group.optimizer or optimizer.name, group)
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if group.frozen and field.name != "frozen" and value != getattr(Group(), field.name):
                raise UserError(f"optimizer.groups.{label} is frozen, so its {field.name}, {value}, does nothing")
    if optimizer.groups and all(group.frozen for group in optimizer.groups.values()):
        raise UserError("every group of optimizer.groups is frozen: there is nothing to train")


def _kind(name: str | Transform) -> str:
    return name if isinstance(name, str) else type(name).__name__


def _check_fused_settings(optimizer: Optimizer, others: set[str], *, is_all: bool) -> None:
    """Raises `UserError` for settings that only the fused pass uses, where the optimizers `others` do not use them."""
    if _kind(optimizer.name) in FUSED_OPTIMIZERS and optimizer.options:
        own = f"but {optimizer.name} has settings of its own, such as b1"
        raise UserError(f"optimizer.options is {optimizer.options}, {own}")
    for field in dataclasses.fields(optimizer) if others else ():
        value = getattr(optimizer, field.name)
        if field.name in ("cautious", "param_rounding") and value != field.default:
            fused, used = ", ".join(FUSED_OPTIMIZERS), ", ".join(sorted(others))
            raise UserError(f"optimizer.{field.name} works with {fused} only, but the run uses {used}")
        if is_all and field.name in _FUSED and value != field.default:
            used = f"which {_kind(optimizer.name)} does not use: give it in optimizer.options, if it has one"
            raise UserError(f"optimizer.{field.name} is {value}, {used}")


def _check_options(path: str, name: str | Transform, group: Group) -> None:
    """Raises `UserError` for settings of a group that its optimizer does not use."""
    if isinstance(name, str) and name in FUSED_OPTIMIZERS:
        if group.options:
            raise UserError(f"{path}.options is {group.options}, but {name} has settings of its own, such as b1")
        return
    for field in ("mu_dtype", "nu_dtype"):
        if getattr(group, field) is not None:
            raise UserError(
                f"{path} has a {field}, which {_kind(name)} does not use: give it in options, if it has one"
            )
    if group.options and group.optimizer is None:
        raise UserError(f"{path}.options is given without an optimizer of the group: use optimizer.options")


def check_types(run: Run) -> None:
    """Raises `UserError` for the first value whose type or range is not as its setting declares."""
    if not isinstance(run, Run):
        raise UserError(f"get_config() must return a trainer.config.Run, not {type(run).__name__}")
    if isinstance(run.experiment, type):
        kind = run.experiment.__name__
        raise UserError(f"experiment is the class {kind}; pass an instance: {kind}()")
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
        choices, prefix = field.metadata.get("choices"), field.metadata.get("prefix")
        is_other = isinstance(value, str) and not (prefix and value.startswith(prefix))
        if choices and is_other and value not in choices:
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
            made = "--init-from=SOURCE" if walked == "config.init_from" else f"--{walked}=build"
            first = f"; create it first: in the config file, or by {made}" if node is None else ""
            raise UserError(f"{walked} is {node!r} and has no field {name!r}{first}")
        if isinstance(node, dict) and walked.endswith(".options"):  # only Optax knows the names of its options
            known = {**known, name: Any}
        if name not in known:
            raise UserError(f"{walked} has no field {name!r}{did_you_mean(name, known)}")
        owner, hint, walked = node, known[name], f"{walked}.{name}"
        node = node.get(name) if isinstance(node, dict) else getattr(node, name)
    return owner, name, hint

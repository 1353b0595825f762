"""A run is checked once, before any device is touched: types, ranges, names, and what makes two runs the same."""

import copy
import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from trainer.config.encoding import decode, to_json
from trainer.config.schedules import resolve_schedule
from trainer.config.settings import Optimizer, Run, Schedule
from trainer.errors import UserError, nearest
from trainer.experiment import Experiment

_SMALLEST = 2.0**-126  # of float32, in which at least all arithmetic of an update is


def resolve(run: Run) -> Run:
    """A checked copy of `run` in which every 0 that stands for another setting is replaced by it.

    Raises:
      UserError: a value has the wrong type or is out of range, or settings contradict each other.
    """
    run = copy.deepcopy(run)
    check_types(run)
    for path, owner, field, _ in list(_fields(run.optimizer, "optimizer.")):
        value = getattr(owner, field.name)
        if isinstance(value, Schedule):
            resolve_schedule(value, path, run)
    _check_optimizer(run.optimizer)
    if run.batch_size % run.microbatches:
        raise UserError(f"batch_size {run.batch_size} does not divide into {run.microbatches} microbatches")
    if run.evaluation.batch_size is None:
        run.evaluation.batch_size = run.batch_size
    best, evaluated = run.checkpoint.best_metric, run.evaluation.every_steps
    if best and (not evaluated or run.checkpoint.every_steps % evaluated):
        raise UserError(
            f"checkpoint.best_metric {best!r} needs an evaluation at every checkpoint: checkpoint.every_steps "
            f"({run.checkpoint.every_steps}) must be a multiple of evaluation.every_steps ({evaluated})"
        )
    return run


def _check_optimizer(optimizer: Optimizer) -> None:
    """Raises `UserError` for settings that contradict each other or that would do nothing."""
    for name in ("b1", "b2", "ema_decay"):
        if (getattr(optimizer, name) or 0) >= 1:
            raise UserError(f"optimizer.{name} is {getattr(optimizer, name)}; it must be below 1")
    for name in ("eps", "eps_root"):
        if 0 < getattr(optimizer, name) < _SMALLEST:
            raise UserError(f"optimizer.{name} is {getattr(optimizer, name)}, which is 0 in float32")
    names = {optimizer.name} | {group.optimizer for group in optimizer.groups.values()} - {None}
    if optimizer.eps == optimizer.eps_root == 0 and names != {"sgd"}:
        raise UserError("optimizer.eps and optimizer.eps_root are both 0: a gradient of zero would be divided by zero")
    if optimizer.rectify and optimizer.amsgrad:
        raise UserError("optimizer.rectify and optimizer.amsgrad cannot be combined")
    if not optimizer.sgd_fallback and not optimizer.rectify:
        raise UserError("optimizer.sgd_fallback is False, which says something about optimizer.rectify only")
    for name in ("rectify", "amsgrad"):
        if getattr(optimizer, name) and names != {"adabelief"}:
            other = ", ".join(sorted(names - {"adabelief"}))
            raise UserError(f"optimizer.{name} is for adabelief; there is {other}, too")
    for label, group in optimizer.groups.items():
        if group.decay_schedule is not None and group.weight_decay:
            raise UserError(f"optimizer.groups.{label} has a weight_decay and a decay_schedule; give one of them")
        if group.nu_dtype and (group.optimizer or optimizer.name) == "sgd":
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
    if not isinstance(run.experiment, Experiment) or not dataclasses.is_dataclass(run.experiment):
        raise UserError(
            f"experiment is {type(run.experiment).__name__}, which is not a dataclass with init, loss and source"
        )
    to_json(run)  # before the types: those of a class that cannot be imported may not be found
    for path, owner, field, hint in _fields(run):
        value = getattr(owner, field.name)
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            raise UserError(f"{path} is {value!r}; {_type_name(hint)} is expected") from error
        minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
        number = isinstance(value, int | float)  # else it is what the setting may be instead of a number
        if number and minimum is not None and value < minimum:
            raise UserError(f"{path} is {value}; it must be at least {minimum}")
        if number and maximum is not None and value > maximum:
            raise UserError(f"{path} is {value}; it must be at most {maximum}")
        choices = field.metadata.get("choices")
        if choices is not None and value is not None and value not in choices:
            raise UserError(f"{path} is {value!r}{nearest(value, choices)}")


def _fields(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field, Any]]:
    """(path, owner, field, declared type) of every setting below `node`, dataclasses in dicts included."""
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        path = prefix + field.name
        value = getattr(node, field.name)
        if hints[field.name] is not Experiment:  # a protocol: what it asks for is checked by itself
            yield path, node, field, hints[field.name]
        for name, child in value.items() if isinstance(value, dict) else [("", value)]:
            if dataclasses.is_dataclass(child):
                yield from _fields(child, f"{path}.{name}." if name else f"{path}.")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(hint))


def check_path(run: Run, path: str) -> None:
    """Raises `UserError` with the nearest name when `path`, such as `optimizer.b1`, is no setting of `run`."""
    node: Any = run
    walked = "config"
    for name in path.split("."):
        if dataclasses.is_dataclass(node):
            known = [field.name for field in dataclasses.fields(node)]
        elif isinstance(node, dict):
            known = list(node)
        else:
            hint = "; give it in the config file first" if node is None else ""
            raise UserError(f"{walked} is {node!r} and has no field {name!r}{hint}")
        if name not in known:
            raise UserError(f"{walked} has no field {name!r}{nearest(name, known)}")
        node = node[name] if isinstance(node, dict) else getattr(node, name)
        walked += f".{name}"
    if dataclasses.is_dataclass(node):
        known = ", ".join(f"{walked}.{field.name}" for field in dataclasses.fields(node))
        raise UserError(f"{walked} is a group of settings; set one of {known}")


def differences(kept: Run, asked: Run) -> list[str]:
    """What makes `asked` another run than `kept`: one text per differing setting that may not change on resuming."""
    found: list[str] = []

    def compare(old: Any, new: Any, path: str) -> None:
        if type(old) is not type(new) and not (_is_number(old) and _is_number(new)):
            found.append(f"{path} was {_short(old)}, is {_short(new)}")
        elif dataclasses.is_dataclass(old):
            for field in dataclasses.fields(old):
                if not field.metadata.get("may_change"):
                    compare(getattr(old, field.name), getattr(new, field.name), f"{path}.{field.name}".lstrip("."))
        elif isinstance(old, dict) and old.keys() == new.keys():
            for key in old:
                compare(old[key], new[key], f"{path}.{key}")
        elif old != new:
            found.append(f"{path} was {_short(old)}, is {_short(new)}")

    compare(kept, asked, "")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def from_json(text: str) -> Run:
    """The run that `to_json` wrote.

    Only trust a workdir as you would trust code: the experiment's class is imported by the name found there.

    Raises:
      UserError: the text is no such JSON, or a class or field it names is no longer there.
    """
    try:
        run = decode(text)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"it is not a run as `to_json` writes it: {error}") from error
    check_types(run)
    return run

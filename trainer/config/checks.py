"""A run is checked once, before any device is touched: types, ranges, names, and what makes two runs the same."""

import copy
import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from trainer.config.encoding import decode, to_json
from trainer.config.settings import Run
from trainer.errors import UserError, nearest
from trainer.experiment import Experiment


def resolve(run: Run) -> Run:
    """A checked copy of `run` in which every 0 that stands for another setting is replaced by it.

    Raises:
      UserError: a value has the wrong type or is out of range, or settings contradict each other.
    """
    run = copy.deepcopy(run)
    check_types(run)
    schedule = run.optimizer.schedule
    if schedule.name != "constant":
        schedule.decay_steps = schedule.decay_steps or run.total_steps
        if schedule.final > schedule.peak:
            raise UserError(
                f"optimizer.schedule.final is {schedule.final}; a {schedule.name} descent ends at or below its peak, "
                f"{schedule.peak}"
            )
        if schedule.warmup_steps >= schedule.decay_steps:
            raise UserError(
                f"optimizer.schedule.warmup_steps is {schedule.warmup_steps}, but the whole schedule has only "
                f"{schedule.decay_steps} steps"
            )
    for name in ("b1", "b2"):
        if getattr(run.optimizer, name) >= 1:
            raise UserError(f"optimizer.{name} is {getattr(run.optimizer, name)}; it must be below 1")
    if run.batch_size % run.microbatches:
        raise UserError(f"batch_size {run.batch_size} does not divide into {run.microbatches} microbatches")
    run.evaluation.batch_size = run.evaluation.batch_size or run.batch_size
    best, evaluated = run.checkpoint.best_metric, run.evaluation.every_steps
    if best and (not evaluated or run.checkpoint.every_steps % evaluated):
        raise UserError(
            f"checkpoint.best_metric {best!r} needs an evaluation at every checkpoint: checkpoint.every_steps "
            f"({run.checkpoint.every_steps}) must be a multiple of evaluation.every_steps ({evaluated})"
        )
    return run


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
        if minimum is not None and value < minimum:
            raise UserError(f"{path} is {value}; it must be at least {minimum}")
        if maximum is not None and value > maximum:
            raise UserError(f"{path} is {value}; it must be at most {maximum}")
        choices = field.metadata.get("choices")
        if choices is not None and value not in choices:
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
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


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
            raise UserError(f"{walked} is {node!r} and has no field {name!r}")
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

"""The typed description of a run: every setting is declared once, here, and checked once, before any device is touched.

A config file's `get_config()` returns a `Run`. Fields are overridden on the command line by their path, such as
`--config.optimizer.groups.decayed.weight_decay=0.1`. In a workdir the run is kept as JSON.
"""

import copy
import dataclasses
import importlib
import json
import math
import sys
import typing
from collections.abc import Iterator
from typing import Any

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from trainer.errors import UserError, nearest
from trainer.experiment import Experiment

_CLASS = "$class"  # the key under which JSON names a dataclass


def setting(
    default: Any = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
    may_change: bool = False,
) -> Any:
    """A dataclass field with its range.

    Args:
      default: the value when none is given.
      minimum: the smallest accepted number.
      maximum: the largest accepted number.
      choices: the accepted names.
      may_change: whether a run may be resumed with another value; every other setting is what makes it that run.
    """
    return dataclasses.field(
        default=default,
        metadata={"minimum": minimum, "maximum": maximum, "choices": choices, "may_change": may_change},
    )


@dataclasses.dataclass
class Schedule:
    """The learning rate as a function of the updates already made."""

    name: str = setting("constant", choices=("constant", "cosine", "linear"))
    """Shape after the warm-up: `constant`, or a `cosine` or `linear` descent."""
    peak: float = setting(1e-3, minimum=0)
    """Learning rate at the end of the warm-up."""
    warmup_steps: int = setting(0, minimum=0)
    """Updates over which it rises linearly from 0 to `peak`."""
    decay_steps: int = setting(0, minimum=0)
    """Updates until `final` is reached, warm-up included; 0 means the run's `total_steps`. Unused when constant."""
    final: float = setting(0.0, minimum=0)
    """Learning rate at the end of the descent."""


@dataclasses.dataclass
class Group:
    """What the parameters of one label share."""

    weight_decay: float = setting(0.0, minimum=0)
    """Decoupled decay: each update subtracts learning rate · weight_decay · parameter."""


@dataclasses.dataclass
class Optimizer:
    """The optimizer and the labels that steer it."""

    name: str = setting("adabelief", choices=("adabelief", "adam", "sgd"))
    """`adabelief` (this project's own), or Optax's `adam` or `sgd` with momentum b1, to compare with."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    b1: float = setting(0.9, minimum=0)
    """Decay of the mean of the gradients per update, below 1."""
    b2: float = setting(0.999, minimum=0)
    """Decay of the mean of the squared prediction errors per update, below 1."""
    eps: float = setting(1e-16, minimum=0)
    """Added to the root in the denominator. The paper's settings: 1e-8 for vision, 1e-16 or 1e-12 for LSTMs."""
    eps_root: float = setting(1e-16, minimum=0)
    """Added to the second moment at every update, where it accumulates (AdaBelief), or inside the root (Adam)."""
    labels: tuple[tuple[str, str], ...] = setting(((".*", "default"),))
    """Ordered (regex, label) rules over whole parameter paths; the first match decides."""
    groups: dict[str, Group] = dataclasses.field(default_factory=lambda: {"default": Group()})
    """What each label means."""


@dataclasses.dataclass
class Evaluation:
    """When and on what the run is evaluated."""

    split: str = setting("test", may_change=True)
    """The split given to the experiment's `source`."""
    every_steps: int = setting(0, minimum=0, may_change=True)
    """Updates between evaluations; 0 means at the end only. The end is always evaluated."""
    batch_size: int = setting(0, minimum=0, may_change=True)
    """Examples per evaluation batch over all devices; 0 means the run's `batch_size`."""


@dataclasses.dataclass
class Checkpoint:
    """What is kept of the run."""

    every_steps: int = setting(1000, minimum=1, may_change=True)
    """Updates between checkpoints. The end is always saved."""
    keep_last: int = setting(2, minimum=1, may_change=True)
    """How many of the newest checkpoints to keep."""
    best_metric: str = setting("", may_change=True)
    """Also keep the checkpoint with the best value of this evaluation metric, such as "test/accuracy"; "" for none."""
    best_mode: str = setting("max", choices=("max", "min"), may_change=True)
    """Whether the best value is the largest or the smallest."""


@dataclasses.dataclass
class Logging:
    """What is written while the run goes on."""

    every_steps: int = setting(50, minimum=1, may_change=True)
    """Updates between rows of metrics."""


@dataclasses.dataclass
class Loading:
    """How examples reach the host's memory."""

    split: str = setting("train")
    """The split trained on, given to the experiment's `source`."""
    in_memory_bytes: int = setting(2 << 30, minimum=0, may_change=True)
    """A split of at most this size once decoded is decoded once and served from memory; a larger one is read again
    every epoch."""
    threads: int = setting(4, minimum=1, may_change=True)
    """Threads that read and decode batches of a split that does not fit."""


@dataclasses.dataclass
class Parallel:
    """How a step spreads over the devices."""

    strategy: str = setting("data", choices=("data", "pmap"), may_change=True)
    """`data`: `jax.jit` over a mesh with the batch sharded; `pmap`: the classical replicated step."""
    devices: int = setting(0, minimum=0, may_change=True)
    """How many of this machine's devices to use; 0 means all."""
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = setting(((".*", ()),), may_change=True)
    """Ordered (regex, axes) rules over the paths of the state, such as `params/dense/kernel`: for each dimension the
    mesh axis that splits it, or None. Only for strategies over a mesh."""


@dataclasses.dataclass
class Run:
    """A whole run."""

    experiment: Experiment
    total_steps: int = setting(minimum=1, may_change=True)
    """Updates until the run is finished. A finished run goes on when it is launched again with more, unless its
    schedule was to end with it."""
    batch_size: int = setting(128, minimum=1)
    """Examples per update, over all devices and microbatches."""
    microbatches: int = setting(1, minimum=1)
    """Parts into which each batch is split to save memory; their sums are divided once. BatchNorm sees one part
    at a time, so with it the number of parts changes the result."""
    seed: int = setting(0, minimum=0, maximum=2**32 - 1)
    """Everything random follows from it: initial parameters, order of the data, dropout, augmentation."""
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    loading: Loading = dataclasses.field(default_factory=Loading)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    logging: Logging = dataclasses.field(default_factory=Logging)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)


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
    _encode(run, "")  # before the types: those of a class that cannot be imported may not be found
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


def to_json(run: Run) -> str:
    """The run as JSON: a dataclass is an object with its class under "$class"; a tuple is a list."""
    return json.dumps(_encode(run, ""), indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> Run:
    """The run that `to_json` wrote.

    Only trust a workdir as you would trust code: the experiment's class is imported by the name found there.

    Raises:
      UserError: the text is no such JSON, or a class or field it names is no longer there.
    """
    try:
        run = _decode(json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"it is not a run as `to_json` writes it: {error}") from error
    check_types(run)
    return run


def _encode(value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value):
        kind = type(value)
        if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
            raise UserError(
                f"{path.lstrip('.')} is a {kind.__name__} defined where it cannot be imported again "
                f"({kind.__module__}): move the class to the top of a module of its own, in the current folder"
            )
        fields = {f.name: _encode(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
        return {_CLASS: f"{kind.__module__}:{kind.__name__}", **fields}
    if isinstance(value, dict):
        if _CLASS in value:
            raise UserError(f"{path.lstrip('.')} has the key {_CLASS!r}, which is taken")
        return {key: _encode(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return [_encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path.lstrip('.')} is {value}; a finite number is expected")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"{path.lstrip('.')} is a {type(value).__name__}; a setting is a number, a text, None, a tuple, a dict or a "
        "dataclass"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if isinstance(value, dict) and _CLASS in value:
        fields = {key: _decode(item) for key, item in value.items() if key != _CLASS}
        module, _, name = value[_CLASS].partition(":")
        if module == "__main__":
            raise UserError(f"{name} was defined in a script or a notebook, from where it cannot be imported again")
        kind = getattr(_module(module, name), name, None)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise UserError(f"{value[_CLASS]} is not a dataclass any more")
        known = {field.name for field in dataclasses.fields(kind)}
        for key in fields.keys() - known:
            raise UserError(f"{value[_CLASS]} has no field {key!r} any more{nearest(key, known)}")
        return kind(**fields)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return value


def _module(name: str, wanted: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{wanted.lstrip('.')}: module {name!r} cannot be imported ({error}): run from the folder that holds it, "
            "or set PYTHONPATH"
        ) from error

"""A run whose experiment has nested settings, and what can be changed in it."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from tests.tasks import Task, make_run
from trainer import config


@dataclasses.dataclass
class Inner:
    rate: float | None = None
    names: tuple[str, ...] = ("a", "b")


@dataclasses.dataclass
class NestedTask(Task):
    """A task whose own settings are tuples, dicts and dataclasses."""

    widths: tuple[int, ...] = (16, 32)
    axes: tuple[tuple[str | None, ...], ...] = ((None, "data"), ())
    table: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=lambda: {"x/y": (0.5,), "z": ()})
    inner: Inner = dataclasses.field(default_factory=Inner)
    label: str = "Käse\n"
    data_dir: str | None = config.setting(None, may_change=True)


def differences(kept: str, asked: config.Run) -> list[str]:
    """The texts of the changes of the trajectory between a run as JSON and another run."""
    return [change.text for change in config.changed_settings(json.loads(kept), asked) if not change.harmless]


def setting_of(run: config.Run, path: str) -> tuple[Any, str]:
    """The owner and the name of the field at a path."""
    *owners, name = path.split(".")
    node: Any = run
    for owner in owners:
        node = node[owner] if isinstance(node, dict) else getattr(node, owner)
    return node, name


def changed(run: config.Run, path: str, value: Any) -> config.Run:
    run = copy.deepcopy(run)
    owner, name = setting_of(run, path)
    setattr(owner, name, value)
    return run


def settings(node: Any, prefix: str = "", may_change: bool = False) -> Iterator[tuple[str, bool]]:
    """(path, may change) of every setting that holds no other settings."""
    for field in dataclasses.fields(node):
        value, path = getattr(node, field.name), prefix + field.name
        free = may_change or field.metadata.get("may_change", False)
        children = value.items() if isinstance(value, dict) else [("", value)]
        groups = [(name, child) for name, child in children if dataclasses.is_dataclass(child)]
        if not groups:
            yield path, free
        for name, child in groups:
            yield from settings(child, f"{path}.{name}." if name else f"{path}.", free)


NESTED = config.resolve(make_run(experiment=NestedTask(inner=Inner(rate=0.1))))
FIXED = [path for path, free in settings(NESTED) if not free]
FREE = [path for path, free in settings(NESTED) if free]


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case tuple():
            return (*value, "x")
        case dict():
            return value | {"x": ()}
        case None:
            return "x"
    raise AssertionError(value)

"""Runs as JSON: what is written is enough to make the same run again."""

import dataclasses
import importlib
import json
import math
import sys
from typing import Any

from trainer.config.settings import Run
from trainer.errors import UserError, nearest

_CLASS = "$class"  # the key under which JSON names a dataclass


def to_json(run: Run) -> str:
    """The run as JSON: a dataclass is an object with its class under "$class"; a tuple is a list."""
    return json.dumps(_encode(run, ""), indent=2, allow_nan=False) + "\n"


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


def decode(text: str) -> Any:
    """What `to_json` was given; dataclasses are imported by their names, and nothing is checked."""
    return _decode(json.loads(text))


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

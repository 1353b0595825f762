"""Runs as JSON: enough to make the same run again, and to tell it from another run."""

import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from trainer.config.settings import Run
from trainer.errors import UserError, did_you_mean

# JSON keys that name a dataclass: its class as "module:class"; or its class name, config file and the file's hash.
_KEYS = _CLASS, _FILE, _SHA256 = "$class", "$file", "$sha256"


def to_json(run: Run) -> str:
    """The run as JSON: a dataclass is an object with its class under "$class"; a tuple is a list."""
    return json.dumps(_encode(run, ""), indent=2, allow_nan=False) + "\n"


def _encode(value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _encode(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
        return _names(type(value)) | fields
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
    kinds = "a setting is a number, a text, None, a tuple, a dict or a dataclass"
    raise UserError(f"{path.lstrip('.')} is a {type(value).__name__}; {kinds}")


def _names(kind: type) -> dict[str, str]:
    """The keys by which JSON names a class."""
    if not kind.__module__.startswith(_ConfigFileLoader.prefix):
        return {_CLASS: f"{kind.__module__}:{kind.__qualname__}"}
    loader: Any = sys.modules[kind.__module__].__loader__
    file, here = Path(loader.path), Path.cwd()
    shown = file.relative_to(here) if file.is_relative_to(here) else file
    return {_CLASS: kind.__qualname__, _FILE: str(shown), _SHA256: loader.sha256}


def from_json(text: str) -> Run:
    """The run that `to_json` was given; types and ranges are not checked.

    Only trust a workdir as you would trust code: the experiment's class is imported by the name found there. Raises
    `UserError` if the text is not the JSON of a run, or if a class or field that it names is no longer there.
    """
    try:
        run = _decode(json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"it is not a run as `to_json` writes it: {error}") from error
    if not isinstance(run, Run):
        raise UserError(f"it is not a run as `to_json` writes it, but a {type(run).__name__}")
    return run


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if isinstance(value, dict) and _CLASS in value:
        kind = _find_class(value)
        fields = {key: _decode(item) for key, item in value.items() if key not in _KEYS}
        known = {field.name for field in dataclasses.fields(kind)}
        for key in fields.keys() - known:
            raise UserError(f"{value[_CLASS]} has no field {key!r} any more{did_you_mean(key, known)}")
        return kind(**fields)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return value


def _find_class(names: Mapping[str, str]) -> Any:
    module_name, _, name = names[_CLASS].rpartition(":")
    if module_name == "__main__" or "<locals>" in name:
        remedy = "train and evaluate it there, or define it in a module or in the config file"
        where = "was defined in a script, a notebook or a function, and cannot be imported again"
        raise UserError(f"{name} {where}: {remedy}")
    if _FILE in names:
        file = Path(names[_FILE])
        if not file.is_file():
            where = "" if file.is_absolute() else f" in the current folder, {Path.cwd()}"
            raise UserError(f"{name} was defined in {file}, which is missing{where}")
        if hashlib.sha256(file.read_bytes()).hexdigest() != names[_SHA256]:
            remedy = f"give --config={file} to use the file as it is now"
            raise UserError(f"{name} was defined in {file}, which has changed since: {remedy}")
        kind: Any = import_file(file, names[_SHA256])
    else:
        kind = _import(module_name, name)
    for part in name.split("."):
        kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UserError(f"{names[_CLASS]} is not a dataclass any more")
    return kind


def _import(module: str, wanted: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{wanted}: {error}: run from the folder that holds it, or set PYTHONPATH") from error


class _ConfigFileLoader(importlib.machinery.SourceFileLoader):
    """Imports a config file by a module name that spells its path, so that another process can unpickle its classes."""

    prefix = "trainer.config.file:"  # then the absolute path with escaped dots, such as /home/me/vae%2Epy
    sha256: str  # of the source that was run

    @classmethod
    def find_spec(cls, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module whose name has our prefix, else None: the import system asks all of `sys.meta_path`."""
        if not name.startswith(cls.prefix):
            return None
        return importlib.util.spec_from_loader(name, cls(name, unquote(name.removeprefix(cls.prefix))))

    def get_code(self, fullname: str) -> Any:
        """The compiled source; no cached bytecode, which could be that of an older source."""
        source = self.get_data(self.path)
        self.sha256 = hashlib.sha256(source).hexdigest()
        return self.source_to_code(source, self.path)


sys.meta_path.append(_ConfigFileLoader)


def import_file(file: Path, sha256: str | None = None) -> ModuleType:
    """The Python file as a module; executes it again unless the source with hash `sha256` is imported already."""
    name = _ConfigFileLoader.prefix + str(file.resolve()).replace("%", "%25").replace(".", "%2E")
    if name in sys.modules and getattr(sys.modules[name].__loader__, "sha256", None) != sha256:
        del sys.modules[name]
    return _import(name, f"config file {str(file)!r}")


def differences(kept: str, asked: Run) -> list[str]:
    """One text for each setting that must not change but differs between the JSON `kept` and `asked`.

    Imports no class. Raises `UserError` if `kept` is not the JSON of a run.
    """
    try:
        old = json.loads(kept)
    except ValueError as error:
        raise UserError(f"it is not valid JSON: {error}") from error
    if not isinstance(old, dict) or old.get(_CLASS) != _names(Run)[_CLASS]:
        raise UserError("it is not the JSON of a Run")
    return list(_differences(old, asked, ""))


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if dataclasses.is_dataclass(new) and isinstance(old, dict) and old.get(_CLASS) == _names(type(new))[_CLASS]:
        gone = {name: value for name, value in old.items() if name not in _KEYS}
        for field in dataclasses.fields(new):
            was = gone.pop(field.name) if field.name in gone else _default(field)
            if not field.metadata.get("may_change"):
                yield from _differences(was, getattr(new, field.name), f"{path}.{field.name}")
        for name, was in gone.items():
            yield f"{path}.{name}".lstrip(".") + f" was {_shown(was)}, is no setting any more"
    elif isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            yield from _differences(old[key], new[key], f"{path}.{key}")
    else:
        new = _encode(new, path)
        if old != new or isinstance(old, bool) is not isinstance(new, bool):
            yield f"{path.lstrip('.')} was {_shown(old)}, is {_shown(new)}"


def _default(field: dataclasses.Field) -> Any:
    """The JSON of a field's default: the value that applied to a run whose JSON is older than the field."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return None if default is dataclasses.MISSING else _encode(default, "")


def _shown(value: Any) -> str:
    if isinstance(value, dict) and _CLASS in value:
        return value[_CLASS]
    text = repr(tuple(value) if isinstance(value, list) else value)
    return text if len(text) <= 60 else text[:57] + "..."

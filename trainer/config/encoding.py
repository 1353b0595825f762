"""Runs as JSON: enough to make the same run again, and to tell it from another run."""

import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import re
import sys
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from trainer.config import settings
from trainer.config.settings import Run
from trainer.errors import HostError, UserError, did_you_mean

# JSON keys that name a dataclass: its class as "module:class"; or its class name, config file and the file's hash.
CLASS, _FILE, _SHA256 = "$class", "$file", "$sha256"
_ACCEPTED = "$accepted"  # which `Workdir.write` adds
_SETTINGS = [kind for kind in vars(settings).values() if isinstance(kind, type)]
SETTINGS_CLASSES = [kind for kind in _SETTINGS if dataclasses.is_dataclass(kind)]


def to_json(run: Run) -> str:
    """The run as JSON: a dataclass is an object with its class under "$class"; a tuple is a list."""
    return json.dumps(encode(run, ""), indent=2, allow_nan=False) + "\n"


def encode(value: Any, path: str) -> Any:
    """A setting as `json` takes it; raises `UserError`, which names `path`, for what no setting can be."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
        return class_keys(type(value)) | fields
    if isinstance(value, dict):
        if CLASS in value:
            raise UserError(f"{path.lstrip('.')} has the key {CLASS!r}, which is taken")
        return {key: encode(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path.lstrip('.')} is {value}; a finite number is expected")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kinds = "a setting is a number, a text, None, a tuple, a dict or a dataclass"
    raise UserError(f"{path.lstrip('.')} is a {type(value).__name__}; {kinds}")


def class_keys(kind: type) -> dict[str, str]:
    """The keys by which JSON names a class."""
    if not kind.__module__.startswith(_ConfigFileLoader.prefix):
        return {CLASS: class_name(kind)}
    loader: Any = sys.modules[kind.__module__].__loader__
    file, here = Path(loader.path), Path.cwd()
    shown = file.relative_to(here) if file.is_relative_to(here) else file
    return {CLASS: kind.__qualname__, _FILE: str(shown), _SHA256: loader.sha256}


def class_name(kind: type) -> str:
    """The text that names a class in JSON."""
    if kind in SETTINGS_CLASSES:  # whatever the file in which it is declared
        return f"{settings.__name__}:{kind.__qualname__}"
    in_file = kind.__module__.startswith(_ConfigFileLoader.prefix)
    return kind.__qualname__ if in_file else f"{kind.__module__}:{kind.__qualname__}"


def from_json(text: str) -> Run:
    """The run that `to_json` was given; types and ranges are not checked.

    Settings that the experiment or an optimizer of the user's own no longer has are left out.

    Only the experiment's and the optimizers' classes are imported. Only they, their nested settings and our own
    settings classes are instantiated. Still, trust a workdir as you trust code. Raises `UserError` if the text is not
    the JSON of a run, or names another class.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or value.get(CLASS) != class_name(Run):
            raise UserError("it is not the JSON of a Run")
        own = [_find_class(value["experiment"], ("init", "loss", "source"))]
        own += [_find_class(names, ("transform",)) for names in _transforms(value)]
        inner = [kind for one in own for kind in _settings_of(one)]
        return _decode(value, {class_name(kind): kind for kind in (*SETTINGS_CLASSES, *own, *inner)})
    except (AttributeError, KeyError, NameError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"it is not a run as `to_json` writes it: {error}") from error


def _decode(value: Any, classes: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, classes) for item in value)
    if isinstance(value, dict) and CLASS in value:
        if (kind := classes.get(value[CLASS])) is None:
            raise UserError(f"it names the class {value[CLASS]!r}, which is neither a setting nor the experiment")
        known = {field.name for field in dataclasses.fields(kind)}
        for key in value.keys() - known - {CLASS, _FILE, _SHA256, _ACCEPTED} if kind in SETTINGS_CLASSES else ():
            raise UserError(f"{value[CLASS]} has no field {key!r} any more{did_you_mean(key, known)}")
        return kind(**{key: _decode(item, classes) for key, item in value.items() if key in known})
    if isinstance(value, dict):
        return {key: _decode(item, classes) for key, item in value.items()}
    return value


def _settings_of(kind: Any) -> Iterator[Any]:
    """The dataclasses that the fields of a dataclass may hold by their declared types, subclasses included."""
    waiting, seen = [*typing.get_type_hints(kind).values()], set()
    while waiting:
        hint = waiting.pop()
        waiting += typing.get_args(hint)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in seen:
            seen.add(hint)
            waiting += [*typing.get_type_hints(hint).values(), *hint.__subclasses__()]
            yield hint


def _transforms(run: Mapping[str, Any]) -> Iterator[Mapping[str, str]]:
    """The JSON of each optimizer that is a dataclass of the user's own."""
    optimizer = run.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(groups := optimizer.get("groups", {}), dict):
        return  # `check_types` says what is wrong
    given = [optimizer.get("name"), *(group.get("optimizer") for group in groups.values() if isinstance(group, dict))]
    yield from (value for value in given if isinstance(value, dict))


def _find_class(encoded: Mapping[str, str], methods: Sequence[str]) -> Any:
    """The class that JSON names; it must be a dataclass with these methods, those of an experiment for example."""
    module_name, _, name = encoded[CLASS].rpartition(":")
    if module_name == "__main__" or "<locals>" in name:
        remedy = "train and evaluate it there, or define it in a module or in the config file"
        where = "was defined in a script, a notebook or a function, and cannot be imported again"
        raise UserError(f"{name} {where}: {remedy}")
    if _FILE in encoded:
        file = Path(encoded[_FILE])
        if not file.is_file():
            where = "" if file.is_absolute() else f" in the current folder, {Path.cwd()}"
            raise UserError(f"{name} was defined in {file}, which is missing{where}")
        if hashlib.sha256(file.read_bytes()).hexdigest() != encoded[_SHA256]:
            remedy = f"give --config={file} to use the file as it is now"
            raise UserError(f"{name} was defined in {file}, which has changed since: {remedy}")
        kind: Any = import_file(file, encoded[_SHA256])
    else:
        kind = _import(module_name, name)
    for part in name.split("."):
        kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UserError(f"{encoded[CLASS]} is not a dataclass any more")
    if missing := [name for name in methods if not callable(getattr(kind, name, None))]:
        raise UserError(
            f"{encoded[CLASS]} is no {'optimizer' if len(methods) == 1 else 'experiment'}: it has no {missing[0]}"
        )
    return kind


def _import(module: str, wanted: str) -> ModuleType:
    try:
        with user_errors(wanted):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{wanted}: {error}: run from the folder that holds it, or set PYTHONPATH") from error


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turns an error of the user's own file, such as "config file 'a.py'", into a `UserError` with its line.

    Our own errors and a module that is not found stay as they are.
    """
    try:
        yield
    except (UserError, HostError, ModuleNotFoundError):
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith("<frozen")]
        file, line = own[-1].filename, own[-1].lineno
        if isinstance(error, SyntaxError) and error.filename:
            file, line = error.filename, error.lineno
        text = next(iter(str(error).splitlines()), "")
        text = _nearest_setting(text) or text
        kind = f"{type(error).__name__}: {text}".rstrip(": ")
        raise UserError(f"{what} ends with {kind} ({file}:{line}; --traceback shows the whole error)") from error


def _nearest_setting(message: str) -> str:
    """Python's error about an argument that a class of settings does not have, with the nearest one; else ""."""
    found = re.match(r"((\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)')", message)
    kinds = [kind for kind in SETTINGS_CLASSES if found and kind.__name__ == found[2]]
    return found[1] + did_you_mean(found[3], [f.name for f in dataclasses.fields(kinds[0])]) if found and kinds else ""


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

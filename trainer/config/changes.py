"""The settings that differ between a run and the run that continues it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from trainer.config.encoding import CLASS, SETTINGS_CLASSES, class_keys, class_name, encode
from trainer.config.settings import Run
from trainer.errors import UserError

_SETTINGS = class_name(Run).removesuffix(Run.__qualname__)  # before the name of our own settings' classes


class Change(NamedTuple):
    """A setting that differs between a run and the run that continues it."""

    text: str  # such as "batch_size was 128, is 64"
    harmless: bool  # whether a run goes on with it unasked: `may_change` of the setting, or a setting that is gone


def changed_settings(kept: Mapping[str, Any], asked: Run) -> list[Change]:
    """Every setting that differs between the JSON of a run and the run that is to continue it. Imports no class.

    A setting that the experiment or an optimizer of the user's own no longer has is harmless, as nothing can be asked
    of it. Raises `UserError` if `kept` is not the JSON of a run.
    """
    if not isinstance(kept, dict) or kept.get(CLASS) != class_name(Run):
        raise UserError("it is not the JSON of a Run")
    return list(_changes(kept, asked, "", harmless=False))


def _changes(old: Any, new: Any, path: str, *, harmless: bool) -> Iterator[Change]:
    if dataclasses.is_dataclass(new) and isinstance(old, dict) and old.get(CLASS) == class_keys(type(new))[CLASS]:
        remaining = {name: value for name, value in old.items() if not name.startswith("$")}
        for field in dataclasses.fields(new):
            was = remaining.pop(field.name) if field.name in remaining else _default(field)
            may = harmless or bool(field.metadata.get("may_change"))
            yield from _changes(was, getattr(new, field.name), f"{path}.{field.name}", harmless=may)
        for name, was in remaining.items():  # of an experiment: nothing can be asked of it any more
            text = f"{path}.{name}".lstrip(".") + f" was {_shown(was)}, is no setting any more"
            yield Change(text, harmless or type(new) not in SETTINGS_CLASSES)
    elif isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            yield from _changes(old[key], new[key], f"{path}.{key}", harmless=harmless)
    else:
        new = encode(new, path)
        if old != new or isinstance(old, bool) is not isinstance(new, bool):
            yield Change(f"{path.lstrip('.')} was {_shown(old)}, is {_shown(new)}", harmless)


def _default(field: dataclasses.Field) -> Any:
    """The JSON of a field's default: the value that applied to a run whose JSON is older than the field."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return None if default is dataclasses.MISSING else encode(default, "")


def _shown(value: Any) -> str:
    if isinstance(value, dict) and CLASS in value:
        if not value[CLASS].startswith(_SETTINGS):
            return value[CLASS]
        settings = (f"{name}={_shown(one)}" for name, one in value.items() if not name.startswith("$"))
        text = f"{value[CLASS].removeprefix(_SETTINGS)}({', '.join(settings)})"
    else:
        text = repr(tuple(value) if isinstance(value, list) else value)
    return text if len(text) <= 60 else text[:57] + "..."

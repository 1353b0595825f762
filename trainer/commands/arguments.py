"""From a command line to a run: the config file, its overrides, and the workdir."""

import argparse
import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.errors import UserError, did_you_mean

if TYPE_CHECKING:  # these import JAX, which takes a second that `--help` and mistyped flags need not wait for
    from trainer.config import Run
    from trainer.workdir import Workdir

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line: the resolved run with its overrides, the workdir if one is given, the command's flags."""

    run: "Run"
    workdir: "Workdir | None"
    options: argparse.Namespace

    def required_workdir(self) -> "Workdir":
        """The workdir; raises `UserError` when none is given."""
        if self.workdir is None:
            raise UserError("give --workdir=DIR, the folder that the run is kept in")
        return self.workdir


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see python -m trainer {self.prog.split()[-1]} --help)")


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all commands share; a command adds its own."""
    usage = "%(prog)s --config=FILE[:arg] --workdir=DIR [--config.any.field=value ...] [options]"
    parser = _Parser(f"python -m trainer {command}", usage, description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE[:arg]", help="config file; get_config receives what follows a colon")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run")
    cache = "where compiled programs are kept for the next launch (default: ~/.cache/belief-trainer); off for nowhere"
    parser.add_argument("--compilation-cache", metavar="DIR", help=cache)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def child_flags(options: argparse.Namespace) -> list[str]:
    """The flags of `make_parser` that a command hands on to its child processes, besides the config and the workdir."""
    flags = [] if options.compilation_cache is None else [f"--compilation-cache={options.compilation_cache}"]
    return [*flags, "--traceback"] if options.traceback else flags


def add_group_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a command that several processes run together."""
    about = "On Cloud TPU, GKE, Slurm and Open MPI they find each other without the first three."
    group = parser.add_argument_group("several processes", about)
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, where it will listen")
    group.add_argument("--process", metavar="I", type=int, help="which process this is, from 0")
    group.add_argument("--processes", metavar="N", type=int, help="how many processes there are")
    seconds: dict[str, Any] = {"metavar": "SECONDS", "type": int}
    group.add_argument("--wait", default=300, help="how long to wait for the others (default 300)", **seconds)
    silence_help = "if a process is stopped or its host is away, the others end after this time (default 100)"
    group.add_argument("--heartbeat", default=100, help=silence_help, **seconds)


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own flags, and the overrides of the config as they were given; `UserError` for an unknown flag."""
    own, overrides = list[str](), list[str]()
    for previous, argument in zip(["", *argv], argv, strict=False):
        if _OVERRIDE.match(argument):
            overrides.append(argument)
        elif _OVERRIDE.match(previous) and "=" not in previous and not argument.startswith("-"):
            overrides[-1] += f"={argument}"  # a value that is a separate argument
        else:
            own.append(argument)
    options, unknown = parser.parse_known_args(own)
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if value == "" and (flag in own or f"{flag}=" in own):
            raise UserError(f"{flag} has no value")
    if unknown:
        flag, known = unknown[0].split("=")[0], re.findall("--[a-z_-]+", parser.format_help())
        if flag.startswith("config."):
            known = [f"--{flag}"]
        raise UserError(f"unknown flag {flag}{did_you_mean(flag, set(known))}")
    return options, overrides


def resolve_arguments(options: argparse.Namespace, overrides: Sequence[str]) -> Arguments:
    """Resolves the run that a command line asks for: that of the config file, or else the one kept in the workdir.

    Raises `UserError` for an unknown field, a value of the wrong type, or neither a config file nor a run.
    """
    from trainer import config
    from trainer.workdir import Workdir

    workdir = Workdir(options.workdir) if options.workdir else None
    if options.config:
        run = load_config(options.config)
    elif workdir is None:
        raise UserError("give --config=FILE, or the --workdir of a run")
    elif (run := _kept_run(workdir)) is None:
        if not workdir.path.exists():
            raise UserError(f"there is no workdir {workdir.path}; a new one needs --config=FILE")
        raise UserError(f"workdir {workdir.path} holds no run; give --config=FILE")
    config.check_types(run)
    if source := getattr(options, "init_from", None):
        run.init_from = dataclasses.replace(run.init_from or config.InitFrom(source), source=source)
    return Arguments(config.resolve(override(run, overrides)), workdir, options)


def _kept_run(workdir: "Workdir") -> "Run | None":
    from trainer.resume import recover_run  # imports Flax and Orbax, for which a mistyped --config need not wait

    return recover_run(workdir)


def override(run: "Run", overrides: Sequence[str]) -> "Run":
    """Gives the run the settings of flags such as `--config.seed=1`, in their order, and returns it.

    Raises `UserError` for an unknown field, with the nearest, and a value of the wrong type.
    """
    from trainer import config

    given: dict[str, list[str | None]] = {}
    for match in filter(None, map(_OVERRIDE.match, overrides)):
        given.setdefault(match[2], []).append("false" if match[1] else match[3])
    for path, texts in given.items():
        owner, name, hint = config.setting_at(run, path)
        get, put = (dict.get, dict.__setitem__) if isinstance(owner, dict) else (getattr, object.__setattr__)
        put(owner, name, _parse(f"config.{path}", hint, get(owner, name), texts))
    return run


def _parse(path: str, hint: Any, current: Any, texts: Sequence[str | None]) -> Any:
    """The value of type `hint` that config_flags makes of the texts given for one setting."""
    from absl import flags
    from ml_collections import config_flags

    from trainer import config

    if config.Transform in typing.get_args(hint):  # a flag can only name a transform, as text
        hint = str | None if type(None) in typing.get_args(hint) else str
    if type(None) in typing.get_args(hint) and texts[-1] in ("None", "none"):
        return None
    if dataclasses.is_dataclass(current):
        known = ", ".join(f"{path}.{field.name}" for field in dataclasses.fields(current))
        raise UserError(f"{path} is a group of settings; set one of {known}")
    if hint is Any and texts[-1] is not None:  # an option of Optax: a number, a tuple, or else a text
        try:
            return ast.literal_eval({"true": "True", "false": "False"}.get(texts[-1], texts[-1]))
        except (SyntaxError, ValueError):
            return texts[-1]
    expected = config.type_name(hint)
    if int in (hint, *typing.get_args(hint)):
        texts = [_whole(text) for text in texts]
    if None in texts and hint is not bool:
        raise UserError(f"{path} has no value: {expected} is expected")
    holder = dataclasses.make_dataclass("Holder", [("value", hint)])(current)
    argv = ["", *(f"--config.value={'true' if text is None else text}" for text in texts)]
    values = flags.FlagValues()
    try:
        parsed = config_flags.DEFINE_config_dataclass("config", holder, flag_values=values, sys_argv=argv)
        values(argv)
    except flags.IllegalFlagValueError as error:
        raise UserError(f"{path} is {texts[-1]!r}; {expected} is expected") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"{path} is {expected}, which no flag can set: set it in the config file") from error
    return parsed.value.value


def _whole(text: str | None) -> str | None:
    """The digits of a whole number in scientific notation, such as 1e6 or 2.5e3; any other text as it is."""
    is_scientific = text is not None and re.fullmatch(r"\d+(\.\d+)?[eE]\d{1,2}", text)
    return f"{float(text):.0f}" if is_scientific and float(text).is_integer() else text


def load_config(text: str) -> Any:
    """For FILE:ARG, imports FILE and returns `get_config(ARG)`; for FILE, `get_config()`.

    Raises `UserError` if there is no such file, if it has no `get_config`, or for an error inside the file.
    """
    return _call(_import(text), text, "get_config")


def load_config_and_sweep(text: str) -> tuple[Any, Any]:
    """As `load_config`, and likewise the result of `get_sweep`; None if the file has no such function."""
    module = _import(text)
    sweep = _call(module, text, "get_sweep") if callable(getattr(module, "get_sweep", None)) else None
    return _call(module, text, "get_config"), sweep


def _import(text: str) -> ModuleType:
    """The module of a config file, without the argument after a colon."""
    from trainer import config

    name = text.partition(":")[0]
    path = Path(name)
    try:
        is_file = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"no config file {name!r}: {error.strerror}") from error
    if not is_file:
        folder = path if path.is_dir() else path.parent
        siblings = [str(p) for p in folder.glob("*.py")] if folder.is_dir() else []
        raise UserError(f"no config file {name!r}{did_you_mean(name, siblings)}")
    if path.suffix != ".py":
        raise UserError(f"config file {name!r} is not a Python file")
    module = config.import_file(path)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"config file {name!r} has no function get_config")
    return module


def _call(module: ModuleType, text: str, function: str) -> Any:
    """The result of a function of a config file, which receives what follows a colon in `text`."""
    from trainer import config

    name, colon, argument = text.partition(":")
    arguments, call = [argument] if colon else [], getattr(module, function)
    try:
        inspect.signature(call).bind(*arguments)
    except TypeError as error:
        takes = "no argument" if colon else "an argument, as in --config=FILE:argument"
        raise UserError(f"{function} in {name!r} takes {takes}") from error
    with config.user_errors(f"{function} in {name!r}"):
        return call(*arguments)

"""From a command line to a run: the config file, its overrides, and the workdir."""

import argparse
import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.errors import UserError, nearest

if TYPE_CHECKING:  # these import JAX, which takes a second that `--help` and mistyped flags need not wait for
    from trainer.config import Run
    from trainer.workdir import Workdir

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line.

    Attributes:
      run: the resolved run, overrides applied.
      workdir: the folder given, or None.
      options: the command's own options.
    """

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
    """A parser with what all commands share; a command adds its own options."""
    parser = _Parser(
        prog=f"python -m trainer {command}",
        description=description,
        usage="%(prog)s --config=FILE[:arg] --workdir=DIR [--config.any.field=value ...] [options]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE[:arg]", help="config file; get_config receives what follows a colon")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def add_group_options(parser: argparse.ArgumentParser) -> None:
    """What a command takes that several processes carry out together."""
    group = parser.add_argument_group(
        "several processes", "On Cloud TPU, GKE, Slurm and Open MPI they find each other without the first three."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, where it will listen")
    group.add_argument("--process", metavar="I", type=int, help="which process this is, from 0")
    group.add_argument("--processes", metavar="N", type=int, help="how many processes there are")
    group.add_argument(
        "--wait", metavar="SECONDS", type=int, default=300, help="how long to wait for the others (default 300)"
    )
    group.add_argument(
        "--heartbeat",
        metavar="SECONDS",
        type=int,
        default=100,
        help="how long after one was killed the others end (default 100)",
    )


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own flags, and the overrides of the config as they were given.

    Raises:
      UserError: an unknown flag.
    """
    own, overrides = _split(argv)
    options, unknown = parser.parse_known_args(own)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"unknown flag {flag}{nearest(flag, set(re.findall('--[a-z_]+', parser.format_help())))}")
    return options, overrides


def find_run(options: argparse.Namespace, overrides: Sequence[str]) -> Arguments:
    """The run that a command line asks for: from its config file, or else the one kept in the workdir.

    Raises:
      UserError: an unknown field, a value of the wrong type, no config file and no run.
    """
    from trainer import config
    from trainer.workdir import Workdir

    workdir = Workdir(options.workdir) if options.workdir else None
    if options.config:
        run = load_config(options.config)
    elif workdir is None:
        raise UserError("give --config=FILE, or the --workdir of a run")
    else:
        run = workdir.run()
        if run is None:
            raise UserError(f"workdir {workdir.path} holds no run; give --config=FILE")
    return Arguments(config.resolve(_override(run, overrides)), workdir, options)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own flags, and the overrides, which may have their value in an argument of its own."""
    own: list[str] = []
    overrides: list[str] = []
    target = own
    for argument in argv:
        if _OVERRIDE.match(argument):
            overrides.append(argument)
            target = overrides if "=" not in argument else own
        elif target is overrides and not argument.startswith("-"):
            overrides.append(argument)
            target = own
        else:
            own.append(argument)
            target = own
    return own, overrides


def _override(run: "Run", overrides: Sequence[str]) -> "Run":
    from absl import flags
    from ml_collections import config_flags

    from trainer import config

    config.check_types(run)
    for argument in overrides:
        if match := _OVERRIDE.match(argument):
            config.check_path(run, match[1])
    values = flags.FlagValues()
    argv = ["trainer", *overrides]
    try:
        config_flags.DEFINE_config_dataclass("config", run, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    return values["config"].value  # pyrefly: ignore[bad-return] - never None: its default is `run`


def load_config(text: str) -> Any:
    """What `get_config` returns in the file named before the colon, given what follows it.

    Raises:
      UserError: there is no such file, or it has no `get_config`. Errors inside of it are raised as they are.
    """
    name, colon, argument = text.partition(":")
    path = Path(name)
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"no config file {name!r}{nearest(name, siblings)}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {name!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"config file {name!r}: {error}: run from the folder that holds it, or set PYTHONPATH"
        ) from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {name!r} has no function get_config")
    arguments = [argument] if colon else []
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        takes = "no argument" if colon else "an argument, as in --config=FILE:argument"
        raise UserError(f"get_config in {name!r} takes {takes}") from error
    return module.get_config(*arguments)

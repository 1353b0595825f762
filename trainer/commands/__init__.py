"""The commands, one file each. Only they read flags.

A module has `DESCRIPTION` and `add_options(parser)`. It also has `main(arguments)`, which gets the resolved run. A
command that resolves the run itself, or leaves this to its child processes, has `start(options, overrides)` instead. A
module imports JAX only while one of these two functions runs.
"""

import argparse
import importlib
import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from trainer.commands.arguments import make_parser, parse_flags, resolve_arguments
from trainer.errors import HostError, NotPreparedError, UserError, did_you_mean
from trainer.garbage import pause_gc, resume_gc

_USAGE = "usage: python -m trainer COMMAND --config=FILE[:arg] --workdir=DIR [--config.any.field=value ...]"
_KEPT_AT_EACH_END = 2000  # characters of a long error message
_COMMANDS = {
    "train": "train a run, or continue it from its last checkpoint",
    "evaluate": "evaluate a checkpoint of a run on every example of a split",
    "predict": "write the predictions of a checkpoint for every example of a split",
    "generate": "print the text that a checkpoint writes after a prompt",
    "export": "write the parameters or the predictions of a checkpoint for other programs",
    "inspect": "show the settings, the parameter table and the checkpoints of a run",
    "prepare": "write the data of a run to disk",
    "sweep": "train a run with each combination of some settings, and compare the results",
    "rehearse": "train in several processes on this machine, as hosts of a pod would",
    "prove-resume": "kill and relaunch a run at random moments, and compare it with an undisturbed one",
    "replay": "repeat a diverged step, and name where its numbers stop being finite",
    "plan": "compile a run for TPUs that you do not have: memory, communication, what fits",
}


def run(argv: list[str]) -> int:
    """Runs a command line and returns its exit code: 2 for a mistake of the user, 3 for a fault of the machine."""
    try:
        code = _run(argv)
        sys.stdout.flush()  # here, so that the handlers below catch a closed pipe or a full disk
        return code
    except BrokenPipeError:  # `… | head` closed our output, so nobody reads an error
        return 141
    except HostError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    finally:
        resume_gc()


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:12}  {text}" for name, text in _COMMANDS.items())
        print(f"{_USAGE}\n\n{commands}\n\npython -m trainer COMMAND --help explains the flags of a command.")
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    options, overrides = argparse.Namespace(config=None, workdir=None), list[str]()
    try:
        if command not in _COMMANDS:
            raise UserError(f"no command {command!r}{did_you_mean(command, _COMMANDS)}")
        module = importlib.import_module(f"trainer.commands.{command.replace('-', '_')}")
        parser = make_parser(command, module.DESCRIPTION)
        module.add_options(parser)
        if {"-h", "--help"} & set(rest):
            parser.print_help()
            return 0
        # Configs import from the current folder, which `python -m` puts on the path, but the console script does not.
        if str(Path.cwd()) not in sys.path and "" not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs an error that it raises, from every thread
        options, overrides = parse_flags(parser, rest)
        if not hasattr(module, "main"):
            return module.start(options, overrides)
        pause_gc()  # while JAX and all that is built on it is imported
        with _connected_processes(options) as collective_errors:
            with collective_errors("the command line"):
                arguments = resolve_arguments(options, overrides)
                _use_cache(options.compilation_cache)
            if command != "train":  # that one resumes it itself, after the first step
                resume_gc()
            return module.main(arguments)
    except (UserError, HostError) as error:
        if "--traceback" in rest:
            traceback.print_exc()
        hint = _prepare_hint(options, overrides) if isinstance(error, NotPreparedError) else ""
        print(f"error: {_shortened(str(error))}{hint}", file=sys.stderr)
        return 3 if isinstance(error, HostError) else 2
    except KeyboardInterrupt as error:
        go_on = "; the same command goes on from the last checkpoint" if command == "train" else ""
        print(f"\n{error}" if str(error) else f"\ninterrupted{go_on}", file=sys.stderr)
        return 128 + getattr(error, "signum", 2)


def _shortened(text: str) -> str:
    """The text in one line, without its middle if it is too long to read, as with a value of 100,000 characters."""
    text = " ".join(text.splitlines())
    if len(text) <= 2 * _KEPT_AT_EACH_END:
        return text
    return f"{text[:_KEPT_AT_EACH_END]} … {text[-_KEPT_AT_EACH_END:]}"


@contextmanager
def _connected_processes(options: argparse.Namespace) -> Iterator[Callable[[str], AbstractContextManager]]:
    """Connects the processes and yields `collective_errors`.

    A command that has no flag `--coordinator` runs in one process: nothing is connected, and `nullcontext` is yielded.
    """
    if "coordinator" not in options:
        yield nullcontext
        return
    for name, least in (("wait", 1), ("heartbeat", 2), ("processes", 1)):
        if (number := getattr(options, name)) is not None and number < least:
            raise UserError(f"--{name} is {number}; it must be at least {least}")
    from trainer import distributed
    from trainer.distributed import startup

    seconds = {"wait_seconds": options.wait, "heartbeat_seconds": options.heartbeat}
    place = options.coordinator, options.process, options.processes
    startup.initialize(*place, **seconds)
    try:
        with distributed.fail_fast():
            yield distributed.collective_errors
    except distributed.CollectiveUserError as error:
        if error.__cause__ is None:  # the process that found the mistake shows it
            sys.exit(2)
        raise error.__cause__ from None
    except KeyboardInterrupt as error:
        if distributed.is_primary():
            raise
        sys.exit(128 + getattr(error, "signum", 2))


def _use_cache(folder: str | None) -> None:
    from trainer.compilation import use_cache  # imports JAX

    use_cache(folder)


def _prepare_hint(options: argparse.Namespace, overrides: list[str]) -> str:
    name = "config" if options.config else "workdir"  # a workdir has the config
    flags = [f"--{name}={place}"] if (place := getattr(options, name)) else []
    return f"; prepare it with: python -m trainer prepare {shlex.join([*flags, *overrides])}"

"""`rehearse`: a run in several processes on this machine, each with CPU devices of its own."""

import argparse
import sys
import tempfile
from collections.abc import Sequence

from trainer.commands.arguments import child_flags
from trainer.commands.train import parse_profile
from trainer.errors import UserError

DESCRIPTION = (
    "Runs a command in several JAX processes on this machine, connected as the hosts of a pod are, and shows what they "
    "print, each line after the number of its process. When one fails, all are ended."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The number of processes and devices, the command, and the command's own flags."""
    parser.add_argument("--processes", metavar="N", type=int, default=2, help="how many processes (default 2)")
    parser.add_argument("--devices", metavar="N", type=int, default=1, help="CPU devices of each (default 1)")
    parser.add_argument("--command", default="train", choices=("train", "evaluate"), help="what to run (default train)")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="as for train")
    parser.add_argument("--step", help="as for evaluate")


def start(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs the command and returns the exit code of the process at fault, 0 if none failed.

    That is a process that a signal killed, or else the first one that failed by itself.
    """
    for name in ("processes", "devices"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.config is None and options.workdir is None:
        raise UserError("give --config=FILE, or --workdir=DIR with a run in it")
    if options.command == "evaluate" and options.workdir is None:
        raise UserError("give --workdir=DIR, whose run is to be evaluated")
    for name, command in (("profile", "train"), ("step", "evaluate")):
        if getattr(options, name) is not None and options.command != command:
            raise UserError(f"--{name} is for --command={command}")
    if options.profile is not None:
        parse_profile(options.profile)
    from trainer.distributed.launch import ProcessGroup

    if options.workdir is None:
        options.workdir = tempfile.mkdtemp(prefix="rehearsal-")
        print(f"no --workdir: the run is in {options.workdir}", flush=True)
    flags = {name: getattr(options, name) for name in ("config", "workdir", "profile", "step")}
    command = [sys.executable, "-m", "trainer", options.command]
    command += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    command += [*child_flags(options), *overrides]
    with ProcessGroup(command, options.processes, options.devices) as group:
        return group.wait()

"""`train`: a run from its config, or from where its workdir left off."""

import argparse
import sys

from trainer.commands.arguments import Arguments, add_group_options
from trainer.errors import DivergedError, UserError

DESCRIPTION = "Trains a run. The same command on the same workdir goes on from its last checkpoint."


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--profile`, and what several processes need."""
    parser.add_argument(
        "--profile", metavar="FIRST:LAST", help="also write a profile of these steps to WORKDIR/profile/, per process"
    )
    add_group_options(parser)
    parser.set_defaults(preemptible=True)


def main(arguments: Arguments) -> int:
    """Trains and lets the experiment report; exit code 1 when the loss is no longer finite."""
    from trainer.distributed import is_primary
    from trainer.experiment import Reports
    from trainer.loop import train
    from trainer.observe.log import read_rows
    from trainer.workdir import Mirror

    path = arguments.required_workdir().path
    profile = _steps(arguments.options.profile) if arguments.options.profile else None
    try:
        train(arguments.run, path, profile=profile)
    except DivergedError as error:
        if is_primary():
            print(f"error: {error}", file=sys.stderr)
        return 1
    if not is_primary():
        return 0
    experiment = arguments.run.experiment
    if isinstance(experiment, Reports):
        mirror = Mirror(path)
        written = experiment.report(mirror.folder, list(read_rows(path / "metrics.jsonl")))
        mirror.close()
        for file in written:
            print(f"wrote {path / file.relative_to(mirror.folder).as_posix()}")
    print(f"done: {path} has checkpoints/, metrics.jsonl, tensorboard/, config.json and labels.txt")
    return 0


def _steps(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile is {text!r}; FIRST:LAST is expected, two steps from 1 on, such as 10:12")
    return int(first), int(last)

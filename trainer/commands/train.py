"""`train`: a run from its config, or from where its workdir left off."""

import argparse
import sys

from trainer.commands.arguments import Arguments

DESCRIPTION = "Trains a run. The same command on the same workdir goes on from its last checkpoint."


def add_options(parser: argparse.ArgumentParser) -> None:
    """None of its own."""
    del parser


def main(arguments: Arguments) -> int:
    """Trains and lets the experiment report; exit code 1 when the loss is no longer finite."""
    from trainer.experiment import Reports
    from trainer.loop import DivergedError, train
    from trainer.observe.metrics import read_rows

    path = arguments.required_workdir().path
    try:
        train(arguments.run, path)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    experiment = arguments.run.experiment
    if isinstance(experiment, Reports):
        for file in experiment.report(path, list(read_rows(path / "metrics.jsonl"))):
            print(f"wrote {file}")
    print(f"done: {path} has checkpoints/, metrics.jsonl, tensorboard/, config.json and labels.txt")
    return 0

"""`prepare`: writes the data of a run to disk, once."""

import argparse

from trainer.commands.arguments import Arguments

DESCRIPTION = "Writes the data of a run to disk. A second call is quick and changes nothing."


def add_options(_: argparse.ArgumentParser) -> None:
    """Adds nothing: the command has no options of its own."""


def main(arguments: Arguments) -> int:
    """Calls the experiment's `prepare`."""
    from trainer.optional import Prepares, offered

    experiment = arguments.run.experiment
    if (prepares := offered(experiment, Prepares)) is None:
        print(f"{type(experiment).__name__} has no data to prepare")
        return 0
    prepares.prepare()
    print("the data is prepared")
    return 0

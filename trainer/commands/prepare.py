"""`prepare`: the data of a run, written to disk once."""

from trainer.commands.arguments import make_parser, parse
from trainer.experiment import Prepares


def main(argv: list[str]) -> int:
    """Calls the experiment's `prepare`."""
    parser = make_parser("prepare", "Writes the data that a run reads. A second time is quick and changes nothing.")
    experiment = parse(parser, argv).run.experiment
    if not isinstance(experiment, Prepares):
        print(f"{type(experiment).__name__} has no data to prepare")
        return 0
    experiment.prepare()
    print("the data is prepared")
    return 0

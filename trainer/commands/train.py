"""`train`: a run from its config, or from where its workdir left off."""

import sys

from trainer.commands.arguments import make_parser, parse
from trainer.errors import UserError


def main(argv: list[str]) -> int:
    """Trains; exit code 1 when the loss is no longer finite."""
    parser = make_parser(
        "train", "Trains a run. The same command on the same workdir goes on from its last checkpoint."
    )
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    arguments = parse(parser, argv)
    if arguments.workdir is None:
        raise UserError("give --workdir=DIR, the folder that the run is kept in")

    from trainer.loop import DivergedError, train

    path = arguments.workdir.path
    try:
        train(arguments.run, path)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"done: {path} has checkpoints/, metrics.jsonl, tensorboard/, config.json and labels.txt")
    return 0

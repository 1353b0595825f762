"""`replay`: a diverged step, repeated on the CPU, to name where its numbers stop being finite."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError

DESCRIPTION = (
    "Repeats a diverged step on the CPU, in float32, with checks: python -m trainer replay WORKDIR/diverged/STEP. It "
    "names the first module and parameter that are not finite. Exit code 1 if there is any."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.usage = "%(prog)s DIR [--config=FILE[:arg]] [--config.any.field=value ...]"
    parser.add_argument("folder", metavar="DIR", help="the folder of the step, such as WORKDIR/diverged/STEP")


def start(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prints a table; the exit code is 1 if something is not finite in float32."""
    from trainer.commands.arguments import resolve_arguments
    from trainer.compilation import use_cache
    from trainer.replay import replay

    if options.workdir is not None:
        raise UserError("replay takes no --workdir: give the folder of the step, WORKDIR/diverged/STEP")
    if overrides and not options.config:
        raise UserError("replay takes settings of the command line only with --config")
    run = resolve_arguments(options, overrides).run if options.config else None
    use_cache(options.compilation_cache)
    result = replay(Path(options.folder), run)
    print(result.text, end="")
    return 0 if result.is_finite else 1

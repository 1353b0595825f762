"""`generate`: a text that a trained model writes after a prompt."""

import argparse

from trainer.commands.arguments import Arguments
from trainer.errors import UserError

DESCRIPTION = "Prints a prompt and the text that a checkpoint writes after it; --workdir alone is enough."


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--prompt`, `--length`, `--temperature`, `--top-k`, `--seed` and `--step`."""
    parser.add_argument("--prompt", metavar="TEXT", help="the text to go on from")
    parser.add_argument("--length", metavar="N", type=int, default=256, help="how many tokens to draw (default 256)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.8, help="0 for the likeliest token each time (default 0.8)"
    )
    top_k = "draw from the K likeliest tokens only (default: from all)"
    parser.add_argument("--top-k", metavar="K", type=int, help=top_k)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="another seed gives another text (default 0)")
    parser.add_argument("--step", default="latest", help="which checkpoint: a step, best, or latest (the default)")


def main(arguments: Arguments) -> int:
    """Prints the text, and nothing else."""
    options, workdir = arguments.options, arguments.required_workdir()
    if options.prompt is None:
        raise UserError("give --prompt=TEXT, the text to go on from")
    for name, least in (("length", 1), ("temperature", 0), ("top_k", 1), ("seed", 0)):
        number = getattr(options, name)
        if number is not None and not least <= number < 2**32:
            raise UserError(f"--{name.replace('_', '-')} is {number}; it must be at least {least} and below 2^32")

    import jax

    from trainer.optional import Generates, offered
    from trainer.restore import load

    experiment = arguments.run.experiment
    if (generates := offered(experiment, Generates)) is None:
        raise UserError(f"{type(experiment).__name__} has no method generate(variables, prompt, length, ...)")
    workdir.check_run(arguments.run)
    trained = load(workdir.path, options.step, run=arguments.run)
    print(
        generates.generate(
            trained.variables,
            options.prompt,
            options.length,
            key=jax.random.key(options.seed),
            temperature=options.temperature,
            top_k=options.top_k,
        )
    )
    return 0

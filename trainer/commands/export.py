"""`export`: a trained model in a file that other programs read."""

import argparse

from trainer.commands.arguments import Arguments
from trainer.commands.predict import checked_output, replacing

DESCRIPTION = "Writes the parameters of a checkpoint as safetensors, or its predictions as a StableHLO program."


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--format`, `--output` and `--step`."""
    formats = "safetensors: every variable under its Linen path; stablehlo: the method predict as jax.export writes it"
    parser.add_argument("--format", choices=("safetensors", "stablehlo"), required=True, help=formats)
    parser.add_argument("--output", metavar="FILE", help="the file to write; it ends in .safetensors or .stablehlo")
    parser.add_argument("--step", default="latest", help="which checkpoint: a step, best, or latest (the default)")


def main(arguments: Arguments) -> int:
    """Writes the file and prints its content. An older file stays until the new one is complete."""
    from trainer.export import write_safetensors, write_stablehlo
    from trainer.restore import load

    options, workdir = arguments.options, arguments.required_workdir()
    output = checked_output(options.output, (f".{options.format}",))
    workdir.check_run(arguments.run)
    trained = load(workdir.path, options.step, run=arguments.run)
    with replacing(output) as temporary:
        write = write_safetensors if options.format == "safetensors" else write_stablehlo
        text = write(trained, temporary)
    print(f"wrote {output}, step {trained.step} of {workdir.path}: {text}")
    return 0

"""`plan`: memory and communication of a run on TPUs that you do not have."""

import argparse
from typing import Any

from trainer.commands.arguments import Arguments

DESCRIPTION = (
    "Compiles the train step and the evaluation step for TPU topologies, without any TPU, and shows memory, "
    "communication, and what does not fit. Needs libtpu (pip install 'belief-trainer[tpu]'). Writes nothing."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the topologies, the strategies, the batch and the effort."""
    slices = "types of slice to plan for, such as v5e:4x4,v4:2x2x4; parallel.num_slices says how many of each"
    parser.add_argument("--topology", metavar="NAME[,NAME...]", help=slices)
    parser.add_argument("--strategies", metavar="all|NAME[,NAME...]", help="instead of the config's own")
    examples = "examples on each chip instead of the config's batch_size"
    parser.add_argument("--batch_per_chip", type=int, metavar="N", help=examples)
    parser.add_argument("--fast", action="store_true", help="compile with little effort: six times faster")
    parser.add_argument("--search", action="store_true", help="find the largest batch that fits, and the flags to use")


def main(arguments: Arguments) -> int:
    """Prints tables, and progress to stderr. Returns 1 if there is a topology on which nothing fits."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # do not touch the devices of this machine
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot load programs for absent devices
    from trainer.plan.command import print_plans

    return print_plans(arguments.run, arguments.options)


def print_local_plan(program: Any) -> None:
    """Compiles both steps of a program for the devices of this process, and prints the table."""
    from trainer.plan import planning, report

    print(report.here_text(planning.plan_here(program)))

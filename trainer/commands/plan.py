"""`plan`: what a run takes on TPUs that are not there."""

import argparse
import sys
from collections.abc import Sequence

from trainer.commands.arguments import Arguments
from trainer.errors import UserError, nearest

DESCRIPTION = (
    "Compiles the train step and the evaluation step for TPU topologies, without any TPU: memory, communication, "
    "what does not fit. Needs libtpu (pip install 'belief-trainer[tpu]'). Writes nothing."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where, which strategies, how thoroughly."""
    parser.add_argument(
        "--topology",
        metavar="NAME[,NAME...]",
        help="slices to plan for, such as v5e:4x4,v4:2x2x4,v5p:2x2x2,v6e:4x4; parallel.num_slices of each",
    )
    parser.add_argument("--strategies", metavar="all|NAME[,NAME...]", help="instead of the config's own")
    parser.add_argument(
        "--batch_per_chip", type=int, metavar="N", help="examples on each chip instead of the config's batch_size"
    )
    parser.add_argument("--fast", action="store_true", help="compile with little effort: six times faster")
    parser.add_argument(
        "--search", action="store_true", help="find the largest batch that fits, and print the flags to use"
    )


def main(arguments: Arguments) -> int:
    """Prints a table for each topology, and what goes on to stderr; exit code 1 if nothing fits one of them."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # devices that are there are left alone
    jax.config.update("jax_enable_compilation_cache", False)  # programs for others go in, but do not come out
    from trainer.plan import planning, report
    from trainer.plan.search import search
    from trainer.plan.topology import find

    options, run = arguments.options, arguments.run
    if not options.topology:
        raise UserError("give --topology=NAME, such as --topology=v5e:4x4,v4:2x2x4")
    if options.batch_per_chip is not None and options.batch_per_chip < 1:
        raise UserError(f"--batch_per_chip is {options.batch_per_chip}; it must be at least 1")
    if options.batch_per_chip is not None and options.search:
        raise UserError("--search finds the batch by itself: give it or --batch_per_chip")
    strategies = _strategies(options.strategies, run.parallel.strategy, planning.strategies())
    topologies = [find(name, run.parallel.num_slices or 1) for name in options.topology.split(",")]
    all_fit = True
    for topology in topologies:
        there = run
        if options.batch_per_chip:
            there = planning.with_batch(run, options.batch_per_chip * topology.chips, run.microbatches)
        found: list = []
        errors: list[tuple[str, UserError]] = []
        for strategy in strategies:

            def note(text: str, at: str = f"{topology.name}, {strategy}") -> None:
                print(f"{at}: {text}", file=sys.stderr, flush=True)

            chosen = planning.with_strategy(there, strategy)
            try:
                if options.search:
                    changes = [
                        f"parallel.{axis}={getattr(chosen.parallel, axis)}"
                        for axis in ("fsdp", "tensor")
                        if getattr(chosen.parallel, axis) != getattr(run.parallel, axis)
                    ]
                    found += search(chosen, topology, changes=changes, note=note)
                else:
                    found.append(planning.plan(chosen, topology, fast=options.fast, note=note))
            except UserError as error:  # this strategy is nothing for this run; others may be
                errors.append((strategy, error))
        if not found:
            raise errors[0][1]
        if options.search:
            text = report.search_text(topology, found)
        else:
            text = report.plans_text(topology, found, options.fast)
        print(text, flush=True)  # at once: should the compiler crash with a later topology, this is not lost
        for strategy, error in errors:
            print(f"{strategy} is left out: {error}\n")
        all_fit &= any(one.fits for one in found)
    print(report.SEARCH_LEGEND if options.search else report.LEGEND, end="")
    return 0 if all_fit else 1


def _strategies(asked: str | None, own: str, known: Sequence[str]) -> Sequence[str]:
    names = known if asked == "all" else (asked or own).split(",")
    for name in names:
        if name not in known:
            raise UserError(f"no strategy {name!r}{nearest(name, known)}")
    return names

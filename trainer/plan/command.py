"""The command `plan`: a table for each topology, of every strategy asked for."""

import argparse
import sys
from collections.abc import Sequence

from trainer.config import Run
from trainer.errors import UserError, did_you_mean
from trainer.plan import planning, report, search, variants
from trainer.plan.topology import Topology, make_topology
from trainer.sharding import STRATEGIES


def print_plans(run: Run, options: argparse.Namespace) -> int:
    """Prints tables, and progress to stderr. Returns 1 if there is a topology on which nothing fits."""
    if not options.topology:
        raise UserError("give --topology=NAME, such as --topology=v5e:4x4,v4:2x2x4")
    if options.batch_per_chip is not None and options.batch_per_chip < 1:
        raise UserError(f"--batch_per_chip is {options.batch_per_chip}; it must be at least 1")
    if options.batch_per_chip is not None and options.search:
        raise UserError("--search finds the batch by itself: give it or --batch_per_chip")
    asked = options.strategies or run.parallel.strategy
    strategies = list(STRATEGIES) if asked == "all" else asked.split(",")
    for name in strategies:
        if name not in STRATEGIES:
            raise UserError(f"no strategy {name!r}{did_you_mean(name, STRATEGIES)}")
    fit = []
    for topology in [make_topology(name, run.parallel.num_slices or 1) for name in options.topology.split(",")]:
        batch_size = options.batch_per_chip and options.batch_per_chip * topology.chips
        variant = variants.with_batch(run, batch_size, run.microbatches) if batch_size else run
        fit.append(_print_topology(variant, topology, strategies, options))
    print(report.SEARCH_LEGEND if options.search else report.LEGEND, end="")
    return 0 if all(fit) else 1


def _print_topology(run: Run, topology: Topology, strategies: Sequence[str], options: argparse.Namespace) -> bool:
    """Prints the table of one topology and the strategies that are impossible on it; returns whether anything fits."""
    results: list = []
    errors: dict[str, UserError] = {}
    for strategy in strategies:

        def progress(text: str, where: str = f"{topology.name}, {strategy}") -> None:
            print(f"{where}: {text}", file=sys.stderr, flush=True)

        variant = variants.with_strategy(run, strategy)
        try:
            if options.search:
                results += search.search(variant, topology, variants.axis_changes(run, variant), progress)
            else:
                results.append(planning.make_plan(variant, topology, fast=options.fast, progress=progress))
        except UserError as error:  # other strategies may still be possible
            errors[strategy] = error
    if not results:
        raise errors[strategies[0]]
    text = report.search_text(topology, results) if options.search else report.plans_text(topology, results)
    print(text, flush=True)  # at once: the compiler may crash on a later topology
    for strategy, error in errors.items():
        print(f"{strategy} is left out: {error}\n")
    return any(result.fits for result in results)

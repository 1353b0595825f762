"""`evaluate`: the metrics of a checkpoint on a split."""

import argparse
import importlib.util
import math
import sys

from trainer.commands.arguments import Arguments, add_group_options

DESCRIPTION = "Evaluates a checkpoint of a run; --workdir alone is enough. Writes nothing."


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--step`, `--split`, and the options of several processes."""
    parser.add_argument("--step", default="latest", help="which checkpoint: a step, best, or latest (the default)")
    parser.add_argument("--split", help="which split (default: the run's evaluation.split)")
    add_group_options(parser)


def main(arguments: Arguments) -> int:
    """Prints a line for each metric, the number of examples, and the checkpoint's step.

    Every process exits with code 1 if a metric is not finite.
    """
    from trainer.distributed import collective_errors, is_primary
    from trainer.evaluation import evaluate

    with collective_errors("the workdir"):
        path = arguments.required_workdir().path
    metrics = evaluate(path, arguments.run, step=arguments.options.step, split=arguments.options.split)
    step = metrics.pop("step")
    bad = [name.replace("/", " ") for name, value in metrics.items() if not math.isfinite(value)]
    if not is_primary():
        return 1 if bad else 0
    for name, value in metrics.items():
        print(name.replace("/", " ") + ":", f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    # TensorBoard is an extra: pip install 'belief-trainer[tensorboard]'.
    curves = f"; its curves: tensorboard --logdir {path}" if importlib.util.find_spec("tensorboard") else ""
    best = f", the best by {arguments.run.checkpoint.best_metric}" if arguments.options.step == "best" else ""
    print(f"step {step} of {path}{best}{curves}")
    if bad:
        print(f"error: not finite: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0

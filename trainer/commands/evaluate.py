"""`evaluate`: a checkpoint on every example of a split."""

import argparse
from contextlib import closing
from typing import TYPE_CHECKING

from trainer.commands.arguments import Arguments, add_group_options
from trainer.errors import UserError

if TYPE_CHECKING:  # imports JAX
    from trainer.checkpoint import Store

DESCRIPTION = "Evaluates a checkpoint of a run; --workdir alone is enough. Writes nothing."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and what several processes need."""
    parser.add_argument("--step", default="latest", help="which checkpoint: a step, best, or latest (the default)")
    add_group_options(parser)
    parser.set_defaults(preemptible=False)


def main(arguments: Arguments) -> int:
    """Prints each metric on a line, how many examples were seen, and of which step."""
    from trainer.checkpoint import Store, check_metadata
    from trainer.data import load
    from trainer.distributed import check_same, collective_errors, is_primary
    from trainer.evaluation import evaluate_split
    from trainer.program import compile_program

    with collective_errors("the run"):
        workdir, run = arguments.required_workdir(), arguments.run
        if not workdir.checkpoints.is_dir():
            raise UserError(f"workdir {workdir.path} holds no checkpoint")
        workdir.check(run)
        program = compile_program(run)
        source = load(program.eval_source, run.loading.in_memory_bytes)
    with closing(Store(workdir.checkpoints, run.checkpoint, read_only=True)) as store:
        with collective_errors("the checkpoint"):
            step = choose(store, arguments.options.step)
            check_metadata(store.metadata(step), program.params)
        check_same("checkpoint", f"{workdir.path} at step {step}")
        state = store.restore(program.state, step)
    evaluated = evaluate_split(program, state, source)
    if not is_primary():
        return 0
    for name, value in evaluated.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        print(f"{name.replace('/', ' ')}: {shown}")
    print(f"step {step} of {workdir.path}; its curves: tensorboard --logdir {workdir.path}")
    return 0


def choose(store: "Store", which: str) -> int:
    """The step that `which` names: "latest", "best", or a number."""
    steps = store.steps()
    if not steps:
        raise UserError("there is no checkpoint yet")
    if which == "latest":
        return steps[-1]
    if which == "best":
        best = store.best_step()
        if best is None:
            raise UserError("no best checkpoint is kept: the run has no checkpoint.best_metric")
        return best
    if not which.isdecimal() or int(which) not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"there is no checkpoint of step {which!r}; there are {known}, latest, best")
    return int(which)

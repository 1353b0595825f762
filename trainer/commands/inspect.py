"""`inspect`: the settings, parameters, devices and checkpoints of a run, before it is launched or afterwards."""

import argparse
from typing import TYPE_CHECKING

from trainer.commands.arguments import Arguments
from trainer.commands.plan import print_local_plan
from trainer.errors import UserError

if TYPE_CHECKING:  # these import JAX
    from trainer.config import Checkpoint
    from trainer.workdir import Workdir

DESCRIPTION = "Shows a run: settings, parameters, devices, checkpoints. --workdir alone is enough. Writes nothing."


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--probe`, `--verify` and `--compile`."""
    probe = "only make a step with zero gradients and check whether each label decays as stated; exit code 1 if not"
    both = "also compile both steps for the devices of this machine: memory, communication, operations"
    verify = "only read every checkpoint and compare its checksums; exit code 1 if one is damaged"
    parser.add_argument("--probe", action="store_true", help=probe)
    parser.add_argument("--verify", action="store_true", help=verify)
    parser.add_argument("--compile", action="store_true", help=both)


def main(arguments: Arguments) -> int:
    """Prints the resolved config, parameter table, devices and checkpoints, or the check of `--probe` or `--verify`."""
    import jax

    from trainer import config
    from trainer.checkpoint import Store, scores
    from trainer.observe.log import read_rows
    from trainer.optim.decay_check import check_decay, decay_table
    from trainer.program import build_program

    run, workdir = arguments.run, arguments.workdir
    asked = [f"--{name}" for name in ("probe", "verify", "compile") if getattr(arguments.options, name)]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} cannot be combined: give one of them")
    if arguments.options.verify:
        return _verify(arguments.required_workdir(), run.checkpoint)
    if workdir is not None:
        workdir.check_run(run)
    program = build_program(run)
    if arguments.options.probe:
        labels = [param.label for param in program.param_table.rows]
        results = check_decay(program.init().params, labels, program.groups, program.optimizer, run.total_steps)
        print(decay_table(results), end="")
        return 0 if all(result.holds for result in results) else 1
    print(config.to_json(run), program.param_table, sep="\n")
    devices = program.strategy.devices
    kind = f"{len(devices)} × {devices[0].device_kind}"
    print(f"devices: {kind}, strategy {run.parallel.strategy}, jax {jax.__version__}")
    examples = len(program.train_source), len(program.main_evaluation.source)
    print("examples: {:,} to train on, {:,} to evaluate on".format(*examples))
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))
    print(f"state: {state_bytes:,} bytes with the optimizer's moments")
    if arguments.options.compile:
        print_local_plan(program)
    else:
        print("memory and operations of the two steps: inspect --compile")
    if workdir is not None and workdir.checkpoints.is_dir():
        store = Store(workdir.checkpoints, run.checkpoint)
        store.scores = scores(read_rows(workdir.path / "metrics.jsonl"), run.checkpoint.best_metric)
        best = store.best_step()
        print("checkpoints: " + ", ".join(f"{s} (best)" if s == best else str(s) for s in store.steps()))
    return 0


def _verify(workdir: "Workdir", settings: "Checkpoint") -> int:
    """Prints a line for each checkpoint. Neither the model nor its data are needed."""
    from trainer.checkpoint import Store
    from trainer.checkpoint.reading import verify
    from trainer.files import DamagedError

    workdir.check()
    store, damaged = Store(workdir.checkpoints, settings), 0
    for step in store.steps():
        try:
            arrays, size = verify(store.path(step))
            print(f"{step}: good, the checksums of {arrays} arrays ({size:,} bytes) are as when they were saved")
        except (DamagedError, FileNotFoundError) as error:
            damaged += 1
            print(f"{step}: {error}")
    if not store.steps():
        raise UserError(f"workdir {workdir.path} holds no checkpoint")
    return 1 if damaged else 0

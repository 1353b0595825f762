"""`evaluate`: a checkpoint on every example of a split."""

from trainer.build import build
from trainer.checkpoint.manifest import check_manifest
from trainer.checkpoint.store import Store
from trainer.commands.arguments import make_parser, parse
from trainer.data.source import load
from trainer.errors import UserError
from trainer.evaluate import evaluate


def main(argv: list[str]) -> int:
    """Prints each metric on a line, then how many examples were seen and of which step."""
    parser = make_parser("evaluate", "Evaluates a checkpoint of a run; --workdir alone is enough. Writes nothing.")
    parser.add_argument("--step", default="latest", help="which checkpoint: a step, best, or latest (the default)")
    arguments = parse(parser, argv)
    workdir, run = arguments.workdir, arguments.run
    if workdir is None:
        raise UserError("give --workdir=DIR, the folder that the run is kept in")
    if not workdir.checkpoints.is_dir():
        raise UserError(f"workdir {workdir.path} holds no checkpoint")
    workdir.check(run)
    parts = build(run)
    store = Store(workdir.checkpoints, run.checkpoint, read_only=True)
    step = choose(store, arguments.options.step)
    check_manifest(store.manifest(step), parts.rows)
    state = store.restore(parts.state, step)
    store.close()
    results = evaluate(parts, state, load(parts.eval_source, run.loading.in_memory_bytes))
    for name, value in results.items():
        print(
            f"{name.replace('/', ' ')}: {value:,}"
            if isinstance(value, int)
            else f"{name.replace('/', ' ')}: {value:.4f}"
        )
    print(f"step {step} of {workdir.path}; its curves: tensorboard --logdir {workdir.path}")
    return 0


def choose(store: Store, which: str) -> int:
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
        raise UserError(
            f"there is no checkpoint of step {which!r}; there are {', '.join(map(str, steps))}, latest, best"
        )
    return int(which)

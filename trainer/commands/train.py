"""`train`: a run from its config, or from where its workdir left off."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import Arguments, add_group_options
from trainer.errors import DivergedError, UserError
from trainer.observe.progress import Progress

if TYPE_CHECKING:  # imports JAX
    from trainer.config import Run
    from trainer.files import AnyPath
    from trainer.opening import SessionOptions

DESCRIPTION = "Trains a run. The same command on the same workdir continues it from its last checkpoint."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `train`: trials, a profile, an event log, where to begin, and those of several processes."""
    trial = "only try 3 steps, an evaluation of two batches, a save and a restore; needs no workdir and keeps nothing"
    profile = "also write a profile of these steps to WORKDIR/profile/, per process"
    parser.add_argument("--dry-run", action="store_true", help=trial)
    accept = "go on from the checkpoint although settings that change the updates differ from those of the run there"
    earlier = "go on from this checkpoint; later ones are moved aside"
    parser.add_argument("--profile", metavar="FIRST:LAST", help=profile)
    parser.add_argument("--accept-changes", action="store_true", help=accept)
    parser.add_argument("--from-step", metavar="STEP", type=int, help=earlier)
    parser.add_argument(
        "--init-from", metavar="SOURCE", help="begin from WORKDIR[@STEP], a folder of Orbax or a .safetensors file"
    )
    parser.add_argument(
        "--trace", metavar="DIR", help="also write an event log (phases, batches, saves) to DIR/process_<i>.jsonl"
    )
    twice = "only make the first N steps twice, and name the first metric and parameter that differ; exit code 1 if any"
    parser.add_argument("--check-determinism", metavar="N", type=int, help=twice)
    until = "end after this step, which is evaluated and saved; the command without it goes on from there"
    parser.add_argument("--until", metavar="STEP", type=int, help=until)
    once = "make seed, values of schedules and weight decays arguments of the compiled step, so that runs which differ "
    once += "only in these find it in the compilation cache; no bit of a result changes"
    parser.add_argument("--compile-once", action="store_true", help=once)
    add_group_options(parser)


def main(arguments: Arguments) -> int:
    """Trains.

    The exit code is 1 if the loss, the gradient or the state is not finite, if too many updates in a row are skipped,
    or if `--check-determinism` finds a difference.
    """
    from trainer.distributed import collective_errors, is_primary
    from trainer.loop import train
    from trainer.observe.phase_log import NoPhaseLog, PhaseLog

    options = arguments.options
    with collective_errors("the flags"):
        _check(options)
    trace = PhaseLog(options.trace) if options.trace else NoPhaseLog()
    try:
        if options.dry_run:
            from trainer.dry_run import dry_run

            try:
                print(dry_run(arguments.run), end="")
            except DivergedError as error:  # the diverged/STEP folder was in the temporary workdir, which is deleted
                raise error.explained("without --dry-run the run leaves what `replay` needs") from None
            return 0
        if options.check_determinism is not None:
            return _check_determinism(arguments.run, options.check_determinism)
        with collective_errors("the workdir"):
            workdir = arguments.required_workdir()
            if options.from_step is not None and not workdir.has_checkpoint():
                raise UserError(f"--from-step is {options.from_step}, but workdir {workdir.path} holds no checkpoint")
            if options.until is not None and options.until > arguments.run.total_steps:
                raise UserError(f"--until is {options.until}; the run has {arguments.run.total_steps} steps")
        path = workdir.path
        trace.phase("compile", 0)
        session: SessionOptions = {
            "trace": trace,
            "profile": None if options.profile is None else parse_profile(options.profile),
            "accept_changes": options.accept_changes,
            "from_step": options.from_step,
            "hooks": [] if options.until in (None, arguments.run.total_steps) else [_Until(options.until)],
        }
        if options.compile_once:
            _train_shared(arguments.run, path, session)
        else:
            train(arguments.run, path, **session)
    except DivergedError as error:
        if is_primary():
            print(f"error: {error}", file=sys.stderr)
        return 1
    if not is_primary():
        return 0
    print(f"done: {path} has checkpoints/, metrics.jsonl, tensorboard/, config.json and params.txt")
    return 0


def _train_shared(run: "Run", path: "AnyPath", session: "SessionOptions") -> None:
    """As `train`, with the program that all runs share which differ only in numbers."""
    from trainer.compilation import compile_ahead
    from trainer.compile_once import with_shared_program
    from trainer.loop import train_program
    from trainer.program import build_program

    program = with_shared_program(build_program(run))
    compile_ahead(program.train_step)
    train_program(program, path, Progress(run.total_steps), **session)


class _Until:
    """A hook that ends the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event: Any) -> None:
        if event.step >= self.step:
            event.stop(f"--until={self.step}")

    on_start = on_step


def _check(options: argparse.Namespace) -> None:
    """Raises `UserError` for flags that have no effect together, and for those that are out of range."""
    if options.dry_run and options.check_determinism is not None:
        raise UserError("--dry-run and --check-determinism are two trials: give one of them")
    for trial in ("dry_run", "check_determinism"):
        if getattr(options, trial) in (None, False):
            continue
        for name in ("profile", "accept_changes", "from_step", "trace", "until", "compile_once"):
            if getattr(options, name) not in (None, False):
                flags = [f"--{flag.replace('_', '-')}" for flag in (trial, name)]
                raise UserError(f"{flags[0]} tries the run without its workdir, where {flags[1]} does nothing")
    if options.from_step is not None and options.from_step < 1:
        raise UserError(f"--from-step is {options.from_step}; the step of a checkpoint is expected, 1 or more")
    if options.until is not None and options.until < 1:
        raise UserError(f"--until is {options.until}; a step is expected, 1 or more")
    if options.profile is not None:
        parse_profile(options.profile)
    place = Path(options.trace or ".")
    if found := next((path for path in (place, *place.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"--trace={place}: {found} is no folder")


def parse_profile(text: str) -> tuple[int, int]:
    """The first and the last step to profile, from the text of `--profile`; raises `UserError`."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile is {text!r}; FIRST:LAST is expected, two steps from 1 on, such as 10:12")
    return int(first), int(last)


def _check_determinism(run: "Run", steps: int) -> int:
    from trainer import distributed
    from trainer.determinism import check_determinism

    if not 1 <= steps <= run.total_steps:
        raise UserError(f"--check-determinism is {steps}; a number of steps from 1 to {run.total_steps} is expected")
    if distributed.count() > 1:
        raise UserError("--check-determinism compares two passes of one process")
    is_equal, text = check_determinism(run, steps)
    print(text)
    return 0 if is_equal else 1

"""`train`: a run from its config, or from where its workdir left off."""

import argparse
import copy
import dataclasses
import io
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import Arguments, add_group_options
from trainer.errors import DivergedError, UserError
from trainer.observe.progress import Progress

if TYPE_CHECKING:  # imports JAX
    from trainer.config import Run
    from trainer.files import AnyPath
    from trainer.opening import SessionOptions
    from trainer.program import EvalProgram

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
    from trainer.observe.trace import NoTrace, Trace

    options = arguments.options
    with collective_errors("the flags"):
        _check(options)
    trace = Trace(options.trace) if options.trace else NoTrace()
    try:
        if options.dry_run:
            try:
                print(_dry_run(arguments.run), end="")
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


class _SilentProgress(Progress):
    """Keeps the losses and the latest message instead of showing them, with the times at which they came."""

    losses: tuple[str, ...] = ()
    text, trained_at, evaluated_at = "", 0.0, 0.0

    def update(self, step: int, loss: float, examples_per_second: float, seconds_left: float) -> None:
        self.losses, self.trained_at = (*self.losses, f"{loss:.4f}"), time.perf_counter()

    def message(self, text: str) -> None:
        self.text, self.evaluated_at = text, time.perf_counter()


def _dry_run(run: "Run") -> str:
    """A table of results and times from every part of a run, tried in a temporary workdir."""
    import jax
    import numpy as np

    from trainer import distributed
    from trainer.data.memory import check_reads_are_equal, fits_in_memory
    from trainer.loop import agreed_program, train_program
    from trainer.observe import table

    if distributed.count() > 1:
        raise UserError("--dry-run tries a run in one process; rehearse tries several")
    trial, times = _SilentProgress(3, io.StringIO()), [time.perf_counter()]
    with tempfile.TemporaryDirectory(prefix="trainer-") as folder:
        program = agreed_program(_first_steps(run), folder)
        examples = len(program.train_source), len(program.main_evaluation.source)
        for source in (program.train_source, *(one.source for one in program.evaluations.values())):
            if fits_in_memory(source, run.loading.in_memory_bytes):
                check_reads_are_equal(source)  # raises the error that the run would end with
        program = dataclasses.replace(program, evaluations={k: _cut(one) for k, one in program.evaluations.items()})
        times.append(time.perf_counter())
        saved = train_program(program, folder, trial, handle_signals=False)
        times += [trial.trained_at, trial.evaluated_at, time.perf_counter()]
        evaluation = trial.text.partition(": ")[2]
        size = sum(file.stat().st_size for file in Path(folder, "checkpoints").rglob("*") if file.is_file())
        restored = train_program(program, folder, trial, handle_signals=False)
        times.append(time.perf_counter())
    for (path, a), b in zip(jax.tree.leaves_with_path(saved), jax.tree.leaves(restored), strict=True):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            raise UserError(f"{jax.tree_util.keystr(path)} was not restored as it was saved")
    results = {
        "model and data": "{:,} examples to train on, {:,} to evaluate on".format(*examples),
        f"{len(trial.losses)} of {run.total_steps:,} steps": f"loss {', '.join(trial.losses)}; the run's own schedules",
        "evaluation": evaluation,
        "save": f"{size:,} bytes",
        "restore": "every array equals the saved one, bit for bit",
    }
    seconds = [f"{end - start:.1f}" for start, end in itertools.pairwise(times)]
    rows = [(*result, taken) for result, taken in zip(results.items(), seconds, strict=True)]
    return table(("tried", "result", "seconds"), rows, right=("seconds",)) + "nothing of this dry run is kept\n"


def _cut(evaluation: "EvalProgram") -> "EvalProgram":
    """The evaluation of two batches."""
    import numpy as np

    from trainer.data import ArraySource, take

    source, size = evaluation.source, evaluation.spec["mask"].shape[0]
    return dataclasses.replace(evaluation, source=ArraySource(take(source, np.arange(min(2 * size, len(source))))))


def _first_steps(run: "Run") -> "Run":
    """A copy of a resolved run that ends after 3 steps; these equal the first 3 steps of the run itself."""
    from trainer.config import schedules_of

    short = copy.deepcopy(run)
    short.total_steps = min(3, run.total_steps)
    short.checkpoint.every_steps = short.total_steps
    for evaluation in (short.evaluation, *short.evaluations.values()):
        evaluation.every_steps, evaluation.every = short.total_steps, None
    if short.init_from is not None:
        short.init_from.optimizer_state = "fresh"
    short.logging.every_steps, short.loading.in_memory_bytes = 1, 0  # so that only these steps' examples are read
    for schedule in schedules_of(short.optimizer).values():
        schedule.run_steps = schedule.run_steps or run.total_steps
    return short

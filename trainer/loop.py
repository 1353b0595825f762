"""The training loop."""

import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from trainer import config, distributed
from trainer.compilation import compile_ahead
from trainer.garbage import resume_gc
from trainer.observe.progress import Progress
from trainer.program import Program, build_program
from trainer.state import TrainState
from trainer.versions import versions

if TYPE_CHECKING:
    from trainer.opening import SessionOptions


def train(
    run: config.Run,
    workdir: str | PathLike[str],
    *,
    progress: Progress | None = None,
    verbose: bool = True,
    **options: Unpack["SessionOptions"],
) -> TrainState:
    """Trains to `run.total_steps` in `workdir`, from the last checkpoint there. All processes of a run call it.

    Args:
      run: the description, as a config file returns it.
      workdir: a folder that is new, empty, or holds this run.
      progress: where to show the run; None for the standard output of the first process.
      profile: the first and the last step, counted from 1, to write a profile of; None for none.
      verbose: whether anything is shown, if `progress` is None.
      handle_signals: whether SIGINT, SIGTERM and SIGHUP save the state before they end the run.
      accept_changes: whether a run in `workdir` goes on although settings that change its updates differ.
      from_step: the checkpoint to go on from; None for the newest. Later ones are moved aside.
      trace: a `trainer.observe.phase_log.PhaseLog` that records each phase and batch; none by default.
      hooks: objects whose methods are called while the run goes on, see `trainer.hooks.Hook`.

    Returns:
      The final state, saved and evaluated.

    Raises:
      UserError: the run cannot be started (no checkpoint was changed), or later an evaluation or a hook raises it.
      DivergedError: a step gave NaN or Inf, or `numerics.max_skips` updates in a row were dropped.
      HostError: the machine failed, such as a full disk; the last checkpoint is good.
      Interrupted: SIGINT, SIGTERM or SIGHUP came; the state is saved.
    """
    program = agreed_program(run, workdir)
    with Path(os.devnull).open("w") as silent:
        shown = None if verbose and distributed.is_primary() else silent
        progress = progress or Progress(run.total_steps, shown)
        return train_program(program, workdir, progress, **options)


def train_program(
    program: Program, workdir: str | PathLike[str], progress: Progress, **options: Unpack["SessionOptions"]
) -> TrainState:
    """The loop; arguments, result and errors are those of `train`, for a program in place of its run."""
    from trainer.opening import open_session  # imports Orbax and Grain, for half a second, while XLA compiles

    with open_session(program, workdir, progress, **options) as session:
        state = session.initial_state()
        eval_steps = [one.step for one in program.evaluations.values()]
        for step, batch in session.batches():
            state, metrics = program.train_step(state, batch)
            session.record(step, state, metrics)
            resume_gc()  # a command pauses it until its first step
            compile_ahead(*eval_steps)  # after that step, which needs the cores itself
            due = session.due(step)
            if due.save:
                session.save(state)
            for name in due.evaluate:
                session.evaluate(state, name)
        session.finish(state)
        return state


def agreed_program(run: config.Run, workdir: str | PathLike[str]) -> Program:
    """The program of a run; with several processes, after they have compared their settings and versions."""
    with distributed.collective_errors("the settings"):
        run = config.resolve(run)
        lines = [config.to_json(run), f"workdir {os.fspath(workdir)}", *(f"{k} {v}" for k, v in versions().items())]
    distributed.check_same("the processes were not started alike", "\n".join(lines))
    with distributed.fail_fast(), distributed.collective_errors("the run"):
        return build_program(run, compiles=True)

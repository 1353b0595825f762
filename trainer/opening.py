"""Opening a workdir for a session: lock, data, checkpoint, metrics log and signals, in this order."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
from typing import TypedDict

from trainer import distributed, divergence, init_from
from trainer.checkpoint import DataIdentity, Store, scores
from trainer.data.memory import load_all_into_memory
from trainer.distributed import Preemption, peers
from trainer.errors import DivergedError, HostError, UserError
from trainer.experiment import RandomAccessSource
from trainer.garbage import gc_paused
from trainer.hooks import Hooks
from trainer.observe.log import MetricsLog, NoLog
from trainer.observe.phase_log import NoPhaseLog, PhaseLog
from trainer.observe.profile import Profile
from trainer.observe.progress import Progress
from trainer.observe.recorder import Recorder
from trainer.program import Program
from trainer.resume import Resume, Resumed, describe_data
from trainer.session import Session
from trainer.watch import Watch
from trainer.workdir import Workdir

_NO_TRACE = NoPhaseLog()


class SessionOptions(TypedDict, total=False):
    """The options of `open_session`, which `train` hands on."""

    profile: tuple[int, int] | None
    handle_signals: bool
    accept_changes: bool
    from_step: int | None
    trace: PhaseLog | NoPhaseLog
    hooks: Sequence[object]


@contextmanager
def open_session(
    program: Program,
    workdir: str | PathLike[str],
    progress: Progress,
    *,
    profile: tuple[int, int] | None = None,
    handle_signals: bool = True,
    accept_changes: bool = False,
    from_step: int | None = None,
    trace: PhaseLog | NoPhaseLog = _NO_TRACE,
    hooks: Sequence[object] = (),
) -> Iterator[Session]:
    """Opens a workdir; all processes of a run open it together. Arguments and errors are those of `train`."""
    folder, run, table = Workdir(workdir), program.run, str(program.param_table)
    with ExitStack() as stack:
        stack.enter_context(distributed.fail_fast())
        with distributed.collective_errors("the workdir and the data"):
            run_hooks = Hooks(hooks, program.evaluations)
            _check_profile(profile, 0, run.total_steps)
            _check_evaluations(program)
            store = Store(folder.checkpoints, run.checkpoint, on_saved=trace.saved)
            if distributed.is_primary():
                folder.check()
            plan = None if store.step_names() else init_from.plan_init(program)  # before the folder is made
            if distributed.is_primary():
                stack.enter_context(folder.locked())
            source, eval_sources, data = _load(program)
            if distributed.is_primary():
                if not folder.has_checkpoint():
                    folder.write(run, table)  # before the rest, so that a kill leaves a folder to launch again
                store.remove_incomplete()
        stack.push(lambda _, error, __: store.close(error))
        watch = stack.enter_context(Watch(run.watch, run.batch_size))
        trace.phase("restore", 0)
        watch.enter("restore", 0)
        with distributed.collective_errors("the checkpoint"), gc_paused():
            resumed = Resume(program, store, folder, data, accept_changes, from_step).newest()
            if resumed.state is None and plan is not None:
                resumed = resumed._replace(state=plan.state(), start=plan.start, notes=[str(plan)])
            start = resumed.start
            _check_profile(profile, start, run.total_steps)
        peers.set_end_seconds(run.watch.end_seconds)
        distributed.check_same("not all processes see the same files in the workdir", f"a run at step {start}")
        stack.callback(progress.end_line)
        for text in (table, *program.strategy.notes, *resumed.notes, *_diverged_later(folder, start)):
            progress.message(text)
        log = _open_log(program, folder, store, resumed, progress)
        stack.callback(log.close)
        profiler = Profile(folder.path / "profile" / f"process_{distributed.index()}", profile)
        stack.callback(profiler.close)
        # Until here there is nothing to save, and Ctrl-C may act at once.
        preemption = stack.enter_context(Preemption(handle_signals, watch.wakeup_fd))
        # Entered last, so left first: if one process alone fails, the callbacks above would wait for the others.
        stack.enter_context(distributed.fail_fast())
        recorder = Recorder(run, start, lambda step: program.due(step).log, program.strategy.devices, log, progress)
        parts = (store, log, recorder, progress, profiler, preemption, watch, trace, run_hooks)
        session = Session(program, folder, resumed, source, eval_sources, *parts)
        session.init_plan, recorder.on_row = plan, partial(session.call_hooks, "on_log")
        watch.set_rescue(session.rescue)
        with _ending(session):
            yield session


def _check_profile(profile: tuple[int, int] | None, start: int, last: int) -> None:
    """Raises `UserError` unless the steps to profile are in order, after `start`, and not after `last`."""
    if profile is not None and profile[0] > profile[1]:
        raise UserError(f"the profile is to begin with step {profile[0]}, but to end with step {profile[1]} before it")
    if profile is not None and profile[1] > last:
        raise UserError(f"the profile is to end with step {profile[1]}, the run ends with {last}")
    if profile is not None and profile[0] <= start:
        raise UserError(f"the profile is to begin with step {profile[0]}, the run goes on after step {start}")


def _check_evaluations(program: Program) -> None:
    """Raises `UserError` if metrics of an evaluation would have the names of training metrics."""
    if "train" in program.evaluations:
        instead = "name this one otherwise, as evaluations={'train-set': Evaluation('train')}, with another main split"
        raise UserError(f"evaluation.split is 'train', and training metrics are named train/loss and so on: {instead}")


def _load(program: Program) -> tuple[RandomAccessSource, dict[str, RandomAccessSource], DataIdentity]:
    """The training examples and those of each evaluation, in memory where settings allow it; identity of the former."""
    sources = [program.train_source, *(one.source for one in program.evaluations.values())]
    source, *others = load_all_into_memory(sources, program.run.loading.in_memory_bytes)
    return source, dict(zip(program.evaluations, others, strict=True)), describe_data(source)


def _open_log(
    program: Program, folder: Workdir, store: Store, resumed: Resumed, progress: Progress
) -> MetricsLog | NoLog:
    """The metrics log, once the settings are written; only the first process writes."""
    if not distributed.is_primary():
        return NoLog()
    run, start = program.run, resumed.start
    # Written for a resumed run only now: if its checkpoint does not fit, everything must stay as it was.
    folder.write(run, str(program.param_table), resumed.accepted)
    on_error = "continue" if run.checkpoint.on_error == "continue" and distributed.count() == 1 else "stop"
    log = MetricsLog(folder.path, start, row_count=resumed.row_count, on_error=on_error, report=progress.message)
    if resumed.newly_accepted and not log.has_evaluation(start, "accepted"):
        log.write(start, {"accepted": resumed.newly_accepted}, {})
    store.scores = scores(log.rows(), run.checkpoint.best_metric)
    return log


@contextmanager
def _ending(session: Session) -> Iterator[None]:
    """Explains a divergence, and saves the newest state if a hook raises an exception."""
    try:
        yield
    except DivergedError as error:
        session.trace.phase("save", error.step)
        session.watch.enter("save", error.step)
        raise divergence.explain(session, error) from None
    except BaseException as error:
        if session.hooks.failed and distributed.count() == 1:  # nothing else is known to be wrong with the run
            error.add_note(note := f"a hook ended the run; {_rescued(session)}")
            if isinstance(error, SystemExit):  # of which Python shows nothing
                session.progress.message(note)
        raise


def _rescued(session: Session) -> str:
    """Saves the newest state, and returns a text about it."""
    try:
        return session.rescue()
    except HostError as fault:
        return f"the newest state is not saved: {fault}"
    except DivergedError as fault:  # perhaps the hook stopped the run for the same reason
        return f"the newest state is not saved: {divergence.explain(session, fault)}"


def _diverged_later(folder: Workdir, start: int) -> list[str]:
    """A note if an earlier launch diverged after the checkpoint from which this one starts."""
    place = folder.path / "diverged"
    names = [path.name for path in place.iterdir()] if start and place.is_dir() else []
    if not (steps := [int(name) for name in names if name.isdecimal() and int(name) > start]):
        return []
    again = f"if it does so again, the checkpoint of step {start} may be the cause: go on from an earlier one"
    return [f"note: step {min(steps)} diverged in an earlier launch; {again} with --from-step"]

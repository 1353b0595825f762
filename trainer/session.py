"""A session: an opened workdir with its lock, state, batches, metrics, checkpoints and signals."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike

import jax
import jax.numpy as jnp

from trainer import distributed
from trainer.checkpoint import Store, check_metadata, make_metadata
from trainer.data import load
from trainer.data.stream import prefetch, train_batches
from trainer.distributed import Interrupted, Preemption
from trainer.errors import DivergedError, UserError
from trainer.evaluation import evaluate_split
from trainer.experiment import Batch, RandomAccessSource
from trainer.metrics import Metrics
from trainer.observe.log import MetricsLog, NoLog
from trainer.observe.profile import Profile
from trainer.observe.progress import Progress
from trainer.observe.recorder import Recorder
from trainer.program import Due, Program
from trainer.state import TrainState
from trainer.workdir import Workdir


@dataclasses.dataclass
class Session:
    """An opened workdir, with the methods of the training loop in the order in which it calls them.

    `start` is the step of the checkpoint that the run continues from, 0 for none; `open_session` makes all parts.
    """

    program: Program
    start: int
    train_source: RandomAccessSource
    eval_source: RandomAccessSource
    store: Store
    log: MetricsLog | NoLog
    recorder: Recorder
    profile: Profile
    preemption: Preemption
    _evaluated: dict[str, float] | None = None  # metrics of the evaluation after the newest step, if there was one
    _signum: int | None = None

    def initial_state(self) -> TrainState:
        """The state of the newest checkpoint, or a fresh one."""
        if self.start:
            return self.store.restore(self.program.state, self.start)
        return self.program.init()

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Each step that is left, counted from 1, with its batch on the devices."""
        run, strategy = self.program.run, self.program.strategy
        batches = train_batches(
            self.train_source,
            seed=run.seed,
            batch_size=run.batch_size,
            start=self.start,
            stop=run.total_steps,
            local_examples=strategy.local_examples(run.batch_size),
            threads=run.loading.threads,
            workers=run.loading.workers,
        )
        for step, batch in enumerate(prefetch(batches, strategy.shard_batch), self.start + 1):
            with self.profile.step(step):
                yield step, batch

    def record(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched, and writes those of earlier steps that are computed."""
        self.profile.dispatched(step, metrics)
        self.recorder.add(step, metrics)

    def due(self, step: int) -> Due:
        """The work that is due after a step. A signal makes the step the last.

        Call this once a step: here the processes agree whether the step is the last.
        """
        due = self.program.due(step)
        self._evaluated, self._signum = None, self.preemption.signal_after(step)
        return due if self._signum is None else due._replace(save=True, stop=True)

    def evaluate(self, state: TrainState) -> None:
        """Evaluates the state after the newest step, and writes the result in that step's row."""
        self._evaluated = self.recorder.flush_with(lambda: evaluate_split(self.program, state, self.eval_source))

    def save(self, state: TrainState) -> None:
        """Starts to save the state after the newest step, once all metrics up to it are on disk.

        Raises:
          DivergedError: the state holds NaN or Inf.
        """
        step = self.recorder.flush()
        with self.recorder.paused():
            # Loss and gradient of this step may be finite, and the parameters after it not.
            if not _all_finite(state):
                raise DivergedError(f"the state after step {step} holds NaN or Inf")
            self.log.sync()
            self.store.save(state, make_metadata(self.program.run, self.program.param_table, step), self._evaluated)

    def finish(self) -> None:
        """Waits for the last save; raises `Interrupted` if a signal ended the run."""
        self.store.wait()
        if self._signum is not None:
            # A process that got no signal assumes SIGTERM. SIGINT, if any process got it, wins: its number is smaller.
            signals = distributed.gather("signal", str(int(self._signum)))
            raise Interrupted(self.recorder.flush(), min(map(int, signals)))


@contextmanager
def open_session(
    program: Program,
    workdir: str | PathLike[str],
    progress: Progress,
    *,
    profile: tuple[int, int] | None = None,
    handle_signals: bool = True,
) -> Iterator[Session]:
    """Opens a workdir; all processes of a run open it together. Arguments and errors are those of `train`."""
    folder, run, table = Workdir(workdir), program.run, str(program.param_table)
    with ExitStack() as stack:
        stack.enter_context(distributed.fail_fast())
        with distributed.collective_errors("the workdir and the data"):
            if profile is not None and profile[1] > run.total_steps:
                raise UserError(f"the profile is to end with step {profile[1]}, the run ends with {run.total_steps}")
            if distributed.is_primary():
                folder.check(run)
                stack.enter_context(folder.locked())
                if not folder.has_checkpoint():
                    folder.write(run, table)  # first, so that a kill at any moment leaves a folder to launch again
            limit = run.loading.in_memory_bytes
            sources = (load(program.train_source, limit), load(program.eval_source, limit))
        store = Store(folder.checkpoints, run.checkpoint)
        stack.callback(store.close)
        with distributed.collective_errors("the checkpoint"):
            start, notes = _newest(program, store)
            if profile is not None and profile[0] <= start:
                raise UserError(f"the profile is to begin with step {profile[0]}, the run goes on after step {start}")
        distributed.check_same("not all processes see the same files in the workdir", f"a run at step {start}")
        stack.callback(progress.end_line)
        for text in (table, *program.strategy.notes, *notes):
            progress.message(text)
        log: MetricsLog | NoLog = NoLog()
        if distributed.is_primary():
            # Written for a resumed run only now: if its checkpoint does not fit, everything must stay as it was.
            folder.write(run, table)
            log = MetricsLog(folder.path, start)
        stack.callback(log.close)
        stack.enter_context(_naming_the_last_checkpoint(store))
        profiler = Profile(folder.path / "profile" / f"process_{distributed.index()}", profile)
        stack.callback(profiler.close)
        # Until here there is nothing to save, and Ctrl-C may act at once.
        preemption = stack.enter_context(Preemption(handle_signals))
        # Entered last, so left first. If one process of several raises an exception, it must end here: the callbacks
        # above would wait for the others.
        stack.enter_context(distributed.fail_fast())
        recorder = Recorder(run, start, lambda step: program.due(step).log, program.strategy.devices, log, progress)
        session = Session(program, start, *sources, store, log, recorder, profiler, preemption)
        yield session
        session.finish()


def _newest(program: Program, store: Store) -> tuple[int, list[str]]:
    """The step of the newest checkpoint, 0 if there is none, and what to tell of it.

    Raises:
      UserError: the checkpoint is not one of this model.
    """
    steps = store.steps()
    if not steps:
        return 0, []
    changes = check_metadata(store.metadata(steps[-1]), program.param_table)
    notes = [f"note: since the checkpoint, {change}; the numbers may differ in their last bits" for change in changes]
    done = " (finished: nothing is left to do)" if steps[-1] >= program.run.total_steps else ""
    return steps[-1], [*notes, f"resumed from step {steps[-1]}{done}"]


@contextmanager
def _naming_the_last_checkpoint(store: Store) -> Iterator[None]:
    try:
        yield
    except DivergedError as error:
        store.wait()
        steps = store.steps()
        last = f"the last checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
        raise DivergedError(f"{error}; the run is stopped, {last}") from None


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))

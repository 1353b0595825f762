"""A session: an opened workdir with its state, batches, metrics, checkpoints and signals."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trainer import distributed
from trainer.checkpoint import Store, make_metadata
from trainer.data.stream import prefetch, split_ids, train_batches
from trainer.distributed import Break, Interrupted, Preemption
from trainer.errors import DivergedError, HostError
from trainer.evaluation import evaluate_split, report
from trainer.experiment import Batch, RandomAccessSource
from trainer.hooks import Hooks
from trainer.init_from import InitPlan
from trainer.metrics import Metrics
from trainer.moved import save_beside_if_moved
from trainer.observe.log import MetricsLog, NoLog
from trainer.observe.phase_log import NoPhaseLog, PhaseLog
from trainer.observe.profile import Profile
from trainer.observe.progress import Progress
from trainer.observe.recorder import Recorder, evaluation_text
from trainer.optional import augmentation
from trainer.program import Due, Program
from trainer.resume import Resumed
from trainer.state import TrainState
from trainer.watch import Watch
from trainer.workdir import Workdir


@dataclasses.dataclass
class Session:
    """An opened workdir, with the methods that the training loop calls."""

    program: Program
    workdir: Workdir
    resumed: Resumed  # from which checkpoint the run continues
    train_source: RandomAccessSource
    eval_sources: Mapping[str, RandomAccessSource]  # by evaluation
    store: Store
    log: MetricsLog | NoLog
    recorder: Recorder
    progress: Progress
    profile: Profile
    preemption: Preemption
    watch: Watch
    trace: PhaseLog | NoPhaseLog
    hooks: Hooks
    init_plan: InitPlan | None = None  # how the first state is made, if not with fresh variables
    _signum: int | None = None
    _newest: tuple[int, Any] = (0, None)  # the step that was dispatched last, and the state after it
    _saved_step: int = 0
    _saved_at: float = dataclasses.field(default_factory=time.monotonic)

    def initial_state(self) -> TrainState:
        """The state of the checkpoint or of `init_from`, or a fresh one. Makes evaluations that a kill prevented."""
        state, start = self.resumed.state, self.resumed.start
        self._saved_step = 0 if self.resumed.row_count is None else start
        self.resumed = self.resumed._replace(state=None)  # drop our reference: the first step donates the state
        if state is None:
            self._enter("compile", 0)
            state = self.program.init()
        else:
            self.trace.restored(start, state)
        self._newest = start, state
        self.call_hooks("on_start", start)
        self._evaluate_owed(state, start, self.program.due(start).evaluate if start else ())
        return state

    def call_hooks(self, name: str, step: int, raw_metrics: Mapping[str, Any] | None = None) -> None:
        """Calls the hooks of a moment; `raw_metrics` are as in `Event`."""
        self.hooks.call(name, step, raw_metrics or {}, lambda: self._newest[1], self.log)

    def _evaluate_owed(self, state: TrainState, step: int, names: Iterable[str]) -> None:
        """Makes the evaluations of a step that have no row yet."""
        for name in names:
            is_there = isinstance(self.log, NoLog) or self.log.has_evaluation(step, f"{name}/examples")
            if "no" in distributed.gather("evaluated", "yes" if is_there else "no"):
                self.progress.message(f"step {step} was not yet evaluated on {name!r}: evaluating it now")
                self.evaluate(state, name)

    def _is_ending(self) -> bool:
        return self._signum is not None or bool(self.hooks.reason)

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Each step that is left, counted from 1, with its batch, until a signal comes or a hook stops the run."""
        if self._is_ending():  # a signal interrupted an evaluation in `initial_state`, or a hook stopped the run
            return
        run, strategy, start = self.program.run, self.program.strategy, self.resumed.start
        places = strategy.local_positions(run.batch_size)

        def to_devices(batch: Batch) -> tuple[Any, Batch]:
            ids, batch = split_ids(batch)
            return ids, strategy.shard_batch(batch)

        depth = 0 if strategy.is_one_cpu else 2  # a batch that is not moved is best read just before its step
        ready = prefetch(self.host_batches(start, with_ids=self.trace.is_on), to_devices, depth)
        for step in range(start + 1, run.total_steps + 1):
            self._enter("data", step)
            try:
                with self.preemption.breakable():
                    ids, batch = next(ready)
            except Break:
                self._signum = self.preemption.signal_after()
                return
            self.trace.batch(step, ids, places)
            self._enter("compile" if step == start + 1 else "step", step)  # the first call compiles
            with self.profile.step(step):
                yield step, batch
            if self._is_ending():
                return

    def host_batches(self, start: int, *, with_ids: bool = False) -> Iterator[Batch]:
        """The batches of this process after the step `start`, as NumPy arrays."""
        run = self.program.run
        return train_batches(
            self.train_source,
            seed=run.seed,
            batch_size=run.batch_size,
            start=start,
            stop=run.total_steps,
            local_positions=self.program.strategy.local_positions(run.batch_size),
            threads=run.loading.threads,
            workers=run.loading.workers,
            timeout_seconds=run.watch.data_seconds,
            with_ids=with_ids,
            augment=augmentation(run.experiment),
        )

    def _enter(self, phase: str, step: int) -> None:
        self.trace.phase(phase, step)
        self.watch.enter(phase, step)

    def record(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Takes the results of a step that was just dispatched, and writes the metrics of earlier steps."""
        self.watch.enter("device", step)
        self._newest = step, state
        self.profile.dispatched(step, metrics)
        self.recorder.add(step, metrics)
        self.call_hooks("on_step", step, metrics)

    def due(self, step: int) -> Due:
        """The work that is due after a step. Call this once a step: the processes agree here whether it is the last."""
        due = self.program.due(step)
        self._signum = self.preemption.signal_after()
        is_lost = False
        with self._write_errors():
            try:
                self.store.raise_save_error()
            except HostError:  # if the workdir was moved away, the next save goes to a new folder beside it
                is_lost = distributed.count() == 1 and self.workdir.is_replaced()
                if not is_lost:
                    raise
        if self.hooks.reason:
            return due._replace(evaluate=tuple(self.program.evaluations), save=True)
        return due._replace(save=True) if is_lost or self._signum is not None or self._is_time(due) else due

    def _is_time(self, due: Due) -> bool:
        """Whether a checkpoint is due by `every_seconds` or, if `continuous`, because the last save is finished."""
        settings = self.program.run.checkpoint
        if due.save or (settings.every_seconds is None and not settings.continuous):
            return False
        is_late = settings.every_seconds is not None and time.monotonic() - self._saved_at > settings.every_seconds
        wanted = is_late or (settings.continuous and not self.store.is_saving())
        if distributed.count() == 1:
            return wanted
        return due.log and distributed.gather("time to save", "yes" if wanted else "no")[0] == "yes"

    def save(self, state: TrainState, *, is_last: bool = False) -> None:
        """Starts to save the state after the newest step, once all metrics up to it are on disk.

        Raises `DivergedError` if the state holds NaN or Inf, and `HostError` if it cannot be written. With
        `checkpoint.on_error="continue"` it raises `HostError` only if it `is_last`: no later save would try again.
        """
        step = self.recorder.flush()
        self._enter("save", step)
        with self.recorder.paused(), self._write_errors(is_last=is_last):
            run, table, data = self.program.run, self.program.param_table, self.resumed.data
            accepted = [text for entry in self.resumed.accepted for text in entry["changes"]]
            metadata = make_metadata(run, table, data, step, row_count=self.log.count, accepted=accepted)
            save_beside_if_moved(self.workdir, self.program, state, metadata, self.resumed.accepted)
            with self._write_errors():
                self.store.wait()  # an error of the save before must not prevent this one
            self.log.sync()
            # Loss and gradient of this step may be finite, and the parameters after it not.
            if not self.store.save(state, metadata):
                raise DivergedError(f"the state after step {step} holds NaN or Inf", step)
            self._saved_step, self._saved_at = step, time.monotonic()
            self.trace.saving(step)
        if self._saved_step == step:
            self.call_hooks("on_save", step)

    def evaluate(self, state: TrainState, name: str) -> None:
        """Evaluates the state after the newest step, reports, and writes the result in a row of its own."""
        step, best = self.recorder.flush(), self.program.run.checkpoint.best_metric
        self._enter("evaluate", step)
        try:
            if self._signum is not None:  # a signal already interrupted another evaluation of this step
                raise Break
            with self.recorder.paused(), self.preemption.breakable():
                metrics = evaluate_split(self.program, state, self.eval_sources[name], self._after_batch, name)
                report(self.program, state, name, self.log.report_writer(step))
        except Break:
            self._signum = self._signum or self.preemption.signal_after()
            self.progress.message(f"the evaluation of step {step} is broken off: the next launch makes it")
            return
        self._enter("device", step)
        self.progress.message(f"step {step}: {evaluation_text(metrics)}")
        with self._write_errors():
            self.log.write(step, metrics, {})
        if best in metrics:
            self.store.scores[step] = metrics[best]
        self.call_hooks("on_evaluate", step, metrics)

    def _after_batch(self) -> None:
        self.watch.beat()
        if distributed.count() > 1 and self._signum is None:
            self._signum = self.preemption.signal_after()  # the processes break off together
            if self._signum is not None:
                raise Break

    def finish(self, state: TrainState) -> None:
        """Makes evaluations that are owed, saves the newest state, removes old checkpoints, and calls `on_end`.

        Raises `HostError` if the state is not on disk, and `Interrupted` if a signal ended the run.
        """
        step = self.recorder.flush()
        self._evaluate_owed(state, step, self.program.evaluations if self.hooks.reason else ())
        if self._saved_step != step:
            self.save(state, is_last=True)
        self.watch.enter("save", step)
        self.store.wait()
        if distributed.is_primary():
            self.store.remove_old()  # the last evaluation may have found a better one
        if self.hooks.reason:
            self.progress.message(f"stopped at step {step}: {self.hooks.reason}")
        self.call_hooks("on_end", step)
        if self._signum is not None:
            raise Interrupted(step, self._signum)

    def rescue(self) -> str:
        """Saves the newest state when the main thread hangs or a hook failed; returns a text. Raises as `save` does."""
        step, state = self._newest
        if state is not None and self._saved_step != step:
            self.save(state, is_last=True)
        self.store.wait()
        return f"step {step} is saved" if step else "no step was complete"

    @contextmanager
    def _write_errors(self, *, is_last: bool = False) -> Iterator[None]:
        """With `checkpoint.on_error="continue"`, shows an error of the disk instead, unless it `is_last`."""
        try:
            yield
        except HostError as error:
            if is_last or self.program.run.checkpoint.on_error == "stop" or distributed.count() > 1:
                raise
            self.progress.message(f"warning: {error}; the run goes on")

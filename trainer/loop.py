"""The training loop: batches in, state and metrics out."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer import config
from trainer.build import Parts, build
from trainer.checkpoint.manifest import check_manifest, make_manifest, versions
from trainer.checkpoint.preemption import Interrupted, Preemption
from trainer.checkpoint.store import Store
from trainer.data.source import load
from trainer.data.stream import prefetch, stream
from trainer.errors import UserError
from trainer.evaluate import divide, evaluate
from trainer.experiment import Metrics
from trainer.observe.metrics import MetricsLog
from trainer.observe.profile import Profile
from trainer.observe.progress import Progress
from trainer.observe.tables import label_table_text, placement_table_text
from trainer.parallel import processes
from trainer.state import TrainState
from trainer.workdir import Workdir

# Steps that the host runs ahead of the devices: enough that they never wait, few enough to bound the batches in flight.
_AHEAD = 2
# On one CPU device the runtime itself holds the host back, after 32 steps; waiting in Python too costs 2 to 5 % of a
# 4 ms step, because what wakes up takes a core from it.
_AHEAD_ON_CPU = 64


class DivergedError(Exception):
    """The loss or the gradient of a step is not finite; all processes find it at the same step."""

    agreed = True


def train(
    run: config.Run,
    workdir: str | PathLike[str],
    *,
    progress: Progress | None = None,
    profile: tuple[int, int] | None = None,
) -> TrainState:
    """Trains to `run.total_steps` in `workdir`, from the last checkpoint there if there is one.

    All processes of a run call it; the first writes and speaks.

    Args:
      run: the description, as a config file returns it.
      workdir: a folder that is new, empty, or holds this run.
      progress: where to show how it goes; on standard output of the first process by default.
      profile: the first and the last step, counted from 1, to write a profile of; none by default.

    Returns:
      The final state, saved and evaluated.

    Raises:
      UserError: the run cannot be started; nothing was written.
      DivergedError: a step gave NaN or Inf; the last checkpoint is from before it.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    folder, writes = Workdir(workdir), processes.is_writer()
    with processes.together("the settings"):
        run = config.resolve(run)
        known = [config.to_json(run), f"workdir {folder.path}", *(f"{name} {v}" for name, v in versions().items())]
    processes.check_same("the processes were not started alike", "\n".join(known))
    with processes.failing_at_once(), ExitStack() as stack:
        with processes.together("the run"):
            if writes:
                folder.check(run)
            parts = build(run)
            if profile is not None and profile[1] > run.total_steps:
                raise UserError(f"the profile is to end with step {profile[1]}, the run ends with {run.total_steps}")
        labels = label_table_text(parts.rows, run.optimizer)
        placements = placement_table_text(parts.parallel.placements.values(), parts.parallel.sizes)
        if progress is None:
            shown = None if writes else stack.enter_context(Path(os.devnull).open("w"))
            progress = Progress(run.total_steps, shown)
        progress.message(f"{labels}\n{placements}".rstrip())
        with processes.together("the workdir and the data"):
            if writes:
                stack.enter_context(folder.locked())
                if not folder.has_checkpoint():
                    folder.write(run, labels)  # first, so that a kill at any moment leaves a folder to launch again
            source, eval_source = (
                load(s, run.loading.in_memory_bytes) for s in (parts.train_source, parts.eval_source)
            )
        store = Store(folder.checkpoints, run.checkpoint)
        stack.callback(store.close)
        with processes.together("the checkpoint"):
            start = _start(parts, store, progress)
            if profile is not None and profile[0] <= start:
                raise UserError(f"the profile is to begin with step {profile[0]}, the run goes on after step {start}")
        processes.check_same("not all processes see the same files in the workdir", f"a run at step {start}")
        state = store.restore(parts.state, start) if start else parts.parallel.create(parts.make_state)
        log = None
        if writes:
            folder.write(run, labels)  # not before: a checkpoint that does not fit must leave everything as it is
            log = stack.enter_context(MetricsLog(folder.path, start))
        stack.callback(progress.end_line)
        stack.enter_context(_telling_what_is_kept(store))
        tracer = None
        if profile is not None:
            tracer = Profile(folder.path / "profile" / f"process_{processes.index()}", profile)
            stack.callback(tracer.close)
        # Until here there is nothing to save, and Ctrl-C may act at once.
        preemption = stack.enter_context(Preemption())
        # Last: what this process fails with alone must not wait for the others in what is closed above.
        stack.enter_context(processes.failing_at_once())
        batches = stream(
            source,
            seed=run.seed,
            batch_size=run.batch_size,
            start=start,
            stop=run.total_steps,
            rows=parts.parallel.local_rows(run.batch_size),
            threads=run.loading.threads,
            workers=run.loading.workers,
        )
        devices = parts.parallel.devices
        ahead = _AHEAD_ON_CPU if len(devices) == 1 and devices[0].platform == "cpu" else _AHEAD
        recorder = _Recorder(run, log, progress, start, ahead)
        for step, batch in enumerate(prefetch(batches, parts.parallel.put), start + 1):
            with nullcontext() if tracer is None else tracer.step(step):
                state, metrics = parts.train_step(state, batch)
            if tracer is not None:
                tracer.done(step, metrics)
            recorder.add(step, metrics)
            # Asked once: a signal that comes later in this round is dealt with in the next.
            signum = preemption.stops_after(step)
            last = step == run.total_steps
            evaluates = last or (run.evaluation.every_steps and step % run.evaluation.every_steps == 0)
            saves = last or signum is not None or step % run.checkpoint.every_steps == 0
            if not (evaluates or saves):
                continue
            evaluated = None
            if evaluates:
                evaluated = recorder.settle_evaluated(partial(evaluate, parts, state, eval_source))
            recorder.settle()
            if saves:
                _check_state(step, state)
                if log is not None:
                    log.sync()
                store.save(state, make_manifest(run, parts.rows, step), evaluated)
            if signum is not None:
                store.wait()
                # Only the processes that were sent a signal know which it was; SIGINT is the smallest.
                raise Interrupted(step, min(map(int, processes.gather("signal", str(int(signum))))))
        store.wait()
    return state


def describe(evaluated: dict[str, float]) -> str:
    """Evaluation results as one line: `test accuracy: 0.9833, test loss: 0.0712 (360 examples)`."""
    parts, examples = [], ""
    for name, value in evaluated.items():
        if name.endswith("/examples"):
            examples = f" ({value:,.0f} examples)"
        else:
            parts.append(f"{name.replace('/', ' ')}: {value:.4f}")
    return ", ".join(parts) + examples


@contextmanager
def _telling_what_is_kept(store: Store) -> Iterator[None]:
    try:
        yield
    except DivergedError as error:
        store.wait()
        steps = store.steps()
        kept = f"the last checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
        raise DivergedError(f"{error}; the run is stopped, {kept}") from None


def _start(parts: Parts, store: Store, progress: Progress) -> int:
    """The step to go on from, if the checkpoint there is one of this model; 0 if there is none."""
    steps = store.steps()
    if not steps:
        return 0
    manifest = store.manifest(steps[-1])
    for change in check_manifest(manifest, parts.rows):
        progress.message(f"note: {change} since the checkpoint; the numbers may differ in their last bits")
    done = " (finished: nothing is left to do)" if steps[-1] >= parts.run.total_steps else ""
    progress.message(f"resumed from step {steps[-1]}{done}")
    return steps[-1]


class _Recorder:
    """Fetches the metrics of a step after later ones are dispatched, checks every one and logs those that are due."""

    def __init__(self, run: config.Run, log: MetricsLog | None, progress: Progress, start: int, ahead: int) -> None:
        # Several processes must find at the same step that it diverged, so they do not look whether results are there.
        self._looks_ahead = processes.count() == 1
        self._run, self._log, self._progress, self._ahead = run, log, progress, ahead
        self._pending: deque[tuple[int, Metrics]] = deque()
        self._first = start + 1
        self._start_clock(start)
        self._began_step, self._began = start, self._since

    def _start_clock(self, step: int) -> None:
        self._since_step, self._since = step, time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched; deals with earlier ones that are there."""
        self._pending.append((step, metrics))
        while len(self._pending) > 1 and (
            len(self._pending) > self._ahead or (self._looks_ahead and _is_ready(self._pending[0][1]))
        ):
            self.settle(leave=len(self._pending) - 1)

    def settle(self, *, leave: int = 0) -> None:
        """Waits for all pending steps but the newest `leave`, and logs those that are due."""
        while len(self._pending) > leave:
            step, metrics = self._pending.popleft()
            self._write(step, self._values(step, metrics), {})

    def settle_evaluated(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Like `settle`, but the newest row is written with what `evaluate` returns, whose time is not training's."""
        self.settle(leave=1)
        step, metrics = self._pending.popleft()
        values = self._values(step, metrics)
        evaluated = evaluate()
        self._progress.message(f"step {step}: {describe(evaluated)}")
        self._write(step, values, evaluated)
        self._start_clock(step)
        return evaluated

    def _values(self, step: int, metrics: Metrics) -> dict[str, float]:
        """The values to log of a step, none if no row is due; shows them."""
        _check_finite(step, metrics)
        due = step % self._run.logging.every_steps == 0 or step == self._run.total_steps
        if step == self._first and not due:  # it was compiled, which says nothing about the speed of the others
            self._start_clock(step)
            self._began_step, self._began = step, self._since
        if not due:
            return {}
        values = {f"train/{name}": divide(*_floats(mean)) for name, mean in metrics.items()}
        self._seconds_a_step = (time.perf_counter() - self._since) / max(step - self._since_step, 1)
        self._start_clock(step)
        average = (self._since - self._began) / max(step - self._began_step, 1)  # evaluations and saves included
        left = average * (self._run.total_steps - step)
        self._progress.update(step, values["train/loss"], self._run.batch_size / self._seconds_a_step, left)
        return values

    def _write(self, step: int, values: dict[str, float], evaluated: dict[str, float]) -> None:
        timing = {"examples_per_second": self._run.batch_size / self._seconds_a_step} if values else {}
        if self._log is not None and (values or evaluated):
            self._log.write(step, values | evaluated, timing)


def _is_ready(metrics: Metrics) -> bool:
    loss: Any = metrics["loss"].total
    return loss.is_ready()  # and with it all results of the step


def _floats(mean: Any) -> tuple[float, float]:
    return float(np.asarray(mean.total)), float(np.asarray(mean.weight))


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))


def _check_state(step: int, state: TrainState) -> None:
    # Loss and gradient of this step may be finite, and the parameters that it led to not.
    if not _all_finite(state):
        raise DivergedError(f"the state after step {step} holds NaN or Inf")


def _check_finite(step: int, metrics: Metrics) -> None:
    # First wait, then read: reading an array that is not ready costs XLA:CPU a twentieth of a 4 ms step.
    metrics["loss"].total.block_until_ready()
    # The gradient too: a finite loss with a NaN gradient would put NaN into a checkpoint of this very step.
    for name in ("loss", "grad_norm"):
        value = float(np.asarray(metrics[name].total))
        if not math.isfinite(value):
            raise DivergedError(f"the {name} of step {step} is {value}")

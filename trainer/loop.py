"""The training loop: batches in, state and metrics out."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer import config
from trainer.build import Parts, build
from trainer.checkpoint.manifest import check_manifest, make_manifest
from trainer.checkpoint.preemption import Interrupted, Preemption
from trainer.checkpoint.store import Store
from trainer.data.source import load
from trainer.data.stream import prefetch, stream
from trainer.evaluate import divide, evaluate
from trainer.experiment import Metrics
from trainer.observe.metrics import MetricsLog
from trainer.observe.progress import Progress
from trainer.observe.tables import label_table_text
from trainer.state import TrainState
from trainer.workdir import Workdir

# Steps that the host runs ahead of the devices: enough that they never wait, few enough to bound the batches in flight.
_AHEAD = 2
# On one CPU device the runtime itself holds the host back, after 32 steps; waiting in Python too costs 2 to 5 % of a
# 4 ms step, because what wakes up takes a core from it.
_AHEAD_ON_CPU = 64


class DivergedError(Exception):
    """The loss or the gradient of a step is not finite."""


def train(run: config.Run, workdir: str | PathLike[str], *, progress: Progress | None = None) -> TrainState:
    """Trains to `run.total_steps` in `workdir`, from the last checkpoint there if there is one.

    Args:
      run: the description, as a config file returns it.
      workdir: a folder that is new, empty, or holds this run.
      progress: where to show how it goes; on standard output by default.

    Returns:
      The final state, saved and evaluated.

    Raises:
      UserError: the run cannot be started; nothing was written.
      DivergedError: a step gave NaN or Inf; the last checkpoint is from before it.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    run = config.resolve(run)
    folder = Workdir(workdir)
    folder.check(run)
    parts = build(run)
    labels = label_table_text(parts.rows, run.optimizer)
    progress = progress or Progress(run.total_steps)
    progress.message(labels.rstrip())
    with ExitStack() as stack:
        stack.enter_context(folder.locked())
        if not folder.has_checkpoint():
            folder.write(run, labels)  # first, so that a kill at any moment leaves a folder that can be launched again
        source, eval_source = (load(s, run.loading.in_memory_bytes) for s in (parts.train_source, parts.eval_source))
        store = Store(folder.checkpoints, run.checkpoint)
        stack.callback(store.close)
        state = _restore_or_create(parts, store, progress)
        folder.write(run, labels)  # not before: a checkpoint that does not fit must leave everything as it is
        start = int(state.step)
        log = stack.enter_context(MetricsLog(folder.path, start))
        stack.callback(progress.end_line)
        stack.enter_context(_telling_what_is_kept(store))
        # Last: until here there is nothing to save, and Ctrl-C may act at once.
        preemption = stack.enter_context(Preemption())
        batches = stream(
            source,
            seed=run.seed,
            batch_size=run.batch_size,
            start=start,
            stop=run.total_steps,
            threads=run.loading.threads,
        )
        devices = parts.parallel.devices
        ahead = _AHEAD_ON_CPU if len(devices) == 1 and devices[0].platform == "cpu" else _AHEAD
        recorder = _Recorder(run, log, progress, start, ahead)
        for step, batch in enumerate(prefetch(batches, parts.parallel.put), start + 1):
            state, metrics = parts.train_step(state, batch)
            recorder.add(step, metrics)
            # Read once: a signal that comes later in this round is dealt with in the next.
            signum = preemption.signum
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
                log.sync()
                store.save(state, make_manifest(run, parts.rows, step), evaluated)
            if signum is not None:
                store.wait()
                raise Interrupted(step, signum)
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


def _restore_or_create(parts: Parts, store: Store, progress: Progress) -> TrainState:
    steps = store.steps()
    if not steps:
        return parts.parallel.create(parts.make_state)
    manifest = store.manifest(steps[-1])
    for change in check_manifest(manifest, parts.rows):
        progress.message(f"note: {change} since the checkpoint; the numbers may differ in their last bits")
    state = store.restore(parts.state, steps[-1])
    done = " (finished: nothing is left to do)" if steps[-1] >= parts.run.total_steps else ""
    progress.message(f"resumed from step {steps[-1]}{done}")
    return state


class _Recorder:
    """Fetches the metrics of a step after later ones are dispatched, checks every one and logs those that are due."""

    def __init__(self, run: config.Run, log: MetricsLog, progress: Progress, start: int, ahead: int) -> None:
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
        while len(self._pending) > 1 and (len(self._pending) > self._ahead or _is_ready(self._pending[0][1])):
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
        if values or evaluated:
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

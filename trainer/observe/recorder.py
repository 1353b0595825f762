"""Moves metrics from the devices to the log, a few steps late, so that the devices need not wait for the host."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from trainer import config, distributed
from trainer.errors import DivergedError
from trainer.metrics import Metrics, numbers
from trainer.observe.log import MetricsLog, NoLog
from trainer.observe.progress import Progress

# Steps that the host dispatches ahead of the devices: enough to keep them busy, few enough to bound the memory of
# batches. On one CPU device XLA blocks the host after 32 steps, so the limit of 64 is never reached. A limit below 32
# would cost 2 to 5 % of a 4 ms step, because the thread that wakes up takes a core from it.
_IN_FLIGHT, _IN_FLIGHT_ON_ONE_CPU = 2, 64


class Recorder:
    """Reads the metrics of a step after later steps were dispatched, checks each, and writes those that are due.

    The first step of a launch is waited for.
    """

    def __init__(
        self,
        run: config.Run,
        start: int,
        is_logged: Callable[[int], bool],
        devices: Sequence[jax.Device],
        log: MetricsLog | NoLog,
        progress: Progress,
    ) -> None:
        """Begins after step `start`; a step has a row if `is_logged(step)`."""
        one_cpu = len(devices) == 1 and devices[0].platform == "cpu"
        self._run, self._is_logged, self._log, self._progress = run, is_logged, log, progress
        self.on_row: Callable[[int, dict[str, float]], None] = lambda step, values: None  # called after each row
        self._limit = _IN_FLIGHT_ON_ONE_CPU if one_cpu else _IN_FLIGHT
        # All processes must see a divergence at the same step. In a run of several, none polls whether a step is ready.
        self._polls = distributed.count() == 1
        self._in_flight: deque[tuple[int, Any]] = deque()  # steps and their metrics
        self._newest = self._clock_step = self._began_step = start
        self._first, self._seconds_per_step = start + 1, math.nan
        self._clock = self._began = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched."""
        queue, self._newest = self._in_flight, step
        queue.append((step, metrics))
        if step == self._first:  # after minutes of compilation the user sees at once that the run goes on
            self.flush()
        # A loss is ready with all other results of its step.
        while len(queue) > 1 and (len(queue) > self._limit or (self._polls and queue[0][1]["loss"].total.is_ready())):
            self.flush(keep=len(queue) - 1)

    def flush(self, *, keep: int = 0) -> int:
        """Waits for all steps but the newest `keep`, and writes the rows that are due. Returns the newest step."""
        while len(self._in_flight) > keep:
            step, metrics = self._in_flight.popleft()
            if values := self._finish_step(step, metrics):
                self._log.write(step, values, {"examples_per_second": self._run.batch_size / self._seconds_per_step})
                self.on_row(step, values)
        return self._newest

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of its block, an evaluation or a save, out of examples per second."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def _finish_step(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Waits for a step, checks it and shows its progress. Returns the values of its row, none if no row is due."""
        self._check(step, metrics)
        run = self._run
        if not self._is_logged(step):
            if step == self._first:  # its time includes compilation and says nothing about the others
                self._clock_step = self._began_step = step
                self._clock = self._began = time.perf_counter()
            return {}
        values = numbers(metrics, "train")
        now = time.perf_counter()
        self._seconds_per_step = (now - self._clock) / max(step - self._clock_step, 1)
        self._clock_step, self._clock = step, now
        # The remaining time counts evaluations and saves as well.
        remaining = (now - self._began) / max(step - self._began_step, 1) * (run.total_steps - step)
        self._progress.update(step, values["train/loss"], run.batch_size / self._seconds_per_step, remaining)
        return values

    def _check(self, step: int, metrics: Metrics) -> None:
        """Shows an update that was skipped; raises `DivergedError` if the settings end the run."""
        # Wait first, then read: reading an array that is not ready costs XLA:CPU a twentieth of a 4 ms step.
        metrics["loss"].total.block_until_ready()
        bad, numerics = _not_finite(metrics), self._run.numerics
        if bad is not None and numerics.on_nonfinite == "stop":
            raise DivergedError(f"the {bad[0]} of step {step} is {bad[1]}", step, can_be_skipped=True)
        if "skipped" not in metrics or not metrics["skipped"].compute():
            return
        if bad is not None:
            problem = f"the {bad[0]} is {bad[1]}"
        else:
            loss, limit = metrics["loss"].compute(), metrics["spike_limit"].compute()
            base = f"{numerics.spike_factor:g} × the {numerics.spike_quantile:g} quantile of the losses before"
            problem = f"the loss is {loss:.6g}, above {limit:.6g}, {base}"
        in_row = round(metrics["skipped_in_row"].compute())
        self._progress.message(f"step {step}: {problem}: the update is skipped ({in_row} in a row)")
        if in_row >= numerics.max_skips:
            raise DivergedError(f"step {step}: {problem}, and {in_row} updates in a row were skipped", step)


def _not_finite(metrics: Metrics) -> tuple[str, float] | None:
    """The loss or the gradient norm, if it is not finite."""
    # The gradient too: a finite loss with a NaN gradient would put NaN into a checkpoint of this very step.
    values = ((name, float(np.asarray(metrics[name].total))) for name in ("loss", "grad_norm"))
    return next(((name, value) for name, value in values if not math.isfinite(value)), None)


def evaluation_text(metrics: dict[str, float]) -> str:
    """The metrics as one line: `test accuracy: 0.9833, test loss: 0.0712 (360 examples)`."""
    examples = "".join(f" ({value:,.0f} examples)" for name, value in metrics.items() if name.endswith("/examples"))
    shown = [f"{k.replace('/', ' ')}: {v:.4f}" for k, v in metrics.items() if not k.endswith("/examples")]
    return ", ".join(shown) + examples

"""Moves metrics from the devices to the log, a few steps late, so that the devices need not wait for the host."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from trainer import config
from trainer.errors import DivergedError
from trainer.metrics import Metrics, numbers
from trainer.observe.log import MetricsLog, NoLog
from trainer.observe.progress import Progress

# Steps that the host dispatches ahead of the devices: enough to keep them busy, few enough to bound the memory of
# batches and the steps that a signal waits for.
_IN_FLIGHT = 2
# On one CPU device the host takes a core from XLA whenever it wakes up, which costs a tenth of a 4 ms step if it does
# so after each. There it sleeps until 2 steps are left, and then dispatches up to 16, for at most 0.5 s of computation.
_LIMIT_ON_ONE_CPU, _SECONDS_ON_ONE_CPU = 14, 0.5


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
        self._is_one_cpu = len(devices) == 1 and devices[0].platform == "cpu"
        self._run, self._is_logged, self._log, self._progress = run, is_logged, log, progress
        self.on_row: Callable[[int, dict[str, float]], None] = lambda step, values: None  # called after each row
        # How many more steps may be in flight. It does not depend on time where there are several processes, since all
        # must see a divergence at the same step.
        self._limit, self._woke = 0, time.perf_counter()
        self._in_flight: deque[tuple[int, Any]] = deque()  # steps and their metrics
        self._newest = self._clock_step = self._began_step = start
        self._first, self._seconds_per_step = start + 1, math.nan
        self._clock = self._began = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched."""
        self._newest = step
        self._in_flight.append((step, metrics))
        if step == self._first:  # after minutes of compilation the user sees at once that the run goes on
            self.flush()
        many = len(self._in_flight) - _IN_FLIGHT
        if many > 0 and (many > self._limit or self._is_logged(step - _IN_FLIGHT)):
            woke = self._woke
            self.flush(keep=_IN_FLIGHT)
            if self._is_one_cpu:
                self._limit = min(round(_SECONDS_ON_ONE_CPU * many / (self._woke - woke)), _LIMIT_ON_ONE_CPU)

    def flush(self, *, keep: int = 0) -> int:
        """Waits for all steps but the newest `keep`, and writes the rows that are due. Returns the newest step."""
        if len(self._in_flight) <= keep:
            return self._newest
        # Wait first, then read: reading an array that is not ready costs XLA:CPU a twentieth of a 4 ms step.
        last, metrics = self._in_flight[-1 - keep]
        metrics["loss"].total.block_until_ready()
        self._woke = time.perf_counter()
        while len(self._in_flight) > keep:
            step, metrics = self._in_flight.popleft()
            self._check(step, metrics)
            if self._is_logged(step):
                self._write_row(step, numbers(metrics, "train"), last)
            if step == self._first:  # its time includes compilation and says nothing about the others
                self._clock_step = self._began_step = step
                self._clock = self._began = self._woke
        return self._newest

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of its block, an evaluation or a save, out of examples per second."""
        began = time.perf_counter()
        yield
        paused = time.perf_counter() - began
        self._clock, self._woke = self._clock + paused, self._woke + paused

    def _write_row(self, step: int, values: dict[str, float], last: int) -> None:
        """Shows the progress of a step and writes its row. The computation has come to the step `last`."""
        run = self._run
        if last > self._clock_step:  # else an earlier row has measured the same steps
            self._seconds_per_step = (self._woke - self._clock) / (last - self._clock_step)
            self._clock_step, self._clock = last, self._woke
        # The remaining time counts evaluations and saves as well.
        remaining = (self._woke - self._began) / max(last - self._began_step, 1) * (run.total_steps - step)
        rate = run.batch_size / self._seconds_per_step
        self._progress.update(step, values["train/loss"], rate, remaining)
        self._log.write(step, values, {"examples_per_second": rate})
        self.on_row(step, values)

    def _check(self, step: int, metrics: Metrics) -> None:
        """Shows an update that was skipped; raises `DivergedError` if the settings end the run."""
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

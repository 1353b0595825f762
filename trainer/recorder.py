"""Metrics of steps on their way to the log: read once later steps were dispatched, checked, and written if due."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from trainer import distributed
from trainer.errors import DivergedError
from trainer.evaluation import evaluation_text
from trainer.metrics import Metrics
from trainer.observe.log import MetricsLog, NoLog
from trainer.observe.progress import Progress
from trainer.program import Program

# Steps that the host dispatches ahead of the devices: enough to keep them busy, few enough to bound the memory of
# batches. On one CPU device the runtime itself stops the host after 32 steps; waiting in Python too costs 2 to 5 % of a
# 4 ms step, because the thread that wakes up takes a core from it.
_IN_FLIGHT, _IN_FLIGHT_ON_ONE_CPU = 2, 64


class Recorder:
    """Reads the metrics of a step after later steps were dispatched, checks each, and writes those that are due."""

    def __init__(self, program: Program, start: int, log: MetricsLog | NoLog, progress: Progress) -> None:
        devices = program.strategy.devices
        one_cpu = len(devices) == 1 and devices[0].platform == "cpu"
        self._program, self._log, self._progress = program, log, progress
        self._limit = _IN_FLIGHT_ON_ONE_CPU if one_cpu else _IN_FLIGHT
        # All processes must find at the same step that a run diverged, so they cannot go by what is computed already.
        self._polls = distributed.count() == 1
        self._in_flight: deque[tuple[int, Metrics]] = deque()
        self._first = start + 1
        self._clock_step = self._began_step = start
        self._clock = self._began = time.perf_counter()
        self._seconds_per_step = math.nan

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched."""
        pending = self._in_flight
        pending.append((step, metrics))
        while len(pending) > 1 and (len(pending) > self._limit or (self._polls and _is_ready(pending[0][1]))):
            self.flush(keep=len(pending) - 1)

    def flush(self, *, keep: int = 0) -> None:
        """Waits for all steps in flight but the newest `keep`, and writes the rows that are due."""
        while len(self._in_flight) > keep:
            step, metrics = self._in_flight.popleft()
            self._write(step, self._read(step, metrics), {})

    def flush_with(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Like `flush`, but the newest row also has what `evaluate` returns."""
        self.flush(keep=1)
        step, metrics = self._in_flight.popleft()
        values = self._read(step, metrics)
        with self.paused():
            evaluated = evaluate()
        self._progress.message(f"step {step}: {evaluation_text(evaluated)}")
        self._write(step, values, evaluated)
        return evaluated

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations and saves do not count in examples per second."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def _read(self, step: int, metrics: Metrics) -> dict[str, float]:
        """The values of a step's row, none if no row is due; shows them."""
        _check_finite(step, metrics)
        run = self._program.run
        if not self._program.due(step).log:
            if step == self._first:  # it was compiled, which says nothing about the speed of the others
                self._clock_step = self._began_step = step
                self._clock = self._began = time.perf_counter()
            return {}
        values = {f"train/{name}": mean.compute() for name, mean in metrics.items()}
        now = time.perf_counter()
        self._seconds_per_step = (now - self._clock) / max(step - self._clock_step, 1)
        self._clock_step, self._clock = step, now
        # The remaining time counts evaluations and saves as well.
        remaining = (now - self._began) / max(step - self._began_step, 1) * (run.total_steps - step)
        self._progress.update(step, values["train/loss"], run.batch_size / self._seconds_per_step, remaining)
        return values

    def _write(self, step: int, values: dict[str, float], evaluated: dict[str, float]) -> None:
        if values or evaluated:
            rate = {"examples_per_second": self._program.run.batch_size / self._seconds_per_step} if values else {}
            self._log.write(step, values | evaluated, rate)


def _is_ready(metrics: Metrics) -> bool:
    loss: Any = metrics["loss"].total
    return loss.is_ready()  # and with it all results of the step


def _check_finite(step: int, metrics: Metrics) -> None:
    # Wait first, then read: reading an array that is not ready costs XLA:CPU a twentieth of a 4 ms step.
    metrics["loss"].total.block_until_ready()
    # The gradient too: a finite loss with a NaN gradient would put NaN into a checkpoint of this very step.
    for name in ("loss", "grad_norm"):
        value = float(np.asarray(metrics[name].total))
        if not math.isfinite(value):
            raise DivergedError(f"the {name} of step {step} is {value}")

"""Metrics from the device to the disk: JSON lines, and TensorBoard event files that are made from them.

`metrics.jsonl` is a function of config and seed, so that `cmp` can compare two runs; `timing.jsonl` has measured times.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from trainer import config, distributed
from trainer.errors import DivergedError, UserError
from trainer.metrics import Metrics
from trainer.observe.progress import Progress
from trainer.workdir import Folder, Mirror

# Steps that the host dispatches ahead of the devices: enough to keep them busy, few enough to bound the memory of
# batches. On one CPU device the runtime itself stops the host after 32 steps; waiting in Python too costs 2 to 5 % of a
# 4 ms step, because the thread that wakes up takes a core from it.
_IN_FLIGHT, _IN_FLIGHT_ON_ONE_CPU = 2, 64

_FILES = ("metrics.jsonl", "timing.jsonl")


class MetricsLog:
    """The metrics files of a workdir, which hold one row for each logged step.

    Files in a bucket cannot be appended to: there they are copies, renewed by `sync` and `close`.
    """

    def __init__(self, workdir: Folder, after_step: int) -> None:
        """Continues the files after `after_step`, and drops later rows, whose steps a killed run logged."""
        self._mirror = Mirror(workdir)
        folder = self._mirror.folder
        for name in _FILES:
            if folder != workdir and (workdir / name).exists():
                (folder / name).write_text((workdir / name).read_text())
            _truncate(folder / name, after_step)
        for old in (workdir / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()
        self._files = [(folder / name).open("a") for name in _FILES]
        self._events = SummaryWriter(str(folder / "tensorboard"))
        rows, timings = (list(read_rows(folder / name)) for name in _FILES)
        times = {row["step"]: row["time"] for row in timings}
        for row in (*rows, *timings):
            self._add_events(row, times.get(row["step"]))

    def write(self, step: int, values: dict[str, float], timing: dict[str, float]) -> None:
        """Adds the row of a step to each file; JSON has no NaN, so a value that is not finite is null there."""
        now = time.time()
        for file, row in zip(self._files, (values, {"time": now, **timing}), strict=True):
            line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in row.items()}}
            file.write(json.dumps(line) + "\n")
            file.flush()  # a killed process loses no row
            self._add_events(line, now)

    def _add_events(self, row: dict[str, Any], seconds: float | None) -> None:
        for name, value in row.items():
            if name not in ("step", "time") and value is not None:
                self._events.add_scalar(name, value, row["step"], walltime=seconds)

    def sync(self) -> None:
        """Puts all rows on disk, so that no checkpoint saved afterwards outlives its metrics."""
        for file in self._files:
            os.fsync(file.fileno())
        self._events.flush()
        self._mirror.push()

    def close(self) -> None:
        """Writes out and closes every file."""
        for file in (*self._files, self._events):
            file.close()
        self._mirror.close()


class NoLog:
    """The log of a process that writes no metrics."""

    def write(self, *_: object) -> None:
        """Writes nothing."""

    sync = close = write


def read_rows(file: Folder) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; skips an incomplete last line, and raises `UserError` for any other bad line."""
    lines = file.read_text().splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{file}, line {number}, is not valid JSON: {error}") from error
            return  # a killed run left it
        if not isinstance(row, dict) or "step" not in row:
            raise UserError(f"{file}, line {number}, is not a row of metrics")
        yield row


def _truncate(file: Path, after_step: int) -> None:
    kept = [json.dumps(row) + "\n" for row in read_rows(file) if row["step"] <= after_step]
    replacement = file.with_suffix(".tmp")
    with replacement.open("w") as output:
        output.writelines(kept)
        output.flush()
        os.fsync(output.fileno())
    replacement.replace(file)


class Recorder:
    """Reads the metrics of a step after later steps were dispatched, checks each, and writes those that are due."""

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
        self._limit = _IN_FLIGHT_ON_ONE_CPU if one_cpu else _IN_FLIGHT
        # All processes must see a divergence at the same step, so several do not poll which steps are computed.
        self._polls = distributed.count() == 1
        self._in_flight: deque[tuple[int, Any]] = deque()  # steps and their metrics
        self._newest = self._clock_step = self._began_step = start
        self._first, self._seconds_per_step = start + 1, math.nan
        self._clock = self._began = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched."""
        queue, self._newest = self._in_flight, step
        queue.append((step, metrics))
        # A loss is ready with all other results of its step.
        while len(queue) > 1 and (len(queue) > self._limit or (self._polls and queue[0][1]["loss"].total.is_ready())):
            self.flush(keep=len(queue) - 1)

    def flush(self, *, keep: int = 0) -> int:
        """Waits for all steps but the newest `keep`, and writes the rows that are due. Returns the newest step."""
        while len(self._in_flight) > keep:
            step, metrics = self._in_flight.popleft()
            self._write(step, self._read(step, metrics), {})
        return self._newest

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
        """Leaves the time of its block, an evaluation or a save, out of examples per second."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def _read(self, step: int, metrics: Metrics) -> dict[str, float]:
        """The values of a step's row, none if no row is due; shows them."""
        _check_finite(step, metrics)
        run = self._run
        if not self._is_logged(step):
            if step == self._first:  # its time includes compilation and says nothing about the others
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
            rate = {"examples_per_second": self._run.batch_size / self._seconds_per_step} if values else {}
            self._log.write(step, values | evaluated, rate)


def _check_finite(step: int, metrics: Metrics) -> None:
    # Wait first, then read: reading an array that is not ready costs XLA:CPU a twentieth of a 4 ms step.
    metrics["loss"].total.block_until_ready()
    # The gradient too: a finite loss with a NaN gradient would put NaN into a checkpoint of this very step.
    for name in ("loss", "grad_norm"):
        value = float(np.asarray(metrics[name].total))
        if not math.isfinite(value):
            raise DivergedError(f"the {name} of step {step} is {value}")


def evaluation_text(metrics: dict[str, float]) -> str:
    """The metrics as one line: `test accuracy: 0.9833, test loss: 0.0712 (360 examples)`."""
    examples = "".join(f" ({value:,.0f} examples)" for name, value in metrics.items() if name.endswith("/examples"))
    shown = [f"{k.replace('/', ' ')}: {v:.4f}" for k, v in metrics.items() if not k.endswith("/examples")]
    return ", ".join(shown) + examples

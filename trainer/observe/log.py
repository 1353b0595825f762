"""Metrics from the device to the disk: JSON lines, and TensorBoard event files that are made from them.

`metrics.jsonl` is a function of config and seed, so that `cmp` can compare two runs; `timing.jsonl` has measured times.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from trainer.errors import UserError
from trainer.files import Folder
from trainer.workdir import Mirror

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

"""Metrics on disk: JSON lines, which are the truth, and TensorBoard event files, which are made from them.

`metrics.jsonl` holds only what follows from config and seed, so that two runs can be compared with `cmp`; the clock's
part is in `timing.jsonl`.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from tensorboardX import SummaryWriter

from trainer.errors import UserError
from trainer.workdir import Folder, Mirror

_FILES = ("metrics.jsonl", "timing.jsonl")


class MetricsLog:
    """The metrics files of a workdir, continued after a given step: each step stands in them once.

    Nothing can be appended in a bucket: there the files are copies, renewed by `sync` and `close`.
    """

    def __init__(self, workdir: Folder, after_step: int) -> None:
        """Drops every row beyond `after_step`: steps that a killed run logged and that will be run again."""
        self._mirror = Mirror(workdir)
        folder = self._mirror.folder
        if folder != workdir:
            for name in _FILES:
                if (workdir / name).exists():
                    (folder / name).write_text((workdir / name).read_text())
            for old in (workdir / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()
        rows, timings = (folder / name for name in _FILES)
        _truncate(rows, after_step)
        _truncate(timings, after_step)
        self._rows, self._timings = rows.open("a"), timings.open("a")
        events = folder / "tensorboard"
        for old in events.glob("events.out.tfevents.*"):
            old.unlink()
        self._events = SummaryWriter(str(events))
        times = {row["step"]: row["time"] for row in read_rows(timings)}
        for file in (rows, timings):
            for row in read_rows(file):
                self._add_events(row, times.get(row["step"]))

    def write(self, step: int, values: dict[str, float], timing: dict[str, float]) -> None:
        """Adds the one row of a step to each file; a value that is not finite is null there, since JSON has no NaN."""
        now = time.time()
        for file, row in ((self._rows, values), (self._timings, {"time": now, **timing})):
            line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in row.items()}}
            file.write(json.dumps(line) + "\n")
            file.flush()  # a killed process loses nothing that was written
            self._add_events(line, now)

    def _add_events(self, row: dict[str, Any], seconds: float | None) -> None:
        for name, value in row.items():
            if name not in ("step", "time") and value is not None:
                self._events.add_scalar(name, value, row["step"], walltime=seconds)

    def sync(self) -> None:
        """Puts all rows on disk, so that a checkpoint saved afterwards never outlives its metrics."""
        for file in (self._rows, self._timings):
            os.fsync(file.fileno())
        self._events.flush()
        self._mirror.push()

    def close(self) -> None:
        """Writes out and closes every file."""
        self._rows.close()
        self._timings.close()
        self._events.close()
        self._mirror.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoLog:
    """The log of a process that writes no metrics."""

    def write(self, step: int, values: dict[str, float], timing: dict[str, float]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""


def read_rows(file: Folder) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that a kill cut short is passed over.

    Raises:
      UserError: a line before the last is no JSON.
    """
    if not file.exists():
        return
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{file}, line {number}, is no JSON: {error}") from error
            return
        if not isinstance(row, dict) or "step" not in row:
            raise UserError(f"{file}, line {number}, is no row of metrics")
        yield row


def _truncate(file: Path, after_step: int) -> None:
    kept = [row for row in read_rows(file) if row["step"] <= after_step]
    if not file.exists():
        return
    replacement = file.with_suffix(".tmp")
    with replacement.open("w") as output:
        output.writelines(json.dumps(row) + "\n" for row in kept)
        output.flush()
        os.fsync(output.fileno())
    replacement.replace(file)

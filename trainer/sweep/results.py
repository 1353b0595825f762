"""Results of the cells, in the folder `.sweep` of each workdir: metrics by step, and how the last launch failed."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer import config
from trainer.errors import UserError, did_you_mean
from trainer.files import DamagedError, host_error, read_json, write_text
from trainer.observe.rows import read_rows
from trainer.sweep.cells import Cell

OWN = ".sweep"  # the folder of the sweep in a cell's workdir
LOG = "log.txt"  # in the workdir: what the cell's processes printed


class Failure(NamedTuple):
    """How a launch of a cell failed."""

    code: int  # the exit code of its process, 128 + N if signal N killed it
    message: str  # its last line of error
    diverged: bool  # whether it ended because of NaN or Inf, and so would again
    launch: str  # tells launches apart

    @property
    def is_of_the_cell(self) -> bool:
        """Whether the cell failed by itself, and not its machine."""
        return self.code in (1, 2)


@dataclasses.dataclass
class Results:
    """The results of the cells in a folder, compared by a metric. They are read anew at each call.

    Metrics that are written here stay true when a cell goes on after a rung, although a kill may cause the rows of
    `metrics.jsonl` to be written again.
    """

    folder: Path
    metric: str
    mode: str  # max or min

    def workdir(self, cell: Cell) -> Path:
        """The folder of a cell."""
        return self.folder / cell.name

    def metrics(self, cell: Cell, step: int) -> Mapping[str, Any] | None:
        """The evaluations of a cell after a step to which it was trained; None if it is not there yet."""
        return self._read(cell, f"step-{step}.json")

    def failure(self, cell: Cell) -> Failure | None:
        """How the last launch of a cell failed; None if it did not."""
        found = self._read(cell, "failure.json")
        try:
            return None if found is None else Failure(**found)
        except TypeError:  # of another version: the cell is launched again
            return None

    def _read(self, cell: Cell, name: str) -> Any:
        try:
            return read_json(self.workdir(cell) / OWN / name)
        except (FileNotFoundError, DamagedError):  # the cell is launched again, which finds what it has done
            return None

    def write_done(self, cell: Cell, step: int) -> None:
        """Keeps the evaluations of a cell that was just trained to a step; raises `HostError`."""
        rows = read_rows(self.workdir(cell) / "metrics.jsonl")
        row = next((row for row in rows if row["step"] == step), {})
        evaluated = {k: v for k, v in row.items() if k != "step" and not k.startswith("train/")}
        self._write(cell, f"step-{step}.json", evaluated)
        (self.workdir(cell) / OWN / "failure.json").unlink(missing_ok=True)

    def write_failure(self, cell: Cell, failure: Failure) -> None:
        """Keeps how a launch failed; raises `HostError`."""
        self._write(cell, "failure.json", failure._asdict())

    def _write(self, cell: Cell, name: str, value: Mapping[str, Any]) -> None:
        file = self.workdir(cell) / OWN / name
        try:
            write_text(file, json.dumps(value) + "\n")
        except OSError as error:
            raise host_error(file, error) from error

    def value(self, cell: Cell, step: int) -> float | None:
        """The metric of a cell after a step; NaN if the cell failed by itself before; None if it is not there yet.

        Raises `UserError`, with the nearest name, if the cell was evaluated without the metric.
        """
        if (found := self.metrics(cell, step)) is None:
            failure = self.failure(cell)
            return math.nan if failure is not None and failure.is_of_the_cell else None
        if not found:
            raise UserError(f"{self.workdir(cell)} was not evaluated at step {step}; choose another --workdir")
        if self.metric not in found:
            raise UserError(f"metric {self.metric!r} is not evaluated{did_you_mean(self.metric, found)}")
        number = found[self.metric]
        return math.nan if number is None else float(number)

    def curve(self, cell: Cell) -> list[tuple[int, float]]:
        """(step, metric) at each evaluation of a cell."""
        rows = read_rows(self.workdir(cell) / "metrics.jsonl")
        return [(row["step"], row[self.metric]) for row in rows if row.get(self.metric) is not None]


def metric_and_mode(run: config.Run, metric: str | None, mode: str | None) -> tuple[str, str]:
    """The metric by which cells are compared, and whether the best is the largest or the smallest.

    Raises `UserError` if the run has no such evaluation, or if the mode is not known.
    """
    best, names = run.checkpoint.best_metric, config.evaluations(run)
    metric = metric or best or f"{run.evaluation.split}/loss"
    name, _, rest = metric.partition("/")
    if name not in names or not rest:
        known = [f"{name}/{rest or 'loss'}" for name in names]
        raise UserError(f"metric {metric!r} is of no evaluation of the run{did_you_mean(metric, known)}")
    if mode is None and metric == best:
        mode = run.checkpoint.best_mode
    if mode is None and rest == "loss":
        mode = "min"
    if mode is None:
        raise UserError(f"is more {metric} better? give --mode=max, or else --mode=min")
    if mode not in ("max", "min"):
        raise UserError(f"--mode is {mode!r}{did_you_mean(mode, ('max', 'min'))}")
    return metric, mode


def exit_code(failures: Sequence[Failure]) -> int:
    """The exit code of a sweep: 0 if no cell failed, that of the cells that failed if they agree, else 1."""
    codes = {failure.code for failure in failures}
    return codes.pop() if len(codes) == 1 else min(len(codes), 1)

"""The trial of `train --dry-run`: 3 steps, an evaluation of two batches, a save and a restore; nothing is kept."""

import copy
import dataclasses
import io
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainer import distributed
from trainer.config import Run, evaluations_in_steps, schedules_of
from trainer.data import ArraySource, BatchSource, take
from trainer.data.memory import check_reads_are_equal, fits_in_memory
from trainer.data.mixture import Mixture
from trainer.errors import UserError
from trainer.init_from.sources import open_variables
from trainer.loop import agreed_program, train_program
from trainer.observe import table
from trainer.observe.progress import Progress
from trainer.program import EvalProgram


class _SilentProgress(Progress):
    """Keeps the losses and the latest message instead of showing them, with the times at which they came."""

    losses: tuple[str, ...] = ()
    text, trained_at, evaluated_at = "", 0.0, 0.0

    def update(self, step: int, loss: float, examples_per_second: float, seconds_left: float) -> None:
        self.losses, self.trained_at = (*self.losses, f"{loss:.4f}"), time.perf_counter()

    def message(self, text: str) -> None:
        self.text, self.evaluated_at = text, time.perf_counter()


def dry_run(run: Run) -> str:
    """A table of results and times from every part of a resolved run, tried in a temporary workdir."""
    if distributed.count() > 1:
        raise UserError("--dry-run tries a run in one process; rehearse tries several")
    trial, times = _SilentProgress(3, io.StringIO()), [time.perf_counter()]
    with tempfile.TemporaryDirectory(prefix="trainer-") as folder:
        program = agreed_program(_first_steps(run), folder)
        evaluations_in_steps(run, len(program.train_source))  # refuses what the run's own cadences contradict
        examples = len(program.train_source), len(program.main_evaluation.source)
        for source in (program.train_source, *(one.source for one in program.evaluations.values())):
            _check_reads(source, run.loading.in_memory_bytes)
        program = dataclasses.replace(program, evaluations={k: _cut(one) for k, one in program.evaluations.items()})
        times.append(time.perf_counter())
        saved = train_program(program, folder, trial, handle_signals=False)
        times += [trial.trained_at, trial.evaluated_at, time.perf_counter()]
        evaluation = trial.text.partition(": ")[2]
        size = sum(file.stat().st_size for file in Path(folder, "checkpoints").rglob("*") if file.is_file())
        restored = train_program(program, folder, trial, handle_signals=False)
        times.append(time.perf_counter())
    for (path, a), b in zip(jax.tree.leaves_with_path(saved), jax.tree.leaves(restored), strict=True):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            raise UserError(f"{jax.tree_util.keystr(path)} was not restored as it was saved")
    results = {
        "model and data": "{:,} examples to train on, {:,} to evaluate on".format(*examples),
        f"{len(trial.losses)} of {run.total_steps:,} steps": f"loss {', '.join(trial.losses)}; the run's own schedules",
        "evaluation": evaluation,
        "save": f"{size:,} bytes",
        "restore": "every array equals the saved one, bit for bit",
    }
    seconds = [f"{end - start:.1f}" for start, end in itertools.pairwise(times)]
    rows = [(*result, taken) for result, taken in zip(results.items(), seconds, strict=True)]
    return table(("tried", "result", "seconds"), rows, right=("seconds",)) + "nothing of this dry run is kept\n"


def _check_reads(source: Any, limit_bytes: int) -> None:
    """Raises the error with which the run would end if it loads the source into memory and the source is random."""
    if not fits_in_memory(source, limit_bytes):
        return
    for part in [part for part, _ in source.parts.values()] if isinstance(source, Mixture) else [source]:
        if not isinstance(part, BatchSource):
            check_reads_are_equal(part)


def _cut(evaluation: EvalProgram) -> EvalProgram:
    """The evaluation of two batches."""
    source, size = evaluation.source, evaluation.spec["mask"].shape[0]
    return dataclasses.replace(evaluation, source=ArraySource(take(source, np.arange(min(2 * size, len(source))))))


def _first_steps(run: Run) -> Run:
    """A copy of a resolved run that ends after 3 steps; these equal the first 3 steps of the run itself."""
    short, start = copy.deepcopy(run), 0
    if run.init_from is not None and run.init_from.optimizer_state == "carried":
        start = open_variables(run.init_from.source, raw=True).step or 0  # the run goes on after this step
    short.total_steps = min(start + 3, run.total_steps)
    short.checkpoint.every_steps = short.total_steps
    for evaluation in (short.evaluation, *short.evaluations.values()):
        evaluation.every_steps, evaluation.every = short.total_steps, None
    short.logging.every_steps, short.loading.in_memory_bytes = 1, 0  # so that only these steps' examples are read
    for schedule in schedules_of(short.optimizer).values():
        schedule.run_steps = schedule.run_steps or run.total_steps
    return short

"""Launches that share their programs: a run that is launched again is not traced and compiled again."""

from io import StringIO
from pathlib import Path
from typing import Any

from trainer import config
from trainer.loop import train_program
from trainer.observe.progress import Progress
from trainer.program import Program, build_program
from trainer.state import TrainState

_PROGRAMS: dict[tuple[type, str], Program] = {}


def program_of(run: config.Run) -> Program:
    """The program of a run; that of an earlier call if all settings are equal."""
    run = config.resolve(run)
    key = type(run.experiment), config.to_json(run)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = build_program(run)
    return _PROGRAMS[key]


def launch(run: config.Run, workdir: Path, progress: Progress | None = None, **options: Any) -> TrainState:
    """`trainer.train` without output, but for the program."""
    return train_program(program_of(run), workdir, progress or Progress(run.total_steps, StringIO()), **options)


class StopsAt:
    """A hook that ends a run after a step, which is then saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event):
        if event.step == self.step:
            event.stop("halfway")

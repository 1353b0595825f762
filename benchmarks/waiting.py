"""The share of a training that is spent waiting for data; `python -m benchmarks.data --wait`."""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.reading import BATCH, WORKERS, on_disk, stored
from experiments.image_classification import ImageClassification
from trainer import config
from trainer.commands.arguments import load_config
from trainer.data import ArraySource
from trainer.experiment import RandomAccessSource
from trainer.loop import train
from trainer.observe.phase_log import NoPhaseLog

WARM = 20  # steps before the measurement: compilation, and buffers that fill up


@dataclasses.dataclass
class BenchmarkTask(ImageClassification):
    """The small CNN on the images of `benchmarks.reading`, from memory or from disk."""

    folder: str = ""  # of the TFDS data set; "" for memory

    def source(self, split: str) -> RandomAccessSource:
        """The same examples for every split."""
        del split
        return on_disk("images", self.folder) if self.folder else ArraySource(stored("images"))


class Phases(NoPhaseLog):
    """The seconds that the training loop spends in each phase after the step `WARM`."""

    def __init__(self) -> None:
        self.seconds = {"data": 0.0, "step": 0.0}
        self._name, self._began = "", 0.0

    def phase(self, name: str, step: int) -> None:
        """Adds the time since the last call to the phase that it began."""
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._began
        self._name, self._began = name if step > WARM else "", now


def measure(run: config.Run, steps: int) -> dict[str, float]:
    """The share of waiting in the time of the steps, and the steps a second, of the first `steps` of a run."""
    run = config.resolve(run)  # fixes the schedules
    run.total_steps = steps
    run.evaluation.every_steps = run.checkpoint.every_steps = 10**9
    phases = Phases()
    with tempfile.TemporaryDirectory() as folder:
        train(run, Path(folder) / "run", verbose=False, trace=phases)
    waiting, seconds = phases.seconds["data"], phases.seconds["data"] + phases.seconds["step"]
    return {"share": waiting / seconds, "rate": (steps - WARM) / seconds}


def task_run(folder: str, **loading: Any) -> config.Run:
    """A run of the CNN, which reads as it is told."""
    return config.Run(BenchmarkTask(folder=folder), total_steps=1, batch_size=BATCH, loading=config.Loading(**loading))


def wait_table(options: argparse.Namespace) -> None:
    """The share of a run's time spent waiting for data: of a small CNN from memory and from disk, or of a config.

    Waiting is from where the loop asks for a batch to where the batch is on the devices. On one CPU, this includes the
    reading of a batch from memory. Compilation, evaluations and saves do not count.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "memory": task_run(""),
            "ArrayRecord, threads": task_run(folder, in_memory_bytes=0),
            f"ArrayRecord, {WORKERS} workers": task_run(folder, in_memory_bytes=0, workers=WORKERS),
        }
        for name, run in {options.config: load_config(options.config)}.items() if options.config else runs.items():
            shares = [measure(run, options.wait_steps) for _ in range(min(options.rounds, 3))]
            found = " ".join(f"{one['share']:.2%}" for one in shares)
            print(f"waiting for data, {name}: {found} of the time, {max(one['rate'] for one in shares):.1f} steps/s")

"""Cost of the harness: `trainer train` against a bare jitted loop over the same step and the same batches.

    python -m benchmarks.loop
    python -m benchmarks.loop --hook        # with a hook that is called after every step and does nothing

Both loops are measured in turn, in rounds, in one process. The bare loop has every batch ready in host memory, logs
nothing, checks nothing and waits once, at its end. The trainer's time is that between the first and the last row of
metrics of a whole `train`, logging every 50 steps: it makes its batches, checks every loss and writes its files.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import jax
import numpy as np

from benchmarks import header
from experiments.image_classification import ImageClassification
from trainer import config
from trainer.data import ArraySource
from trainer.data.stream import train_batches
from trainer.experiment import RandomAccessSource
from trainer.hooks import Event
from trainer.loop import train
from trainer.observe.progress import Progress
from trainer.program import build_program

EVERY = 50


class Digitlike(ImageClassification):
    """The digits' shapes, from memory."""

    def source(self, split: str) -> RandomAccessSource:
        """Random images; the time of a step does not depend on what they show."""
        rng = np.random.default_rng(len(split))
        images = rng.integers(0, 17, (1438, 8, 8, 1)).astype(np.uint8)
        return ArraySource({"image": images, "label": rng.integers(0, 10, len(images)).astype(np.int32)})


class Idle:
    """A hook that does nothing."""

    def on_step(self, event: Event) -> None:
        """Nothing."""


class Clock(Progress):
    """Notes when each row of metrics was there."""

    def __init__(self, total_steps: int) -> None:
        super().__init__(total_steps, StringIO())
        self.times: dict[int, float] = {}

    def update(self, step: int, loss: float, examples_per_second: float, seconds_left: float) -> None:
        """Notes the time of `step`."""
        self.times[step] = time.perf_counter()


def trainer_loop(run: config.Run, hooks: Sequence[object]) -> float:
    """Seconds a step inside of `train`, between the first and the last row."""
    clock = Clock(run.total_steps)
    with tempfile.TemporaryDirectory() as folder:
        train(run, Path(folder) / "run", progress=clock, hooks=hooks)
    first, last = min(clock.times), max(clock.times)
    return (clock.times[last] - clock.times[first]) / (last - first)


def bare_loop(run: config.Run) -> float:
    """Seconds a step of a loop that does nothing else."""
    program = build_program(config.resolve(run))
    batches = list(
        train_batches(program.train_source, seed=run.seed, batch_size=run.batch_size, start=0, stop=run.total_steps)
    )
    state, jitted = program.init(), program.train_step.jitted
    for batch in batches[:EVERY]:
        state, _ = jitted(state, batch)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for batch in batches[EVERY:]:
        state, _ = jitted(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / (len(batches) - EVERY)


def main() -> None:
    """Prints the milliseconds a step of each round and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--hook", action="store_true")
    options = parser.parse_args()
    hooks = [Idle()] if options.hook else []
    run = config.Run(
        experiment=Digitlike(max_value=16.0),
        total_steps=options.steps,
        batch_size=options.batch_size,
        logging=config.Logging(every_steps=EVERY),
        checkpoint=config.Checkpoint(every_steps=10**9),
    )
    print(header())
    bare, ours = [], []
    for number in range(1, options.rounds + 1):
        bare.append(bare_loop(run))
        ours.append(trainer_loop(run, hooks))
        print(f"round {number}: bare {bare[-1] * 1e3:.3f} ms, trainer {ours[-1] * 1e3:.3f} ms a step")
    ratios = sorted(t / b for t, b in zip(ours, bare, strict=True))
    print(f"trainer / bare: {statistics.median(ratios):.3f} (median of the rounds' ratios; {ratios[0]:.3f} to", end=" ")
    print(f"{ratios[-1]:.3f}), {statistics.median(ours) / statistics.median(bare):.3f} of the medians", end=", ")
    print(f"{min(ours) / min(bare):.3f} of the minima (bar: 1.02)")


if __name__ == "__main__":
    main()

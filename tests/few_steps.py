"""A few steps of an experiment under any strategy, for tests that compare strategies."""

import dataclasses
from typing import Any

import jax
import numpy as np

from tests.tasks import make_run
from trainer import config
from trainer.data.stream import train_batches
from trainer.program import build_program

STEPS, BATCH = 3, 8
# Every strategy on four devices.
STRATEGIES = ("data", "zero1", "fsdp", "tensor", "zero1_tensor", "fsdp_tensor", "pmap")


@dataclasses.dataclass
class Outcome:
    """The results of the steps, on the host."""

    losses: np.ndarray  # of each step
    numbers: Any  # parameters and collections after the last step
    axes: set[str]  # the axes of the mesh over which a parameter is sharded


def few_steps(experiment: Any, strategy: str, devices: int, **settings: Any) -> Outcome:
    """Steps of SGD, whose update is as exact as the gradient; AdaBelief's first divide by a rounding error."""
    optimizer = config.Optimizer(name="sgd", schedule=config.Schedule(peak=0.05), **settings)
    parallel = config.Parallel(strategy, devices=devices)
    run = make_run(STEPS, experiment=experiment, batch_size=BATCH, optimizer=optimizer, parallel=parallel)
    program = build_program(config.resolve(run))
    state, losses = program.init(), []
    for batch in train_batches(program.train_source, seed=0, batch_size=BATCH, start=0, stop=STEPS):
        state, metrics = program.train_step(state, program.strategy.shard_batch(batch))
        losses.append(float(metrics["loss"].total / metrics["loss"].weight))
    axes = {axis for spec in program.strategy.specs.values() for axis in spec.axes if axis}
    return Outcome(np.array(losses), jax.device_get((state.params, state.collections)), axes)


def assert_same(found: Outcome, expected: Outcome) -> None:
    """To float32 rounding."""
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()),
        found.numbers,
        expected.numbers,
    )

"""A ResNet of two stages and every augmentation learn the same on one device and on four, under jit and pmap."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from experiments.augmentation import Augmentation
from experiments.image_classification import ImageClassification
from trainer import config
from trainer.data import ArraySource
from trainer.data.stream import train_batches
from trainer.program import build_program

STEPS, BATCH = 3, 16


@dataclasses.dataclass
class Noise(ImageClassification):
    """Images of random pixels."""

    def source(self, split: str) -> ArraySource:
        rng = np.random.default_rng(len(split))
        images = rng.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
        return ArraySource({"image": images, "label": rng.integers(0, 10, 40).astype(np.int32)})


@functools.cache
def outcome(strategy: str, devices: int) -> tuple[np.ndarray, Any]:
    """The losses of the steps; parameters and batch statistics after the last."""
    augmentation = Augmentation(random_resized_crop=0.3, crop=2, flip=0.5, cutout=5, mixup=0.4, label_smoothing=0.1)
    experiment = Noise(model="resnet18", widths=(8, 8, 8, 8), blocks=(1, 1, 0, 0), mean=(0.4, 0.5, 0.6))
    experiment.augmentation = augmentation
    run = config.Run(
        experiment,
        total_steps=STEPS,
        batch_size=BATCH,
        optimizer=config.Optimizer("sgd", config.Schedule(peak=0.1)),
        parallel=config.Parallel(strategy, devices=devices),
    )
    program = build_program(config.resolve(run))
    state, losses = program.init(), []
    sharded = {axis for row in program.param_table.rows for axis in row.spec.axes if axis}
    assert sharded == ({"fsdp", "tensor"} if strategy == "fsdp_tensor" else set())
    for batch in train_batches(program.train_source, seed=0, batch_size=BATCH, start=0, stop=STEPS):
        state, metrics = program.train_step(state, program.strategy.shard_batch(batch))
        losses.append(float(metrics["loss"].compute()))
    return np.array(losses), jax.device_get((state.params, state.collections))


PMAP = pytest.param("pmap", 4, marks=pytest.mark.exhaustive)  # often in test_parity.py


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "devices"), [("fsdp_tensor", 4), PMAP])
def test_losses_parameters_and_batch_statistics_are_those_of_one_device(strategy, devices):
    losses, numbers = outcome(strategy, devices)
    expected_losses, expected = outcome("data", 1)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert len(set(losses)) == STEPS

    def same(a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())

    jax.tree.map(same, numbers, expected)

"""A run continues under another strategy; a language model with logical axes gives the same numbers under all."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from experiments.language_model import LanguageModel
from tests.launched import launch, program_of
from tests.sharding.test_parity import counting_compilations
from tests.tasks import Task, make_run
from trainer import config
from trainer.checkpoint import Store
from trainer.data import ArraySource
from trainer.data.stream import train_batches
from trainer.program import build_program

CHAIN = (("data", 4), ("fsdp", 8), ("pmap", 4), ("zero1", 2))


def link(steps: int, strategy: str, devices: int) -> config.Run:
    optimizer = dataclasses.replace(make_run().optimizer, ema_decay=0.9, schedule=config.Schedule(peak=1e-2))
    parallel = config.Parallel(strategy, devices=devices, min_shard_size=0)
    return make_run(steps, experiment=Task(noise=0.3), optimizer=optimizer, parallel=parallel)


@pytest.mark.slow
def test_a_run_goes_on_under_another_strategy_from_the_same_bits(tmp_path):
    run, final = link(5, "data", 1), None
    uninterrupted = launch(link(5 * len(CHAIN), "data", 1), tmp_path / "uninterrupted")
    for i, (strategy, devices) in enumerate(CHAIN):
        run = config.resolve(link(5 * (i + 1), strategy, devices))
        if final is not None:
            state = program_of(run).state
            restored = Store(tmp_path / "run" / "checkpoints", run.checkpoint).restore(state, 5 * i)
            jax.tree.map(np.testing.assert_array_equal, restored, final)
            jax.tree.map(assert_same_sharding, restored, state)
        with counting_compilations() as compiled:
            final = launch(run, tmp_path / "run")
        steps = {"jit(_fun)"} if strategy == "pmap" else {"jit(train_step)", "jit(eval_step)"}
        assert {compiled[name] for name in steps} == {2 if strategy == "pmap" else 1}
        final = jax.device_get(final)
    # To float32 rounding, as in test_parity.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max()), final, uninterrupted
    )


def assert_same_sharding(x: jax.Array, like: Any) -> None:
    assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


@dataclasses.dataclass
class Sentences(LanguageModel):
    """A language model on noise, with padding."""

    def source(self, split: str) -> ArraySource:
        rng = np.random.default_rng(len(split))
        tokens = rng.integers(97, 105, (32, self.length + 1)).astype(np.uint8)
        return ArraySource({"tokens": tokens, "targets": rng.integers(1, self.length + 1, 32).astype(np.int32)})


@functools.cache
def language_model(strategy: str, devices: int) -> tuple[np.ndarray, Any]:
    experiment = Sentences(length=8, width=16, layers=2, heads=2, mlp_width=32, dropout=0.1, scan=True)
    parallel = config.Parallel(strategy, devices=devices, tensor=2 if "tensor" in strategy else None)
    # Not AdaBelief, whose first steps divide by a difference of small gradients, mostly rounding error.
    optimizer = config.Optimizer(name="sgd", schedule=config.Schedule(peak=0.03))
    run = make_run(10, experiment=experiment, optimizer=optimizer, parallel=parallel)
    program = build_program(config.resolve(run))
    state, losses = program.init(), []
    for batch in train_batches(program.train_source, seed=0, batch_size=16, start=0, stop=10):
        state, metrics = program.train_step(state, program.strategy.shard_batch(batch))
        losses.append(float(metrics["loss"].total / metrics["loss"].weight))
    return np.array(losses), jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("tensor", marks=pytest.mark.exhaustive), "fsdp_tensor"])
def test_a_language_model_with_logical_axes_is_that_of_one_device(strategy):
    (losses, params), (expected, expected_params) = language_model(strategy, 4), language_model("data", 1)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max()), params, expected_params
    )

"""EMA params, against NumPy in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks import Task, make_run
from trainer import config
from trainer.data import take
from trainer.data.stream import train_batches
from trainer.program import Program, build_program
from trainer.state import update_ema

UPDATES = 30


def reference(history: np.ndarray, decay: float) -> np.ndarray:
    """The weights of a mean that forgets, written out: each update first counts as much as those before it."""
    mean = np.zeros(history.shape[1:])
    for count, params in enumerate(history.astype(np.float64), 1):
        share = max(1 / count, 1 - decay)
        mean = (1 - share) * mean + share * params
    return mean


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_ema_params_are_those_of_float64(decay):
    history = np.random.default_rng(0).normal(size=(UPDATES, 5)).astype(np.float32)
    mean = {"w": jnp.full(5, 3.0)}  # which does not count
    for step, params in enumerate(history):
        mean = update_ema(mean, {"w": jnp.asarray(params)}, jnp.asarray(step, jnp.int32), decay)
    np.testing.assert_allclose(mean["w"], reference(history, decay), rtol=0, atol=5e-7)


@pytest.mark.parametrize(("decay", "plain"), [(0.5, 2), (0.9, 10), (0.99, UPDATES)])
def test_first_updates_count_equally(decay, plain):
    history = np.random.default_rng(1).normal(size=(UPDATES, 5)).astype(np.float32)
    mean = jnp.zeros(5)
    for step, params in enumerate(history):
        mean = update_ema(mean, jnp.asarray(params), jnp.asarray(step, jnp.int32), decay)
        average = history[: step + 1].mean(0, dtype=np.float64)
        assert np.allclose(mean, average, rtol=0, atol=1e-6) == (step < plain)


@dataclasses.dataclass
class HalfTask(Task):
    """`Task` whose parameters have 16 bits."""

    def init(self, key, batch):
        variables = super().init(key, batch)
        return {**variables, "params": jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables["params"])}


@functools.cache
def trained(task: type[Task]) -> tuple[Program, Any, list[Any]]:
    """The program of a run, its last state, and the parameters after each update."""
    optimizer = dataclasses.replace(make_run().optimizer, ema_decay=0.9)
    settings: dict[str, Any] = {"experiment": task(), "optimizer": optimizer}
    program = build_program(config.resolve(make_run(UPDATES, parallel=config.Parallel(devices=1), **settings)))
    state, history = program.init(), []
    for batch in train_batches(program.train_source, seed=0, batch_size=16, start=0, stop=UPDATES):
        state, _ = program.train_step(state, program.strategy.shard_batch(batch))
        history.append(jax.device_get(state.params))
    return program, state, history


@pytest.mark.parametrize("task", [Task, HalfTask])
def test_a_run_keeps_the_mean_of_its_parameters_in_float32(task):
    _, state, history = trained(task)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {np.dtype(np.float32)}
    expected = jax.tree.map(lambda *params: reference(np.stack(params).astype(np.float64), 0.9), *history)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-7), state.ema, expected)


@pytest.mark.parametrize("task", [Task, HalfTask])
def test_the_mean_is_evaluated_in_place_of_the_parameters(task):
    program, state, _ = trained(task)
    batch = take(program.main_evaluation.source, np.arange(8)) | {"mask": np.ones(8, np.float32)}
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    mean = jax.tree.map(lambda p, e: e.astype(p.dtype), state.params, state.ema)
    found = program.main_evaluation.step(state, batch)["loss"].total
    without, expected = (
        program.run.experiment.loss({"params": params, **state.collections}, batch, key=jax.random.key(0), train=False)[
            0
        ]["loss"].total
        for params in (state.params, mean)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert abs(float(without - expected)) > 1e-3


def test_without_a_decay_there_is_no_mean():
    program = build_program(config.resolve(make_run()))
    assert program.state.ema is None

"""Evaluation against a mean over all examples in float64, whatever the batch, the devices and the strategy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks import Net, Task, make_run
from trainer import config
from trainer.data import ArraySource
from trainer.evaluation import divide, evaluate
from trainer.program import Program
from trainer.state import TrainState

EXAMPLES = 21  # of Task's test split


@dataclasses.dataclass
class Poisoned(Task):
    """What the model sees in rows under padding is infinite."""

    def loss(self, variables, batch, *, key, train):
        x = jnp.where(batch["mask"][:, None] == 0, jnp.inf, batch["x"])
        return super().loss(variables, {**batch, "x": x}, key=key, train=train)


def build_on(strategy: str, devices: int, batch_size: int, task: Task | None = None) -> Program:
    return compile_program(
        config.resolve(
            make_run(
                experiment=task or Task(),
                evaluation=config.Evaluation(batch_size=batch_size),
                parallel=config.Parallel(strategy=strategy, devices=devices),
            )
        )
    )


@pytest.fixture(scope="module")
def host_state() -> TrainState:
    """A state in host memory whose every array differs from its first value, the running statistics included."""
    program = build_on("data", 1, 8)
    rng = np.random.default_rng(0)

    def moved(x: jax.Array) -> np.ndarray:
        array = np.asarray(x)
        return array + rng.uniform(0.1, 0.5, array.shape).astype(array.dtype)

    state = program.init()
    return dataclasses.replace(state, **jax.tree.map(moved, {"params": state.params, "collections": state.collections}))


@pytest.fixture(scope="module")
def reference(host_state: TrainState) -> dict[str, float]:
    """Logits of the whole split on one device; all that follows is NumPy in float64, example by example."""
    arrays = Task().source("test").arrays
    variables = {"params": host_state.params, **host_state.collections}
    logits = Net(dropout=0.0, batch_norm=True).apply(variables, arrays["x"], train=False)
    losses, hits = [], []
    for row, label in zip(np.asarray(logits, np.float64), arrays["label"], strict=True):
        losses.append(np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[label])
        hits.append(int(np.argmax(row)) == label)
    assert len(losses) == EXAMPLES
    assert 0 < np.mean(hits) < 1
    return {"test/loss": float(np.mean(losses)), "test/accuracy": float(np.mean(hits))}


def placed(program: Program, state: TrainState) -> TrainState:
    return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), state, program.state)


COMBINATIONS = [("data", 1, 4), ("data", 2, 20), ("data", 4, 24), ("pmap", 1, 20), ("pmap", 2, 8), ("pmap", 4, 4)]


@pytest.mark.parametrize(("strategy", "devices", "batch_size"), COMBINATIONS)
def test_metrics_are_those_of_a_float64_loop_over_all_examples(strategy, devices, batch_size, host_state, reference):
    program = build_on(strategy, devices, batch_size)
    assert len(program.strategy.devices) == devices
    found = evaluate(program, placed(program, host_state), program.eval_source)
    assert list(found) == ["test/accuracy", "test/loss", "test/examples"]
    assert found["test/examples"] == EXAMPLES
    for name, value in reference.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=0, err_msg=name)


@pytest.mark.parametrize(("strategy", "devices", "batch_size"), [("data", 2, 8), ("pmap", 4, 24)])
def test_what_is_infinite_in_rows_under_padding_does_not_leak(strategy, devices, batch_size, host_state, reference):
    program = build_on(strategy, devices, batch_size, Poisoned())
    found = evaluate(program, placed(program, host_state), program.eval_source)
    assert found["test/examples"] == EXAMPLES
    for name, value in reference.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=0, err_msg=name)


@pytest.fixture(scope="module")
def program() -> Program:
    return build_on("data", 1, 8)


def subset(start: int, stop: int) -> ArraySource:
    return ArraySource({name: array[start:stop] for name, array in Task().source("test").arrays.items()})


@pytest.mark.parametrize("examples", [1, 7, 8, 9, 16])
def test_examples_are_counted_exactly_whether_or_not_they_fill_the_last_batch(program, host_state, examples):
    assert evaluate(program, placed(program, host_state), subset(0, examples))["test/examples"] == examples


def test_a_metric_of_one_example_is_its_own_value(program, host_state, reference):
    state = placed(program, host_state)
    singles = [evaluate(program, state, subset(i, i + 1)) for i in range(EXAMPLES)]
    for name, value in reference.items():
        np.testing.assert_allclose(np.mean([single[name] for single in singles]), value, rtol=1e-6, atol=0)
    assert {single["test/accuracy"] for single in singles} == {0.0, 1.0}


def test_evaluating_leaves_the_state_as_it_was(program, host_state):
    state = placed(program, host_state)
    before = jax.tree.map(np.asarray, state)
    first, second = (evaluate(program, state, program.eval_source) for _ in range(2))
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), before)


def test_a_mean_of_nothing_is_nan():
    assert np.isnan(divide(0.0, 0.0))
    assert divide(3.0, 4.0) == 0.75

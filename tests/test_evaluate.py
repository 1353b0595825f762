"""Evaluation against a mean over all examples in float64, whatever the batch, the devices and the strategy."""

import dataclasses
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks import Net, Task, make_run
from trainer import config
from trainer.data import ArraySource
from trainer.errors import UserError
from trainer.evaluation import evaluate, evaluate_split
from trainer.experiment_checks import check_loss
from trainer.loop import train
from trainer.metrics import Mean
from trainer.observe.log import read_rows
from trainer.observe.progress import Progress
from trainer.program import Program, build_program
from trainer.state import TrainState

EXAMPLES = 21  # of Task's test split


@dataclasses.dataclass
class Poisoned(Task):
    """The model's inputs of masked examples are infinite."""

    def loss(self, variables, batch, *, key, train):
        x = jnp.where(batch["mask"][:, None] == 0, jnp.inf, batch["x"])
        return super().loss(variables, {**batch, "x": x}, key=key, train=train)


def program_on(strategy: str, devices: int, batch_size: int, task: Task | None = None) -> Program:
    return build_program(
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
    program = program_on("data", 1, 8)
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


def on_devices(program: Program, state: TrainState) -> TrainState:
    return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), state, program.state)


COMBINATIONS = [("data", 1, 4), ("data", 2, 20), ("data", 4, 24), ("pmap", 1, 20), ("pmap", 2, 8), ("pmap", 4, 4)]


@pytest.mark.parametrize(("strategy", "devices", "batch_size"), COMBINATIONS)
def test_metrics_are_those_of_a_float64_loop_over_all_examples(strategy, devices, batch_size, host_state, reference):
    program = program_on(strategy, devices, batch_size)
    assert len(program.strategy.devices) == devices
    found = evaluate_split(program, on_devices(program, host_state), program.main_evaluation.source)
    assert list(found) == ["test/accuracy", "test/loss", "test/examples"]
    assert found["test/examples"] == EXAMPLES
    for name, value in reference.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=0, err_msg=name)


@pytest.mark.parametrize(("strategy", "devices", "batch_size"), [("data", 2, 8), ("pmap", 4, 24)])
def test_infinite_inputs_of_masked_examples_do_not_leak(strategy, devices, batch_size, host_state, reference):
    program = program_on(strategy, devices, batch_size, Poisoned())
    found = evaluate_split(program, on_devices(program, host_state), program.main_evaluation.source)
    assert found["test/examples"] == EXAMPLES
    for name, value in reference.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=0, err_msg=name)


@pytest.fixture(scope="module")
def program() -> Program:
    return program_on("data", 1, 8)


def subset(start: int, stop: int) -> ArraySource:
    return ArraySource({name: array[start:stop] for name, array in Task().source("test").arrays.items()})


@pytest.mark.parametrize("examples", [1, 7, 8, 9, 16])
def test_examples_are_counted_exactly_whether_or_not_they_fill_the_last_batch(program, host_state, examples):
    assert evaluate_split(program, on_devices(program, host_state), subset(0, examples))["test/examples"] == examples


def test_a_metric_of_one_example_is_its_own_value(program, host_state, reference):
    state = on_devices(program, host_state)
    singles = [evaluate_split(program, state, subset(i, i + 1)) for i in range(EXAMPLES)]
    for name, value in reference.items():
        np.testing.assert_allclose(np.mean([single[name] for single in singles]), value, rtol=1e-6, atol=0)
    assert {single["test/accuracy"] for single in singles} == {0.0, 1.0}


def test_evaluating_leaves_the_state_as_it_was(program, host_state):
    state = on_devices(program, host_state)
    before = jax.tree.map(np.asarray, state)
    first, second = (evaluate_split(program, state, program.main_evaluation.source) for _ in range(2))
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), before)


def test_a_mean_of_nothing_is_nan():
    assert np.isnan(Mean(jnp.zeros(()), jnp.zeros(())).compute())
    assert Mean(jnp.float32(3.0), jnp.float32(4.0)).compute() == 0.75


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps with an evaluation and a checkpoint every two; the newest and the best checkpoint are kept."""
    checkpoint = config.Checkpoint(every_steps=2, keep_last=1, best_metric="test/loss", best_mode="max")
    run = make_run(12, evaluation=config.Evaluation(every_steps=2, batch_size=8), checkpoint=checkpoint)
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    train(run, workdir, progress=Progress(12, StringIO()))
    return workdir


def evaluations(workdir: Path) -> dict[int, dict[str, float]]:
    """The evaluations that training logged, by step."""
    names = ("test/accuracy", "test/loss", "test/examples")
    return {
        row["step"]: {name: row[name] for name in names}
        for row in read_rows(workdir / "metrics.jsonl")
        if "test/loss" in row
    }


def test_evaluating_from_python_gives_the_metrics_that_training_logged_and_writes_nothing(workdir):
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    logged = evaluations(workdir)
    assert evaluate(workdir) == logged[12] | {"step": 12}
    best = max(logged, key=lambda step: logged[step]["test/loss"])
    assert best < 12
    assert evaluate(str(workdir), step="best") == logged[best] | {"step": best}
    assert evaluate(workdir, step=best) == evaluate(workdir, step=str(best)) == logged[best] | {"step": best}
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("step", ["latest", "best"])
def test_a_split_is_evaluated_that_does_not_have_the_best_metric_of_the_run(workdir, step):
    found = evaluate(workdir, step=step, split="train")
    assert list(found) == ["train/accuracy", "train/loss", "train/examples", "step"]
    assert found["train/examples"] == 50


def test_the_run_given_may_differ_in_what_may_change_and_in_nothing_else(workdir):
    run = make_run(12, evaluation=config.Evaluation(split="train", batch_size=48), parallel=config.Parallel("pmap"))
    found, expected = evaluate(workdir, run), evaluate(workdir, split="train")
    assert {name: pytest.approx(value, rel=1e-6) for name, value in found.items()} == expected
    with pytest.raises(UserError, match="holds a run with other settings: seed was 0, is 1"):
        evaluate(workdir, dataclasses.replace(run, seed=1))


def test_evaluating_what_is_not_there_is_refused_in_one_line(workdir, tmp_path):
    with pytest.raises(UserError, match=f"workdir {tmp_path} holds no run"):
        evaluate(tmp_path)
    with pytest.raises(UserError, match=f"workdir {tmp_path} holds no checkpoint"):
        evaluate(tmp_path, make_run())
    with pytest.raises(UserError, match=r"there is no checkpoint of step '7'; there are .*12, latest, best"):
        evaluate(workdir, step=7)
    with pytest.raises(UserError, match=r"source\('tests'\): KeyError: 'tests'; is there such a split\?"):
        evaluate(workdir, split="tests")


OWN: dict[str, Any] = {
    "numbers": {"x": 0.9, "tokens": 123456789, "array": np.ones((1,))},
    "list": [0.5],
    "text": {"x": "y"},
    "three": {"x": np.zeros(3)},
}


@dataclasses.dataclass
class Owning(Task):
    """`Task` that evaluates "own" by itself."""

    result: str = "numbers"  # a key of OWN

    def evaluate(self, name, variables, batches):
        return OWN[self.result] if name == "own" else None


def owning(result: str, best: str | None = None) -> config.Run:
    once = config.Evaluation(batch_size=8, every_steps=3)
    return make_run(
        3,
        experiment=Owning(result=result),
        parallel=config.Parallel(devices=1),
        evaluation=once,
        evaluations={"own": once},
        checkpoint=config.Checkpoint(every_steps=3, best_metric=best),
    )


def test_numbers_of_ones_own_evaluation_are_logged_as_they_are(tmp_path):
    train(owning("numbers"), tmp_path / "run", verbose=False)
    *_, row = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert {k: row[f"own/{k}"] for k in ("x", "tokens", "array")} == {"x": 0.9, "tokens": 123456789, "array": 1.0}


@pytest.mark.parametrize(
    ("result", "best", "text"),
    [
        ("list", None, "evaluate returned a list; a mapping of names to numbers is expected"),
        ("text", None, "own/x is 'y', a str; one number or a metric is expected"),
        ("three", None, "own/x is .*, a ndarray; one number or a metric is expected"),
        ("numbers", "own/y", "checkpoint.best_metric 'own/y' is not evaluated; did you mean 'own/x'"),
        ("numbers", "test/acuracy", "best_metric 'test/acuracy' is not evaluated; did you mean 'test/accuracy'"),
        ("numbers", "tset/loss", "best_metric 'tset/loss' is not evaluated; did you mean 'test/loss'"),
    ],
    ids=range(6),
)
def test_results_of_ones_own_evaluation_that_are_no_numbers_or_no_best_metric_are_named(tmp_path, result, best, text):
    with pytest.raises(UserError, match=text):
        train(owning(result, best), tmp_path / "run", verbose=False)


def test_names_that_the_harness_logs_are_no_metrics():
    metrics = {"loss": Mean(jnp.ones(()), jnp.ones(())), "grad_norm": Mean(jnp.ones(()), jnp.ones(()))}
    with pytest.raises(UserError, match="metric 'grad_norm' has the name of a number that every run logs"):
        check_loss((metrics, {}))


class Slashed(Task):
    """`Task` with a split whose name holds a slash."""

    def source(self, split):
        return super().source("train" if split == "train" else "test")


class BreaksOnEvaluate:
    def on_evaluate(self, event):
        raise OSError("of the user")


def test_an_evaluation_is_owed_though_the_split_of_the_main_one_begins_with_its_name(tmp_path):
    one = config.Evaluation("a/b", every_steps=4, batch_size=8)
    others = {"a": dataclasses.replace(one, split="test")}
    run = make_run(4, experiment=Slashed(), parallel=config.Parallel(devices=1), evaluation=one, evaluations=others)
    with pytest.raises(OSError, match="of the user"):
        train(run, tmp_path / "run", verbose=False, hooks=[BreaksOnEvaluate()])
    train(run, tmp_path / "run", verbose=False)
    found = {name for row in read_rows(tmp_path / "run" / "metrics.jsonl") for name in row}
    assert {"a/b/loss", "a/loss"} <= found

"""Augmentation on the host: the bytes depend on the seed and the position alone, whoever reads them."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.data.test_stream import BATCH, EXAMPLES, ListSource, arrays, assert_same, whole
from tests.tasks import Task, make_run
from tests.test_hooks import BreaksAt, FailedError, bits
from trainer import config, train
from trainer.data import ArraySource
from trainer.data.order import Order
from trainer.data.stream import eval_batches, train_batches
from trainer.errors import DivergedError, UserError
from trainer.program import build_program
from trainer.replay import replay

STEPS = 12


def augment(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Noise, a choice and a shuffle; a new entry and a new shape. Several kinds of numbers, so that nothing is left."""
    noise = rng.normal(size=2).astype(np.float32)
    flips = rng.integers(0, 2, 3, dtype=np.int32)
    return {
        "number": example["number"],
        "x": example["x"][:2] + noise,
        "flips": flips,
        "order": rng.permutation(5).astype(np.int32),
    }


def expected(seed: int) -> list[dict[str, np.ndarray]]:
    """The batches, from NumPy's own documented generator for each position."""
    data, order = arrays(), Order(EXAMPLES, seed)
    batches = []
    for step in range(STEPS):
        examples = []
        for position in range(step * BATCH, (step + 1) * BATCH):
            (index,) = order(np.array([position]))
            rng = np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, 1]))
            examples.append(augment({name: array[index] for name, array in data.items()}, rng))
        stacked = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        batches.append(stacked | {"mask": np.ones(BATCH, np.float32)})
    return batches


@pytest.mark.parametrize("kind", [ArraySource, ListSource], ids=["memory", "read"])
@pytest.mark.parametrize("settings", [{"threads": 1}, {"threads": 4}, {"start": 5}], ids=str)
def test_bytes_are_those_of_a_generator_for_each_position(kind, settings):
    found = whole(kind(arrays()), seed=7, augment=augment, **settings)
    assert_same(found, expected(7)[settings.get("start", 0) :])


@pytest.mark.slow
def test_bytes_are_the_same_from_worker_processes():
    for source, workers in ((ArraySource(arrays()), 1), (ListSource(arrays()), 2)):
        assert_same(whole(source, seed=7, augment=augment, workers=workers, threads=1), expected(7))


@pytest.mark.parametrize("processes", [2, 4])
def test_bytes_are_the_same_on_several_processes(processes):
    places = np.arange(BATCH).reshape(processes, -1)
    parts = [whole(ArraySource(arrays()), seed=7, augment=augment, local_positions=own) for own in places]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_same(joined, expected(7))


def test_an_example_is_another_in_each_epoch_and_under_each_seed():
    batches = [
        np.concatenate([b["flips"] for b in whole(ArraySource(arrays(1)), seed=s, augment=augment)]) for s in (0, 1)
    ]
    assert len({row.tobytes() for row in batches[0]}) == 8  # all of three coins, of one example
    assert batches[0].tobytes() != batches[1].tobytes()


def test_evaluation_reads_examples_as_they_are():
    program = build_program(config.resolve(run_of(parallel=config.Parallel(devices=1))))
    assert "flip" in program.train_spec
    assert "flip" not in program.main_evaluation.spec
    (batch, *_) = eval_batches(program.main_evaluation.source, 8)
    np.testing.assert_array_equal(batch["x"], AugmentedTask().source("test").arrays["x"][:8])


@dataclasses.dataclass
class AugmentedTask(Task):
    """Noise on the host; the example with the number `bad` becomes infinite at one of its two readings."""

    bad_after: float = 1e9

    def augment(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        noise = rng.normal(size=8).astype(np.float32)
        x = example["x"] + noise
        return {**example, "x": np.where(noise > self.bad_after, np.inf, x), "flip": np.float32(rng.uniform())}


def run_of(**settings: Any) -> config.Run:
    defaults = {"experiment": AugmentedTask(), "checkpoint": config.Checkpoint(every_steps=4)}
    return make_run(12, **defaults | settings)


def test_a_resumed_run_and_several_devices_see_the_same_examples(tmp_path):
    one = config.Parallel(devices=1)
    whole_run = train(run_of(parallel=one), tmp_path / "whole", verbose=False)
    with pytest.raises(FailedError):
        train(run_of(parallel=one), tmp_path / "run", verbose=False, hooks=[BreaksAt(7)])
    assert bits(train(run_of(parallel=one), tmp_path / "run", verbose=False)) == bits(whole_run)
    sharded = train(run_of(parallel=config.Parallel("fsdp", devices=4)), tmp_path / "sharded", verbose=False)
    for name in ("dense", "head"):
        kernels = (np.asarray(state.params[name]["kernel"]) for state in (sharded, whole_run))
        np.testing.assert_allclose(*kernels, rtol=2e-4, atol=2e-5)
    plain = train(run_of(parallel=one, experiment=Task()), tmp_path / "plain", verbose=False)
    assert bits(plain.params) != bits(whole_run.params)


def test_replay_augments_the_step_as_the_run_did(tmp_path):
    experiment = AugmentedTask(batch_norm=False, bad_after=3.4)
    run = make_run(200, experiment=experiment, parallel=config.Parallel(devices=1))
    with pytest.raises(DivergedError) as raised:
        train(run, tmp_path / "run", verbose=False)
    step = raised.value.step
    positions = range((step - 1) * 16, step * 16)
    (bad, *_) = [p for p in positions if is_bad(p)]
    index = int(Order(50, 0)(np.array([bad]))[0])
    result = replay(tmp_path / "run" / "diverged" / str(step))
    assert not result.is_finite
    assert f"x of the examples {index}" in result.text


def is_bad(position: int) -> bool:
    rng = np.random.Generator(np.random.Philox(key=[0, position], counter=[0, 0, 0, 1]))
    return bool((rng.normal(size=8).astype(np.float32) > 3.4).any())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda example, rng: None, "augment returned a NoneType; a mapping from names is expected"),
        (
            lambda example, rng: {"x": np.zeros(rng.integers(1, 9))},
            "entry 'x' of the data has examples of different shapes",
        ),
    ],
    ids=["no mapping", "shapes"],
)
def test_what_is_no_example_is_named(change, text):
    with pytest.raises(UserError, match=text):
        list(train_batches(ArraySource(arrays()), seed=0, batch_size=BATCH, start=0, stop=3, augment=change))

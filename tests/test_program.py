"""From a run to its program: collections that a model sows, axes that a model names, and when something is due."""

import dataclasses
import gc
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks import Task, make_run
from trainer import config
from trainer.compilation import quick_options
from trainer.data import take
from trainer.errors import UserError
from trainer.metrics import Mean
from trainer.program import Program, build_program, due, is_logged
from trainer.sharding import strategies


class Sowing(nn.Module):
    """A layer that sows an intermediate and an auxiliary loss."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        self.sow("intermediates", "logits", x)
        self.sow("losses", "penalty", 0.1 * jnp.sum(x**2))
        return x


@dataclasses.dataclass
class Sown(Task):
    """`Task` with a model that sows; `handled` and `dropped` are what an experiment has to do about "losses"."""

    handled: bool = True
    dropped: bool = True
    keep_all: bool = False

    def init(self, key, batch):
        variables = dict(Sowing().init(key, batch["x"], mutable=True if self.keep_all else ["params", "losses"]))
        if self.dropped:
            variables.pop("losses")
        return variables

    def loss(self, variables, batch, *, key, train):
        logits, collections = Sowing().apply(variables, batch["x"], mutable=["losses", "intermediates"])
        total = logits.sum(-1)
        collections = dict(collections)
        if self.handled:
            penalty = sum(jax.tree.leaves(collections.pop("losses")))
            total = total + penalty
        return {"loss": Mean.of(total, batch["mask"])}, collections if train else {}


def compiled(experiment: Any, **settings: Any) -> Program:
    return build_program(config.resolve(make_run(experiment=experiment, optimizer=config.Optimizer(), **settings)))


@pytest.mark.parametrize("keep_all", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_sown_intermediates_are_dropped_and_popped_losses_count(microbatches, keep_all):
    program = compiled(Sown(keep_all=keep_all), microbatches=microbatches)
    state = program.init()
    assert state.collections == {}
    batch = {"x": np.ones((16, 8), np.float32), "label": np.zeros(16, np.int32), "mask": np.ones(16, np.float32)}
    after, _ = program.train_step(state, program.strategy.shard_batch(batch))
    assert after.collections == {}


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (
            Sown(handled=False),
            r"loss returns the collection 'losses', which init does not: .* collections.pop\('losses'\)",
        ),
        (Sown(dropped=False), r"init returns the collection 'losses', which loss does not: .*leave it out in init"),
        (Sown(handled=False, dropped=False), r"'losses' with other entries than init: a sown collection grows"),
    ],
)
def test_an_error_about_collections_names_them_and_says_what_to_do(experiment, message, microbatches):
    with pytest.raises(UserError, match=message):
        compiled(experiment, microbatches=microbatches)


class Named(nn.Module):
    """BatchNorm over an axis that the model names itself, as in Flax's ImageNet example."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.BatchNorm(not train, axis_name="batch")(x))


@dataclasses.dataclass
class NamesAnAxis(Task):
    """`Task` with such a model."""

    def init(self, key, batch):
        return Named().init(key, batch["x"], train=False)

    def loss(self, variables, batch, *, key, train):
        logits, collections = Named().apply(variables, batch["x"], train=train, mutable=["batch_stats"])
        return {"loss": Mean.of(logits.sum(-1), batch["mask"])}, collections if train else {}


@pytest.mark.parametrize("strategy", ["data", "pmap"])
def test_a_model_that_names_an_axis_is_told_what_to_write_instead(strategy):
    with pytest.raises(UserError, match=r"test_program.py:\d+\).*'?batch.* axis_name=replica_axis\(\)"):
        compiled(NamesAnAxis(), parallel=config.Parallel(strategy=strategy))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, (False, (), False)),
        (2, (True, (), False)),
        (3, (False, ("test",), False)),
        (4, (True, (), True)),
        (5, (False, ("small",), False)),
        (7, (True, ("test", "small", "end"), True)),  # the last step, whatever the intervals
    ],
)
def test_due_after_a_step_follows_from_the_intervals(step, expected):
    run = make_run(
        7,
        logging=config.Logging(every_steps=2),
        evaluation=config.Evaluation(every_steps=3),
        evaluations={"small": config.Evaluation(every_steps=5), "end": config.Evaluation()},
        checkpoint=config.Checkpoint(every_steps=4),
    )
    assert due(run, config.evaluations(run), step) == expected
    assert bool(is_logged(run, jnp.asarray(step))) == expected[0]


def test_without_an_interval_only_the_last_step_is_evaluated():
    run = make_run(3)
    assert [due(run, config.evaluations(run), step).evaluate for step in (1, 2, 3)] == [(), (), ("test",)]


@dataclasses.dataclass
class Watched(Task):
    """Notes whether Python collected garbage while a model was traced; fails if it is to."""

    fails: bool = False

    def init(self, key, batch):
        seen.append(gc.isenabled())
        if self.fails:
            raise ValueError("no")
        return super().init(key, batch)


seen: list[bool] = []


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_garbage_is_collected_after_a_program_was_traced_as_before(fails, before):
    seen.clear()
    if not before:
        gc.disable()
    try:
        if fails:
            with pytest.raises(UserError, match="no"):
                build_program(config.resolve(make_run(experiment=Watched(fails=True))))
        else:
            build_program(config.resolve(make_run(experiment=Watched())))
        assert gc.isenabled() is before
    finally:
        gc.enable()
    assert seen
    assert not any(seen)


def test_the_initial_variables_are_traced_once():
    seen.clear()
    program = build_program(config.resolve(make_run(experiment=Watched())))
    init = program.init()
    assert len(seen) == 1
    expected = Task().init(jax.random.split(jax.random.key(program.run.seed))[0], {"x": jnp.zeros((8, 8))})
    jax.tree.map(np.testing.assert_array_equal, init.params, expected["params"])


traced: list[bool] = []


class Counting(Task):
    """`Task` that notes in `traced` whether JAX traces its loss to train."""

    def loss(self, variables, batch, *, key, train):
        traced.append(train)
        return super().loss(variables, batch, key=key, train=train)


@pytest.mark.parametrize(("strategy", "devices"), [("data", 1), ("fsdp", 4), ("pmap", 4)])
def test_a_step_is_traced_once_for_its_check_and_its_calls(strategy, devices):
    traced.clear()
    run = make_run(experiment=Counting(), parallel=config.Parallel(strategy, devices=devices))
    program = build_program(config.resolve(run))
    state, main = program.init(), program.main_evaluation
    batch = take(program.train_source, np.arange(16)) | {"mask": np.ones(16, np.float32)}
    for _ in range(2):
        main.step(state, program.strategy.shard_batch({name: x[:8] for name, x in batch.items()}))
        state, _ = program.train_step(state, program.strategy.shard_batch(batch))
    assert sorted(traced) == [False, True]


def test_the_first_state_is_compiled_with_less_optimisation_to_the_same_numbers(monkeypatch):
    run, quick = config.resolve(make_run(4)), {"xla_backend_optimization_level": 1}
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert quick_options(jax.devices()) == {}  # the user's own level
    monkeypatch.setenv("XLA_FLAGS", "")
    assert quick_options(jax.devices()) == quick
    state = build_program(run).init()
    monkeypatch.setattr(strategies, "quick_options", lambda devices: {"xla_backend_optimization_level": 3})

    def compare(x, y):  # a polynomial with and without fused multiply-adds: one unit of the last place on JAX 0.12
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        np.testing.assert_array_max_ulp(x, y, maxulp=2) if is_float else np.testing.assert_array_equal(x, y)

    jax.tree.map(compare, build_program(run).init(), state)

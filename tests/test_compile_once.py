"""Runs that differ only in numbers share a compiled program, and no bit of their results changes."""

import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.tasks import Task, make_run
from trainer import config
from trainer.compilation import quick_options
from trainer.compile_once import with_shared_program
from trainer.data.stream import train_batches
from trainer.errors import UserError
from trainer.metrics import Mean
from trainer.optim.precision import opaque
from trainer.program import Program, build_program

STEPS = 4
FIRST = {"seed": 0, "peak": 1e-2, "final": 1e-3, "weight_decay": 0.1}
OTHER = {"seed": 5, "peak": 3e-3, "final": 2e-4, "weight_decay": 0.37}


def built(numbers: dict[str, Any], strategy: str = "data", **optimizer: Any) -> Program:
    """The program of `Task` with these numbers; further settings are those of the optimizer."""
    run = make_run(20, experiment=Task(dropout=0.2, noise=0.1), seed=numbers["seed"])
    schedule = config.Schedule("cosine", peak=numbers["peak"], final=numbers["final"], warmup=2)
    run.optimizer = dataclasses.replace(run.optimizer, schedule=schedule, **optimizer)
    run.optimizer.groups["decayed"].weight_decay = numbers["weight_decay"]
    run.parallel = config.Parallel(strategy, devices=1 if strategy == "data" else 4, min_shard_size=0)
    return build_program(config.resolve(run))


def text(program: Program) -> str:
    return program.train_step.lower(program.state, program.strategy.abstract_batch(program.train_spec)).as_text()


def results(program: Program) -> list[bytes]:
    """The bytes of the state and of the metrics after a few steps."""
    run, state, metrics = program.run, program.init(), None
    batches = train_batches(program.train_source, seed=run.seed, batch_size=run.batch_size, start=0, stop=STEPS)
    for batch in batches:
        state, metrics = program.train_step(state, program.strategy.shard_batch(batch))
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state, metrics))]


def lion() -> dict[str, config.Group]:
    return {"decayed": config.Group(optimizer="optax.lion"), "plain": config.Group()}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="adabelief"),
        pytest.param({"groups": lion}, id="lion", marks=pytest.mark.exhaustive),
        pytest.param({"name": "adam", "decay": "coupled", "cautious": True}, id="adam", marks=pytest.mark.slow),
        pytest.param({"strategy": "fsdp"}, id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_other_numbers_are_the_same_program_and_not_a_bit_of_its_results_changes(settings):
    def settings_of_one() -> dict[str, Any]:
        return {name: value() if callable(value) else value for name, value in settings.items()}

    first, other = (built(numbers, **settings_of_one()) for numbers in (FIRST, OTHER))
    assert text(first) != text(other)
    assert text(with_shared_program(first)) == text(with_shared_program(other))
    assert results(with_shared_program(other)) == results(other)


def test_the_first_state_is_the_same_bits_also_as_users_compile_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # `make test` sets a level of optimisation, and no other is set then
    program = built(FIRST)
    assert quick_options(jax.devices())
    shared, plain = (jax.tree.leaves(one.init()) for one in (with_shared_program(program), program))
    assert [np.asarray(x).tobytes() for x in shared] == [np.asarray(x).tobytes() for x in plain]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[None]:
    """A compilation cache of its own: an earlier test may have turned that of this process off."""
    wanted = {"jax_enable_compilation_cache": True, "jax_compilation_cache_dir": str(tmp_path)}
    before = {name: getattr(jax.config, name) for name in wanted}
    for settings in (wanted, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX looks at the settings at its first compilation only
        if settings is wanted:
            yield


def keys_in_the_cache(program: Program, caplog: pytest.LogCaptureFixture) -> set[str]:
    """The keys under which JAX's compilation cache has what makes the first state."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="jax._src.compiler"):
        program.init()
    return set(re.findall(r"jit_init-[0-9a-f]{16,}", caplog.text))


@pytest.mark.usefixtures("cache")
def test_the_first_state_is_made_by_one_program_for_all_seeds(caplog):
    shared, plain = (
        [keys_in_the_cache(change(built(FIRST | {"seed": seed})), caplog) for seed in (0, 1)]
        for change in (with_shared_program, lambda program: program)
    )
    assert len(shared[0]) == 1
    assert shared[0] == shared[1]
    assert plain[0] != plain[1]


@dataclasses.dataclass
class Scaled(Task):
    """Its loss reads an array of its own, a constant of the program."""

    factor: float = 1.0

    def __post_init__(self):
        self.constant = jnp.asarray([self.factor, 1.0])

    def loss(self, variables, batch, *, key, train):
        metrics, collections = super().loss(variables, batch, key=key, train=train)
        loss = metrics["loss"]
        return metrics | {"loss": Mean(loss.total * self.constant[0], loss.weight)}, collections


def test_a_float_of_the_model_stays_a_constant():
    def shared(factor: float) -> str:
        run = make_run(20, experiment=Scaled(factor=factor))
        run.parallel.devices = 1
        return text(with_shared_program(build_program(config.resolve(run))))

    assert shared(0.5) != shared(0.25)


def test_xla_computes_with_opaque_numbers_as_with_arguments():
    def scaled(x: Any, a: Any, b: Any) -> Any:
        return x * a * b

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(1, 2, 64), jnp.float32)
    for a, b in rng.uniform(1e-4, 1e-1, (8, 2)).astype(np.float32):
        expected = jax.jit(scaled)(x, a, b)
        np.testing.assert_array_equal(jax.jit(lambda x, a=a, b=b: scaled(x, *opaque((a, b))))(x), expected)


def test_pmap_is_refused():
    run = make_run(20)
    run.parallel = config.Parallel("pmap", devices=4)
    with pytest.raises(UserError, match="--compile-once cannot share the program of the strategy pmap"):
        with_shared_program(build_program(config.resolve(run)))

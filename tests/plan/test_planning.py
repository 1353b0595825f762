"""Plans: bytes against the shapes' own, every strategy on every generation, layouts, and what does not fit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from tests.plan.models import Rematerialised, Wide, make_run
from trainer import config
from trainer.plan import planning
from trainer.plan.compiling import FAST, Figures, TooLarge, compile_for
from trainer.plan.planning import Layout
from trainer.plan.search import Largest, remat_policies, search
from trainer.plan.topology import find

PARAMETERS = 2 * (4 * 256**2 + 2 * 256 * 1024) + 512 * 256 + 5 * 256  # the head is the embedding
SMALL = {"length": 64, "width": 128, "vocab": 256, "heads": 8, "mlp_width": 256}


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
@pytest.mark.parametrize("strategy", planning.strategies())
def test_both_steps_of_every_strategy_compile_for_every_generation(topology, strategy):
    there = find(topology)
    run = make_run(strategy=strategy, **SMALL)
    program = planning.built(run, there, Layout(torus=True))
    for step, spec in ((program.train_step, program.train_spec), (program.eval_step, program.eval_spec)):
        found = compile_for(step, (program.state, program.strategy.abstract_batch(spec)), len(there.devices), FAST)
        assert isinstance(found, Figures)
        assert found.program.exact
        if step is program.train_step:
            held = sum(map(planning.shard_bytes, jax.tree.leaves(program.state)))
            assert found.aliased >= held  # all that is donated is taken over


@pytest.mark.parametrize(
    ("strategy", "split"), [("data", ()), ("zero1", ("moments",)), ("fsdp", ("moments", "parameters"))]
)
def test_bytes_on_a_device_are_the_whole_by_the_devices_that_split_it(strategy, split):
    there = find("v5e:2x4")
    plan = planning.plan(make_run(strategy=strategy), there, fast=True)
    parameters = 4 * PARAMETERS
    for name, whole in {"parameters": parameters, "moments": 2 * parameters}.items():
        share = 8 if name in split else 1
        assert getattr(plan, name) == pytest.approx(whole / share, rel=0.02)
    assert plan.gradients == pytest.approx(parameters / (8 if split else 1), rel=0.02)
    assert isinstance(plan.train, Figures)
    assert 0 <= plan.train.arguments - plan.parameters - plan.moments < 2**20  # the batch, and tiles that are not full
    assert plan.fits


def test_operations_are_those_of_the_matrices():
    there = find("v5e:2x2")
    plan = planning.plan(make_run(batch_size=8, strategy="data"), there, fast=True)
    tokens, causal = 2 * 128, 2 * 2 * 128 * 256 * 2 * 128 * 2  # a device has 2 rows; scores and their sums, 2 layers
    matrices = PARAMETERS - 5 * 256  # and scales of norms are none
    forward = 2 * tokens * matrices + causal
    lookups = 2 * tokens * 512 * 256  # of which the gradient is a product
    for step, operations in ((plan.evaluation, forward), (plan.train, 3 * forward + lookups)):
        assert isinstance(step, Figures)
        assert step.program.flops == pytest.approx(operations, rel=0.01)


def test_a_mean_of_the_parameters_counts_and_is_evaluated_beside_them():
    run, there = make_run(strategy="data", **SMALL), find("v5e:2x2")
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, ema_decay=0.9))
    plan = planning.plan(run, there, fast=True)
    assert plan.mean == plan.parameters
    assert isinstance(plan.evaluation, Figures)
    rest = plan.moments + plan.parameters
    assert dataclasses.replace(plan, hbm=plan.evaluation.peak + rest).fits
    assert not dataclasses.replace(plan, hbm=plan.evaluation.peak + rest - 1).fits


def test_another_batch_does_not_mind_schedules_in_epochs():
    run = make_run(strategy="data", **SMALL)
    schedule = config.Schedule("step", unit="epochs", warmup=0.25, boundaries=(20,))
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, schedule=schedule))
    found = planning.train_only(planning.with_batch(run, 4, 1), find("v5e:2x2"))
    assert isinstance(found, Figures)


def test_frozen_parameters_have_no_gradients():
    there = find("v5e:2x2")
    groups = {"still": config.Group(frozen=True), "moving": config.Group()}
    labels = ((r"embed/.*", "still"), (".*", "moving"))
    run = make_run(strategy="data", **SMALL)
    run = dataclasses.replace(run, optimizer=config.Optimizer(labels=labels, groups=groups))
    plan = planning.plan(run, there, fast=True)
    assert plan.parameters - plan.gradients == 256 * 128 * 4


def test_of_the_layouts_the_best_is_that_which_fits_sends_least_and_takes_least():
    def figures(sent, peak):
        program = dataclasses.make_dataclass("Program", ["collectives"])
        collective = dataclasses.make_dataclass("Collective", ["sent"])
        return Figures(0, 0, 0, peak, program([collective(sent)]), 0.0)

    a, b, c, d = Layout(True), Layout(True, True), Layout(False), Layout(False, True)
    assert planning.best({a: TooLarge(9, (), 0.0), b: figures(5, 8), c: figures(9, 1)}) == b
    assert planning.best({a: figures(100, 8), b: figures(101, 7), c: figures(103, 1)}) == b
    assert planning.best({c: TooLarge(9, (), 0.0), d: TooLarge(8, (), 0.0)}) == d


def test_what_does_not_fit_names_its_largest_buffers():
    device = find("v5e:1x1").devices[0]
    x = jax.ShapeDtypeStruct((2**30,), jnp.float32, sharding=SingleDeviceSharding(device))

    @jax.jit
    def step(x, y):
        with jax.named_scope("the_flipping"):
            return jnp.flip(x), jnp.flip(y)

    found = compile_for(step, (x, x), 1, FAST)
    assert isinstance(found, TooLarge)
    assert found.needed >= 4 * 2**32
    assert sum(b.count * b.bytes for b in found.buffers) == pytest.approx(found.needed, rel=0.01)
    assert {b.shape for b in found.buffers if b.bytes == 2**32} == {"f32[1073741824]"}
    assert {b.name for b in found.buffers} >= {"x", "y"}
    assert any("the_flipping" in b.name for b in found.buffers)


def test_the_largest_batch_fits_and_twice_as_much_does_not():
    there = find("v5e:1x1")
    run = config.resolve(config.Run(Wide(), total_steps=1, batch_size=3))
    (one,) = search(run, there, microbatches=(1,))
    assert math.log2(one.batch_size).is_integer()
    for factor, outcome in ((1, Figures), (2, TooLarge)):
        assert isinstance(planning.train_only(planning.with_batch(run, factor * one.batch_size, 1), there), outcome)
    assert one.flags() == (
        f"--config.parallel.strategy=data --config.batch_size={one.batch_size} --config.microbatches=1 "
        f"--config.evaluation.batch_size={one.batch_size}"
    )


def test_remat_policies_are_tried_where_the_experiment_has_them():
    run = config.resolve(config.Run(Rematerialised(), total_steps=1, batch_size=1))
    found = list(search(run, find("v5e:1x1"), microbatches=(1,)))
    assert [one.remat for one in found] == ["none", "full"]
    assert found[1].flags().endswith("--config.experiment.remat=full")


def test_evaluation_gets_as_many_rows_at_a_time_as_training_does():
    largest = Largest("fsdp", ("parallel.tensor=0",), None, 4, 64, None)
    assert (
        "--config.parallel.tensor=0 --config.batch_size=64 --config.microbatches=4 --config.evaluation.batch_size=16"
        in largest.flags()
    )


def test_without_remat_policies_there_is_nothing_to_try():
    assert remat_policies(Wide()) == (None,)

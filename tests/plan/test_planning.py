"""Plans: bytes on a device, every strategy on every TPU generation, compile choices, and steps that do not fit."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from tests.plan.models import Rematerialised, Wide, make_run
from trainer import config
from trainer.plan import planning
from trainer.plan.analysis import Collective, HloAnalysis
from trainer.plan.compiling import FAST, CompiledStep, OutOfMemory, compile_step
from trainer.plan.planning import CompileChoice
from trainer.plan.search import LargestBatch, remat_policies, search
from trainer.plan.topology import make_topology
from trainer.plan.variants import axis_changes, with_batch, with_strategy
from trainer.sharding import STRATEGIES


def parameters(layers: int, mlp_width: int) -> int:
    """How many parameters the decoder has; its head is the embedding."""
    return layers * (4 * 256**2 + 2 * 256 * mlp_width) + 512 * 256 + (2 * layers + 1) * 256


SMALL = {"layers": 1, "length": 64, "width": 128, "vocab": 256, "heads": 8, "mlp_width": 256}


TOPOLOGIES = ("v4:2x2x1", "v5e:2x4", "v5p:2x2x2", "v6e:2x4")


def combinations() -> Iterator[Any]:
    """Every strategy on every topology; all that are neither on a v5e nor with fsdp are exhaustive."""
    for strategy, topology in itertools.product(STRATEGIES, TOPOLOGIES):
        is_further = strategy != "fsdp" and topology != "v5e:2x4"
        yield pytest.param(strategy, topology, marks=[pytest.mark.exhaustive] if is_further else [])


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "topology"), list(combinations()))
def test_both_steps_of_every_strategy_compile_for_every_generation(strategy, topology):
    there = make_topology(topology)
    run = make_run(strategy=strategy, **SMALL)
    program = planning.program_for(run, there, CompileChoice(torus=True))
    main = program.main_evaluation
    for step, spec in ((program.train_step, program.train_spec), (main.step, main.spec)):
        arguments = (program.state, program.strategy.abstract_batch(spec))
        compiled = compile_step(step, arguments, len(there.devices), FAST)
        assert isinstance(compiled, CompiledStep)
        assert compiled.hlo.exact
        if step is program.train_step:
            held = sum(map(planning.shard_bytes, jax.tree.leaves(program.state)))
            assert compiled.aliased_bytes >= held  # the results reuse all donated memory


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("strategy", "sharded"), [("data", ()), ("zero1", ("moment_bytes",)), ("fsdp", ("moment_bytes", "param_bytes"))]
)
def test_bytes_on_a_device_are_all_bytes_by_the_devices_that_shard_them(strategy, sharded):
    there = make_topology("v5e:2x4")
    small = {"layers": 1, "mlp_width": 256}
    plan = planning.make_plan(make_run(strategy=strategy, length=32, **small), there, fast=True)
    size_of_all = 4 * parameters(**small)
    for name, size in {"param_bytes": size_of_all, "moment_bytes": 2 * size_of_all}.items():
        shards = 8 if name in sharded else 1
        assert getattr(plan, name) == pytest.approx(size / shards, rel=0.02)
    assert plan.gradient_bytes == pytest.approx(size_of_all / (8 if sharded else 1), rel=0.02)
    assert isinstance(plan.train, CompiledStep)
    other = plan.train.argument_bytes - plan.param_bytes - plan.moment_bytes
    assert 0 <= other < 2**16  # the batch, and padding of tiles
    assert plan.fits


@pytest.mark.tpu
def test_operations_are_those_of_the_matrices():
    there = make_topology("v5e:2x2")
    plan = planning.make_plan(make_run(batch_size=8, strategy="data"), there, fast=True)
    tokens, causal = (
        2 * 128,
        2 * 2 * 128 * 256 * 2 * 128 * 2,
    )  # a device has 2 examples; scores and their sums, 2 layers
    matrices = parameters(layers=2, mlp_width=1024) - 5 * 256  # without the scales of norms
    forward = 2 * tokens * matrices + causal
    lookups = 2 * tokens * 512 * 256  # whose gradient is a product
    for step, operations in ((plan.evaluation, forward), (plan.train, 3 * forward + lookups)):
        assert isinstance(step, CompiledStep)
        assert step.hlo.flops == pytest.approx(operations, rel=0.01)


@pytest.mark.tpu
def test_ema_params_count_and_are_evaluated_beside_the_parameters():
    run, there = make_run(strategy="data", **SMALL), make_topology("v5e:2x2")
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, ema_decay=0.9))
    plan = planning.make_plan(run, there, fast=True)
    assert plan.ema_bytes == plan.param_bytes
    assert isinstance(plan.evaluation, CompiledStep)
    needed = plan.evaluation.peak_bytes + plan.moment_bytes + plan.param_bytes
    assert dataclasses.replace(plan, hbm_bytes=needed).fits
    assert not dataclasses.replace(plan, hbm_bytes=needed - 1).fits


@pytest.mark.tpu
def test_another_batch_does_not_mind_schedules_in_epochs():
    run = make_run(strategy="data", **SMALL)
    schedule = config.Schedule("step", unit="epochs", warmup=0.25, boundaries=(20,))
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, schedule=schedule))
    step = planning.compile_train_fast(with_batch(run, 4, 1), make_topology("v5e:2x2"))
    assert isinstance(step, CompiledStep)


@pytest.mark.tpu
def test_frozen_parameters_have_no_gradients():
    there = make_topology("v5e:2x2")
    groups = {"still": config.Group(frozen=True), "moving": config.Group()}
    labels = ((r"embed/.*", "still"), (".*", "moving"))
    run = make_run(strategy="data", **SMALL)
    run = dataclasses.replace(run, optimizer=config.Optimizer(labels=labels, groups=groups))
    plan = planning.make_plan(run, there, fast=True)
    assert plan.param_bytes - plan.gradient_bytes == 256 * 128 * 4


def test_of_the_choices_the_best_is_that_which_fits_sends_least_and_takes_least():
    def step(sent, peak):
        exchange = Collective("collective-permute", "u8", sent, 2, 1, asynchronous=False)
        return CompiledStep(0, 0, 0, peak, HloAnalysis((exchange,), 0, exact=True, windowed=False), 0.0)

    a, b, c, d = CompileChoice(True), CompileChoice(True, False), CompileChoice(False), CompileChoice(False, False)
    assert planning.best({a: OutOfMemory(9, (), 0.0), b: step(5, 8), c: step(9, 1)}) == b
    assert planning.best({a: step(100, 8), b: step(101, 7), c: step(103, 1)}) == b
    assert planning.best({c: OutOfMemory(9, (), 0.0), d: OutOfMemory(8, (), 0.0)}) == d


@pytest.mark.tpu
def test_what_does_not_fit_names_its_largest_buffers():
    device = make_topology("v5e:1x1").devices[0]
    x = jax.ShapeDtypeStruct((2**30,), jnp.float32, sharding=SingleDeviceSharding(device))

    @jax.jit
    def step(x, y):
        with jax.named_scope("the_flipping"):
            return jnp.flip(x), jnp.flip(y)

    found = compile_step(step, (x, x), 1, FAST)
    assert isinstance(found, OutOfMemory)
    assert found.needed_bytes >= 4 * 2**32
    assert sum(b.count * b.bytes for b in found.buffers) == pytest.approx(found.needed_bytes, rel=0.01)
    assert {b.shape for b in found.buffers if b.bytes == 2**32} == {"f32[1073741824]"}
    assert {b.name for b in found.buffers} >= {"x", "y"}
    assert any("the_flipping" in b.name for b in found.buffers)


@pytest.mark.tpu
def test_the_largest_batch_fits_and_twice_as_much_does_not():
    there = make_topology("v5e:1x1")
    run = config.resolve(config.Run(Wide(), total_steps=1, batch_size=3))
    (one,) = search(run, there, microbatches=(1,))
    assert math.log2(one.batch_size).is_integer()
    for factor, outcome in ((1, CompiledStep), (2, OutOfMemory)):
        step = planning.compile_train_fast(with_batch(run, factor * one.batch_size, 1), there)
        assert isinstance(step, outcome)
    assert one.flags() == (
        f"--config.parallel.strategy=data --config.batch_size={one.batch_size} --config.microbatches=1 "
        f"--config.evaluation.batch_size={one.batch_size}"
    )


@pytest.mark.tpu
def test_remat_policies_are_tried_where_the_experiment_has_them():
    run = config.resolve(config.Run(Rematerialised(), total_steps=1, batch_size=1))
    found = list(search(run, make_topology("v5e:1x1"), microbatches=(1,)))
    assert [one.remat for one in found] == ["none", "full"]
    assert found[1].flags().endswith("--config.experiment.remat=full")


def test_evaluation_gets_as_many_examples_at_a_time_as_training_does():
    largest = LargestBatch("fsdp", ("parallel.tensor=None",), None, 4, 64, None)
    assert (
        "--config.parallel.tensor=None --config.batch_size=64 --config.microbatches=4 --config.evaluation.batch_size=16"
        in largest.flags()
    )


def test_without_remat_policies_there_is_nothing_to_try():
    assert remat_policies(Wide()) == (None,)


def test_another_strategy_keeps_the_sizes_of_the_axes_that_it_uses():
    parallel = config.Parallel(strategy="fsdp_tensor", fsdp=4, tensor=2)
    run = dataclasses.replace(make_run(**SMALL), parallel=parallel)
    kept = {name: with_strategy(run, name).parallel for name in STRATEGIES}
    assert {name: (p.strategy, p.fsdp, p.tensor) for name, p in kept.items()} == {
        "data": ("data", None, None),
        "zero1": ("zero1", 4, None),
        "fsdp": ("fsdp", 4, None),
        "tensor": ("tensor", None, 2),
        "zero1_tensor": ("zero1_tensor", 4, 2),
        "fsdp_tensor": ("fsdp_tensor", 4, 2),
        "pmap": ("pmap", None, None),
    }
    assert axis_changes(run, with_strategy(run, "fsdp")) == ("parallel.tensor=None",)
    assert axis_changes(run, run) == ()

"""The sharding of a state: moments are sharded like their parameters, and each device holds its share."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.tasks import Task, make_run
from trainer import config
from trainer.metrics import Mean
from trainer.program import Program, build_program

DEVICES = 8


def program_of(strategy: str, **settings: Any) -> Program:
    optimizer = dataclasses.replace(make_run().optimizer, **settings)
    parallel = config.Parallel(strategy, devices=DEVICES, min_shard_size=0)
    if "tensor" in strategy:
        parallel.rules = ((r"dense/kernel", ("fsdp", "tensor")), (".*", ()))
    return build_program(config.resolve(make_run(parallel=parallel, optimizer=optimizer)))


def shards(leaf: Any) -> tuple[int, ...]:
    """The number of shards of each dimension."""
    return tuple(a // b for a, b in zip(leaf.shape, leaf.sharding.shard_shape(leaf.shape), strict=True))


KERNEL = {  # dense/kernel, 8×16: shards of the parameter, and of its moments
    "data": ((1, 1), (1, 1)),
    "zero1": ((1, 1), (1, 8)),
    "fsdp": ((1, 8), (1, 8)),
    "tensor": ((1, 8), (1, 8)),
    "zero1_tensor": ((1, 2), (4, 2)),
    "fsdp_tensor": ((4, 2), (4, 2)),
}


@pytest.mark.parametrize("strategy", KERNEL)
def test_moments_and_the_mean_follow_their_parameters(strategy):
    state = program_of(strategy, amsgrad=True, ema_decay=0.9).state
    params, moments = KERNEL[strategy]
    assert shards(state.params["dense"]["kernel"]) == shards(state.ema["dense"]["kernel"]) == params
    for tree in (state.opt_state.mu, state.opt_state.nu, state.opt_state.nu_max):
        assert shards(tree["dense"]["kernel"]) == moments
        assert shards(tree["head"]["bias"]) == (1,)  # 3 does not divide
    assert state.opt_state.count.sharding.is_fully_replicated
    assert jax.tree.leaves(state.collections)[0].sharding.is_fully_replicated


def test_optimizer_state_without_some_moments_follows_its_parameters():
    sgd = program_of("zero1", name="sgd").state.opt_state
    assert shards(sgd.mu["dense"]["kernel"]) == (1, 8)
    assert jax.tree.leaves(sgd.nu) == []
    groups = {"decayed": config.Group(frozen=True), "plain": config.Group()}
    frozen = program_of("zero1", groups=groups).state.opt_state
    assert jax.tree.leaves(frozen.mu["dense"]) == []
    assert shards(frozen.nu["norm"]["scale"]) == (8,)


class Wide(nn.Module):
    """A million parameters, few of them in biases."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(1024, name="first")(x))
        return nn.Dense(8, name="head")(nn.relu(nn.Dense(1024, name="second")(x)))


@dataclasses.dataclass
class WideTask(Task):
    """`Task` with another model."""

    def init(self, key, batch):
        return Wide().init(key, batch["x"])

    def loss(self, variables, batch, *, key, train):
        logits: Any = Wide().apply(variables, batch["x"])
        return {"loss": Mean.of(jnp.sum(logits**2, -1), batch["mask"])}, {}


def wide(strategy: str, devices: int, **settings: Any) -> Program:
    run = make_run(experiment=WideTask(), parallel=config.Parallel(strategy, devices=devices), **settings)
    return build_program(config.resolve(run))


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def most_on_a_device(tree: Any) -> int:
    """Bytes on the device that holds most."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


@pytest.mark.parametrize(
    ("strategy", "devices", "params", "moments"),  # shards of each
    [
        ("data", 4, 1, 1),
        ("zero1", 4, 1, 4),
        ("zero1", 8, 1, 8),
        ("fsdp", 4, 4, 4),
        ("fsdp", 8, 8, 8),
        ("pmap", 4, 1, 1),
    ],
)
def test_a_device_holds_its_share_of_the_bytes(strategy, devices, params, moments):
    program = wide(strategy, devices)
    state = program.init()
    assert most_on_a_device(state.params) == pytest.approx(bytes_of(state.params) / params, rel=0.02)
    assert most_on_a_device(state.opt_state) == pytest.approx(bytes_of(state.opt_state) / moments, rel=0.02)


@pytest.mark.parametrize("strategy", ["zero1", "fsdp", "fsdp_tensor"])
def test_gradients_are_laid_out_as_the_moments_are(strategy):
    program = program_of(strategy)
    gradients = jax.jit(program.strategy.constrain_gradients)(
        jax.tree.map(lambda x: jnp.ones(x.shape), program.state.params)
    )
    jax.tree.map(assert_same_sharding, gradients, program.state.opt_state.mu)


def test_a_step_lays_its_gradients_out():
    sharded, replicated = r"\[\{\}, \{\"fsdp\"\}\]", r"\[\{\}, \{\}\]"
    for strategy, axes in (("zero1", sharded), ("data", replicated)):
        found = re.findall(
            r"sdy.sharding_constraint %\S+ <@mesh, (.*)> : tensor<8x16xf32>", lowered(program_of(strategy))
        )
        assert len(found) == 1
        assert re.fullmatch(axes, found[0])


def lowered(program: Program) -> str:
    step: Any = program.train_step
    return step.lower(program.state, program.strategy.abstract_batch(program.train_spec)).as_text()


def assert_same_sharding(array: jax.Array, like: Any) -> None:
    assert array.sharding.is_equivalent_to(like.sharding, array.ndim)


class Named(nn.Module):
    """A model that constrains the sharding of its activations."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("embed", "mlp"))
        x = nn.Dense(16, use_bias=False, kernel_init=init, name="up")(x)
        return nn.with_logical_constraint(x, ("batch", "mlp"))


@dataclasses.dataclass
class NamedTask(Task):
    """`Task` with logical axes."""

    def init(self, key, batch):
        return Named().init(key, batch["x"])

    def loss(self, variables, batch, *, key, train):
        hidden: Any = Named().apply(variables, batch["x"])
        return {"loss": Mean.of(jnp.sum(hidden**2, -1), batch["mask"])}, {}


def test_logical_axes_place_parameters_and_activations():
    run = make_run(experiment=NamedTask(), parallel=config.Parallel("fsdp_tensor", devices=DEVICES, tensor=2))
    run.optimizer.labels = ((".*", "decayed"),)
    del run.optimizer.groups["plain"]
    program = build_program(config.resolve(run))
    assert shards(program.state.params["up"]["kernel"]) == (4, 2)
    constraint = r'sdy.sharding_constraint %\w+ <@mesh, \[\{"fsdp"\}, \{"tensor"\}\]> : tensor<16x16xf32>'
    assert re.search(constraint, lowered(program))

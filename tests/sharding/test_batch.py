"""The examples of a batch that a process reads and puts on its devices, consecutive or not."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tests.tasks import Task, make_run
from trainer import config
from trainer.program import build_program
from trainer.sharding.strategies import global_array, local_positions

ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # a mesh in which the devices of two hosts, 0 … 3 and 4 … 7, take turns


def sharding(*axes: str | None) -> NamedSharding:
    devices = np.array(jax.devices(), object)[ORDER].reshape(4, 2)
    return NamedSharding(Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2), PartitionSpec(*axes))


class OnHost:
    """A sharding as the process that has some of the devices sees it."""

    def __init__(self, sharding: NamedSharding, devices: range) -> None:
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        found = self.sharding.devices_indices_map(shape)
        return {device: index for device, index in found.items() if device.id in self.devices}


@pytest.mark.parametrize(
    ("axes", "devices", "examples"),
    [
        ((("data", "tensor"),), range(4), [0, 1, 4, 5, 8, 9, 12, 13]),
        ((("data", "tensor"),), range(4, 8), [2, 3, 6, 7, 10, 11, 14, 15]),
        (("data",), range(4), list(range(16))),  # both hosts have all: tensor does not shard a batch
        (("data",), range(2), list(range(8))),
        ((), range(3), list(range(16))),
    ],
)
def test_rows_of_a_host_are_those_of_its_devices(axes, devices, examples):
    host: Any = OnHost(sharding(*axes), devices)
    found = local_positions(host, 16)
    assert found.tolist() == examples
    assert found.dtype == np.int64


@pytest.mark.parametrize("axes", [(("data", "tensor"),), ("data",), ("tensor",), ()])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_device_gets_its_rows(axes, processes, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: processes)  # takes the branch for several
    examples = np.arange(32, dtype=np.float32).reshape(16, 2)
    array = global_array(sharding(*axes), examples)
    assert array.sharding == sharding(*axes)
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, examples[shard.index])


@pytest.mark.parametrize("strategy", ["data", "fsdp", "pmap", "fsdp_tensor"])
def test_a_batch_on_the_devices_is_what_the_step_was_made_for(strategy):
    rules = ((".*", ()),) if "tensor" in strategy else ()
    program = build_program(
        config.resolve(make_run(experiment=Task(), parallel=config.Parallel(strategy, rules=rules)))
    )
    assert program.strategy.local_positions(16).tolist() == list(range(16))
    batch = {"x": np.arange(128, dtype=np.float32).reshape(16, 8), "mask": np.ones(16, np.float32)}
    expected = program.strategy.abstract_batch({"x": batch["x"], "mask": batch["mask"]})
    for name, array in program.strategy.shard_batch(batch).items():
        assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype)
        if strategy != "pmap":  # whose shapes have no sharding
            assert array.sharding.is_equivalent_to(expected[name].sharding, array.ndim)
        np.testing.assert_array_equal(np.asarray(array).reshape(batch[name].shape), batch[name])

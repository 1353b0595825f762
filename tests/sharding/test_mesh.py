"""Meshes: sizes of axes, slices, and one axis for each dimension of a torus."""

import dataclasses
import itertools

import jax
import pytest

from trainer import config
from trainer.errors import UserError
from trainer.sharding.mesh import STRATEGIES, axis_sizes, make_mesh, mesh_axes, named_sharding, torus_axes


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU that make a mesh."""

    id: int
    coords: tuple[int, ...]
    slice_index: int = 0
    platform: str = "tpu"


def torus(*shape: int, slices: int = 1) -> list[Chip]:
    """The chips in the order of JAX: the first coordinate fastest."""
    places = [place[::-1] for place in itertools.product(*map(range, reversed(shape)))]
    return [Chip(i, place, i // len(places)) for i, place in enumerate(places * slices)]


@pytest.mark.parametrize(
    ("settings", "devices", "slices", "sizes"),
    [
        ({"strategy": "data"}, 8, 1, (8, 1, 1)),
        ({"strategy": "data"}, 8, 2, (8, 1, 1)),
        ({"strategy": "pmap"}, 8, 1, (8, 1, 1)),
        ({"strategy": "zero1"}, 8, 1, (1, 8, 1)),
        ({"strategy": "fsdp"}, 8, 1, (1, 8, 1)),
        ({"strategy": "fsdp"}, 8, 2, (2, 4, 1)),
        ({"strategy": "fsdp", "fsdp": 2}, 8, 1, (4, 2, 1)),
        ({"strategy": "tensor"}, 8, 1, (1, 1, 8)),
        ({"strategy": "tensor"}, 8, 2, (2, 1, 4)),
        ({"strategy": "tensor", "tensor": 2}, 8, 1, (4, 1, 2)),
        ({"strategy": "fsdp_tensor"}, 8, 1, (1, 4, 2)),
        ({"strategy": "zero1_tensor", "tensor": 4}, 8, 1, (1, 2, 4)),
        ({"strategy": "fsdp_tensor", "fsdp": 2, "tensor": 2}, 16, 2, (4, 2, 2)),
        ({"strategy": "fsdp_tensor"}, 1, 1, (1, 1, 1)),
        ({"strategy": "fsdp_tensor"}, 3, 1, (1, 3, 1)),
    ],
)
def test_devices_along_each_axis(settings, devices, slices, sizes):
    found = axis_sizes(config.Parallel(**settings), devices, slices)
    assert found == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))


@pytest.mark.parametrize(
    ("settings", "slices", "message"),
    [
        ({"strategy": "data", "fsdp": 2}, 1, "parallel.fsdp is 2, which strategy 'data' does not use"),
        ({"strategy": "tensor", "fsdp": 2}, 1, "parallel.fsdp is 2, which strategy 'tensor' does not use"),
        ({"strategy": "zero1", "tensor": 2}, 1, "parallel.tensor is 2, which strategy 'zero1' does not use"),
        ({"strategy": "fsdp", "fsdp": 3}, 1, "parallel.fsdp 3 does not divide the 8 devices there are"),
        ({"strategy": "fsdp", "fsdp": 8}, 2, "parallel.fsdp 8 does not divide the 4 devices of a slice"),
        ({"strategy": "tensor", "tensor": 8}, 2, "parallel.tensor 8 does not divide the 4 devices of a slice"),
        (
            {"strategy": "fsdp_tensor", "fsdp": 8, "tensor": 2},
            1,
            "parallel.fsdp 8 with tensor 2 beside it does not divide the 8 devices",
        ),
        ({"strategy": "data"}, 3, "parallel.num_slices 3 does not divide 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, slices, message):
    with pytest.raises(UserError, match=message):
        axis_sizes(config.Parallel(**settings), 8, slices)


def test_the_table_of_strategies_has_those_of_the_settings():
    [field] = [field for field in dataclasses.fields(config.Parallel) if field.name == "strategy"]
    assert tuple(STRATEGIES) == field.metadata["choices"]


def holders(sharding, shape) -> dict[tuple, list[int]]:
    """Which devices hold each part of an array."""
    parts: dict[tuple, list[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        parts.setdefault(tuple((i.start or 0, i.stop) for i in index), []).append(device.id)
    return {part: sorted(ids) for part, ids in parts.items()}


def test_only_data_spans_slices():
    mesh = make_mesh(config.Parallel("fsdp", num_slices=2), jax.devices()[:8])
    shards = holders(named_sharding(mesh, ("fsdp",)), (4,))
    # Devices 0 … 3 are one slice: together they hold a parameter once, and so do 4 … 7.
    assert list(shards.values()) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    batch = holders(named_sharding(mesh, (("data", "fsdp"),)), (8,))
    assert list(batch.values()) == [[i] for i in range(8)]


def test_tensor_is_innermost_within_a_slice():
    mesh = make_mesh(config.Parallel("fsdp_tensor", num_slices=2), jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert list(holders(named_sharding(mesh, ("tensor",)), (2,)).values()) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert list(holders(named_sharding(mesh, ("fsdp", "tensor")), (2, 2)).values()) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_slices_are_those_that_the_devices_form():
    chips = torus(2, 2, slices=2)
    mesh = make_mesh(config.Parallel("fsdp"), chips)
    assert [[chip.slice_index for chip in part.flat] for part in mesh.devices] == [[0] * 4, [1] * 4]
    assert dict(mesh.shape) == {"data": 2, "fsdp_0": 2, "fsdp_1": 2, "tensor": 1}
    with pytest.raises(UserError, match=r"parallel\.num_slices is 4; the devices form 2"):
        make_mesh(config.Parallel("fsdp", num_slices=4), chips)


@pytest.mark.parametrize("strategy", ["data", "fsdp"])
def test_slices_that_do_not_divide_the_devices_are_refused(strategy):
    with pytest.raises(UserError, match=r"parallel\.num_slices 3 does not divide 8 devices"):
        make_mesh(config.Parallel(strategy, num_slices=3), jax.devices()[:8])


@pytest.mark.parametrize(
    ("shape", "fsdp", "tensor", "axes"),  # axes: (size, coordinate) for data, fsdp and tensor
    [
        ((4, 4), 16, 1, ((), ((4, 0), (4, 1)), ())),
        ((2, 4), 8, 1, ((), ((4, 1), (2, 0)), ())),
        ((2, 2, 4), 16, 1, ((), ((4, 2), (2, 0), (2, 1)), ())),
        ((8, 4), 32, 1, ((), ((8, 0), (4, 1)), ())),
        ((8, 4), 8, 4, ((), ((8, 0),), ((4, 1),))),
        ((8, 4), 4, 8, ((), ((4, 1),), ((8, 0),))),
        ((8, 4), 8, 1, (((4, 1),), ((8, 0),), ())),
        ((2, 2, 4), 8, 2, ((), ((4, 2), (2, 0)), ((2, 1),))),
        ((2, 2, 4), 4, 2, (((2, 1),), ((4, 2),), ((2, 0),))),
        ((1, 4), 4, 1, ((), ((4, 1),), ())),
    ],
)
def test_fsdp_has_the_longest_dimensions_of_a_torus_in_descending_order(shape, fsdp, tensor, axes):
    assert torus_axes(torus(*shape), fsdp, tensor) == axes


@pytest.mark.parametrize(
    ("devices", "fsdp", "tensor"),
    [
        (torus(4, 4), 8, 2),  # half a dimension
        (torus(4, 4)[:-1], 5, 3),  # a hole
        (torus(4, 4), 1, 16),  # nothing for fsdp
        (torus(4, 4)[:1], 1, 1),
        (jax.devices()[:8], 8, 1),  # CPUs have no coordinates
    ],
)
def test_where_no_dimensions_fit_there_is_no_torus(devices, fsdp, tensor):
    assert torus_axes(devices, fsdp, tensor) is None


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((4, 4), {}),
        ((2, 4), {}),
        ((2, 2, 4), {}),
        ((8, 4), {}),
        ((8, 4), {"strategy": "fsdp_tensor", "tensor": 4}),
        ((2, 2, 4), {"strategy": "fsdp_tensor"}),
        ((4, 4), {"fsdp": 4}),
        ((4, 4), {"slices": 2}),
    ],
)
def test_neighbours_along_an_axis_of_a_torus_differ_in_one_coordinate_by_one(shape, settings):
    chips = torus(*shape, slices=settings.pop("slices", 1))
    mesh = make_mesh(config.Parallel(**{"strategy": "fsdp"} | settings), chips)
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(len(chips)))
    for axis, size in enumerate(mesh.devices.shape):
        for i in range(size - 1):
            pairs = zip(mesh.devices.take(i, axis).flat, mesh.devices.take(i + 1, axis).flat, strict=True)
            for a, b in pairs:
                if a.slice_index == b.slice_index:
                    assert sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True)) == 1


def test_each_coordinate_of_a_torus_is_its_own_axis_or_all_are_one():
    mesh = make_mesh(config.Parallel("fsdp"), torus(2, 4))
    assert mesh.axis_names == ("data", "fsdp_0", "fsdp_1", "tensor")
    assert mesh.devices.shape == (1, 4, 2, 1)
    assert mesh_axes(mesh)["fsdp"] == ("fsdp_0", "fsdp_1")
    # A dimension is sharded over both; with max_mesh_axes=1, over the first only.
    assert named_sharding(mesh, ("fsdp", None)).spec[0] == ("fsdp_0", "fsdp_1")
    assert named_sharding(mesh, ("fsdp", None), max_mesh_axes=1).spec[0] == "fsdp_0"

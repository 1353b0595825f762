"""The mesh: the devices of a run along the axes data, fsdp and tensor, as many along each as the strategy says."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer import config
from trainer.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
REPLICA_AXIS = "replica"  # the one axis of the mesh of `pmap`, all of it data
SpecEntry = str | tuple[str, ...] | None  # the axes over which a dimension of an array is sharded
TorusAxis = tuple[tuple[int, int], ...]  # dimensions of a torus, as (size, index of the coordinate)


class StrategyAxes(NamedTuple):
    """The axes over which a strategy shards parameters with their EMA, and the optimizer state."""

    params: tuple[str, ...]
    opt_state: tuple[str, ...]  # a config may set the sizes of these axes only


STRATEGIES = {
    "data": StrategyAxes((), ()),
    "zero1": StrategyAxes((), ("fsdp",)),
    "fsdp": StrategyAxes(("fsdp",), ("fsdp",)),
    "tensor": StrategyAxes(("tensor",), ("tensor",)),
    "zero1_tensor": StrategyAxes(("tensor",), ("fsdp", "tensor")),
    "fsdp_tensor": StrategyAxes(("fsdp", "tensor"), ("fsdp", "tensor")),
    "pmap": StrategyAxes((), ()),
}


def axis_sizes(parallel: config.Parallel, devices: int, slices: int = 1) -> dict[str, int]:
    """The number of devices along each of `AXES`.

    Raises:
      UserError: sizes that the strategy does not use, or that do not divide the devices of a slice.
    """
    axes, within = STRATEGIES[parallel.strategy].opt_state, devices // slices
    if devices % slices:
        raise UserError(f"parallel.num_slices {slices} does not divide {devices} devices")
    for axis, size in (("tensor", parallel.tensor), ("fsdp", parallel.fsdp)):
        if size and axis not in axes:
            raise UserError(f"parallel.{axis} is {size}, which strategy {parallel.strategy!r} does not use")
    default = math.gcd(2, within) if "fsdp" in axes else within
    tensor = (parallel.tensor or default) if "tensor" in axes else 1
    where = f"the {within} devices {'of a slice' if slices > 1 else 'there are'}"
    if within % tensor:
        raise UserError(f"parallel.tensor {tensor} does not divide {where}")
    fsdp = (parallel.fsdp or within // tensor) if "fsdp" in axes else 1
    if within // tensor % fsdp:
        beside = f" with tensor {tensor} beside it" if tensor > 1 else ""
        raise UserError(f"parallel.fsdp {fsdp}{beside} does not divide {where}")
    return {"data": devices // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}


def make_mesh(parallel: config.Parallel, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of a strategy. Only data spans slices; on a torus fsdp is several axes, one for each dimension."""
    if parallel.strategy == "pmap":  # the mesh that jax.pmap itself makes
        axis_sizes(parallel, len(devices), parallel.num_slices or 1)
        return Mesh(np.array(devices, object), (REPLICA_AXIS,), axis_types=(AxisType.Auto,))
    slices = _slices(parallel, devices)
    sizes = axis_sizes(parallel, len(devices), len(slices))
    torus = torus_axes(slices[0], sizes["fsdp"], sizes["tensor"]) if parallel.torus else None
    fsdp = [size for size, _ in torus[1]] if torus else [sizes["fsdp"]]
    shape = (sizes["data"] // len(slices), *fsdp, sizes["tensor"])
    array = np.concatenate([_arranged(devices, shape, torus) for devices in slices])
    names = [f"fsdp_{i}" for i in range(len(fsdp))] if len(fsdp) > 1 else ["fsdp"]
    # Auto: XLA propagates shardings. Explicit axes would put them into every type.
    return Mesh(array, ("data", *names, "tensor"), axis_types=(AxisType.Auto,) * array.ndim)


def mesh_axes(mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """The axes of the mesh that make up each of `AXES`, outermost first."""
    names = mesh.axis_names
    return {"data": names[:1], "fsdp": names[1:-1], "tensor": names[1:][-1:]}


def named_sharding(mesh: Mesh, spec: Iterable[SpecEntry], max_mesh_axes: int | None = None) -> NamedSharding:
    """The sharding of an array whose dimensions are each sharded over one of `AXES`, over several, or not.

    With `max_mesh_axes` = n, an axis that consists of several mesh axes, such as fsdp of fsdp_0, fsdp_1 and fsdp_2, is
    replaced by the first n of them.
    """

    def names(axes: SpecEntry) -> tuple[str, ...] | None:
        wanted = (axes,) if isinstance(axes, str) else axes or ()
        used = [name for axis in wanted for name in mesh_axes(mesh)[axis][:max_mesh_axes]]
        return tuple(name for name in used if mesh.shape[name] > 1) or None

    return NamedSharding(mesh, PartitionSpec(*map(names, spec)))


def _slices(parallel: config.Parallel, devices: Sequence[jax.Device]) -> list[list[Any]]:
    """The devices of each slice: by their `slice_index`, or equal parts of CPU devices, which have none."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if len(slices) == 1 and devices[0].platform == "cpu":
        count = parallel.num_slices or 1
        axis_sizes(parallel, len(devices), count)
        size = len(devices) // count
        return [list(devices[i : i + size]) for i in range(0, len(devices), size)]
    if parallel.num_slices not in (None, len(slices)):
        raise UserError(f"parallel.num_slices is {parallel.num_slices}; the devices form {len(slices)}")
    return [slices[index] for index in sorted(slices)]


def torus_axes(devices: Sequence[Any], fsdp: int, tensor: int) -> tuple[TorusAxis, TorusAxis, TorusAxis] | None:
    """Whole dimensions of the torus for data, fsdp and tensor.

    None without a torus, if fsdp has size 1, or if no choice of whole dimensions has these sizes. Fsdp takes the
    longest dimensions, in descending order: XLA:TPU makes a reduce-scatter along a dimension of size 4, but an
    all-reduce along a dimension of size 2.
    """
    coordinates = np.array([getattr(device, "coords", ()) for device in devices])  # [devices, dimensions]
    extent = [int(n) for n in coordinates.max(0) - coordinates.min(0) + 1]
    if math.prod(extent) != len(devices):
        return None
    dimensions = sorted(((size, -i) for i, size in enumerate(extent) if size > 1), reverse=True)
    for order in itertools.permutations((size, -i) for size, i in dimensions):
        for first, second in itertools.combinations_with_replacement(range(len(order) + 1), 2):
            parts = order[:first], order[first:second], order[second:]
            if [math.prod(size for size, _ in part) for part in parts[:2]] == [fsdp, tensor]:
                return (parts[2], *parts[:2]) if first else None
    return None


def _arranged(devices: Sequence[Any], shape: tuple[int, ...], torus: Sequence[TorusAxis] | None) -> np.ndarray:
    """The devices of a slice as an array of this shape."""
    if torus is None and devices[0].platform != "cpu":
        return mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    if torus is not None:
        order = [index for axis in torus for _, index in axis]
        devices = sorted(devices, key=lambda device: [device.coords[index] for index in order])
    return np.array(devices, object).reshape(shape)

"""Meshes: the devices of a run as a grid with the axes data, fsdp and tensor."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer import config
from trainer.errors import UserError

AXES = ("data", "fsdp", "tensor")


class Grid(NamedTuple):
    """A mesh, and which of its axes make up each of `AXES`.

    Attributes:
      mesh: of all devices.
      axes: for "data", "fsdp" and "tensor" the axes of the mesh, outermost first; fsdp has one for each dimension of
        the torus where the devices form one.
    """

    mesh: Mesh
    axes: Mapping[str, tuple[str, ...]]

    def size(self, axis: str) -> int:
        """How many devices lie along an axis."""
        return math.prod(self.mesh.shape[name] for name in self.axes[axis])

    def sharding(self, dimensions: Iterable[str | tuple[str, ...] | None], depth: int | None = None) -> NamedSharding:
        """The sharding whose dimensions are split over these of `AXES`; a tuple splits one dimension over several.

        With a depth, only the first so many mesh axes of each are used.
        """
        return NamedSharding(self.mesh, PartitionSpec(*(self._names(axes, depth) for axes in dimensions)))

    def _names(self, axes: str | tuple[str, ...] | None, depth: int | None) -> tuple[str, ...] | None:
        wanted = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(name for axis in wanted for name in self.axes[axis][:depth] if self.mesh.shape[name] > 1) or None


def axis_sizes(parallel: config.Parallel, devices: int, slices: int = 1) -> dict[str, int]:
    """How many devices the strategy puts along each of `AXES`.

    Raises:
      UserError: sizes that the strategy does not use, or that do not divide the devices of a slice.
    """
    name, within = parallel.strategy, devices // slices
    if devices % slices:
        raise UserError(f"parallel.num_slices {slices} does not divide {devices} devices")
    tensor = fsdp = 1
    if "tensor" in name:
        tensor = parallel.tensor or (within if name == "tensor" else math.gcd(2, within))
    elif parallel.tensor:
        raise UserError(f"parallel.tensor is {parallel.tensor}, which strategy {name!r} does not use")
    if within % tensor:
        raise UserError(f"parallel.tensor {tensor} does not divide the {within} devices {_where(slices)}")
    if "fsdp" in name or "zero1" in name:
        fsdp = parallel.fsdp or within // tensor
    elif parallel.fsdp:
        raise UserError(f"parallel.fsdp is {parallel.fsdp}, which strategy {name!r} does not use")
    if within // tensor % fsdp:
        beside = f" with tensor {tensor} beside it" if tensor > 1 else ""
        raise UserError(f"parallel.fsdp {fsdp}{beside} does not divide the {within} devices {_where(slices)}")
    return {"data": devices // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}


def _where(slices: int) -> str:
    return "of a slice" if slices > 1 else "there are"


def make_grid(parallel: config.Parallel, devices: Sequence[jax.Device]) -> Grid:
    """The devices as a grid: slices along data, and within a slice what the strategy says.

    Raises:
      UserError: as `axis_sizes`; slices that are not those of the devices.
    """
    slices = _slices(parallel, devices)
    sizes = axis_sizes(parallel, len(devices), len(slices))
    torus = torus_axes(slices[0], sizes["fsdp"], sizes["tensor"]) if parallel.torus else None
    parts = [size for size, _ in torus.fsdp] if torus else [sizes["fsdp"]]
    shape = (sizes["data"] // len(slices), *parts, sizes["tensor"])
    grid = np.concatenate([_arranged(devices, shape, torus) for devices in slices])
    names = ("fsdp",) if len(parts) == 1 else tuple(f"fsdp_{i}" for i in range(len(parts)))
    # Auto: XLA propagates shardings. Explicit axes would put them into every type.
    mesh = Mesh(grid, ("data", *names, "tensor"), axis_types=(AxisType.Auto,) * grid.ndim)
    return Grid(mesh, {"data": ("data",), "fsdp": names, "tensor": ("tensor",)})


def _slices(parallel: config.Parallel, devices: Sequence[jax.Device]) -> list[list[Any]]:
    """The devices of each slice: as they say themselves, or, where they know of none (CPU), in equal parts."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if len(found) == 1 and devices[0].platform == "cpu":
        count = parallel.num_slices or 1
        axis_sizes(parallel, len(devices), count)
        size = len(devices) // count
        return [list(devices[i : i + size]) for i in range(0, len(devices), size)]
    if parallel.num_slices not in (None, len(found)):
        raise UserError(f"parallel.num_slices is {parallel.num_slices}; the devices form {len(found)}")
    return [found[index] for index in sorted(found)]


class TorusAxes(NamedTuple):
    """The dimensions of a torus that each axis takes, as (size, index of the coordinate)."""

    data: tuple[tuple[int, int], ...]
    fsdp: tuple[tuple[int, int], ...]
    tensor: tuple[tuple[int, int], ...]


def torus_axes(devices: Sequence[Any], fsdp: int, tensor: int) -> TorusAxes | None:
    """Whole dimensions of the torus for each axis, or None if there is no torus or no such choice.

    Fsdp takes the longest and has them in descending order: XLA:TPU reduces and scatters along a dimension of 4, but
    sums everything along one of 2.
    """
    dimensions = sorted(((size, -i) for i, size in enumerate(_extent(devices)) if size > 1), reverse=True)
    for order in itertools.permutations((size, -i) for size, i in dimensions):
        for first, second in itertools.combinations_with_replacement(range(len(order) + 1), 2):
            parts = order[:first], order[first:second], order[second:]
            if [math.prod(size for size, _ in part) for part in parts[:2]] == [fsdp, tensor]:
                return TorusAxes(data=parts[2], fsdp=parts[0], tensor=parts[1]) if first else None
    return None


def _extent(devices: Sequence[Any]) -> tuple[int, ...]:
    """The extent of the devices' coordinates in each dimension; () where they have none or do not fill them."""
    if not all(hasattr(device, "coords") for device in devices):
        return ()
    coordinates = np.array([device.coords for device in devices])
    extent = tuple(int(n) for n in coordinates.max(0) - coordinates.min(0) + 1)
    return extent if math.prod(extent) == len(devices) else ()


def _arranged(devices: Sequence[Any], shape: tuple[int, ...], torus: TorusAxes | None) -> np.ndarray:
    """The devices of a slice as an array of this shape."""
    if torus is None and devices[0].platform != "cpu":
        return mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    if torus is not None:
        order = [index for _, index in (*torus.data, *torus.fsdp, *torus.tensor)]
        devices = sorted(devices, key=lambda device: [device.coords[index] for index in order])
    arranged = np.empty(len(devices), object)
    arranged[:] = devices
    return arranged.reshape(shape)

"""TPU topologies by name, with devices that libtpu compiles for although they are not there."""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from trainer.errors import UserError, did_you_mean

# Without these libtpu looks for chips, queries the metadata server, logs to a shared folder and takes a lock.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# The published shapes of a slice. For 3D tori: a few small shapes, then every shape up to the largest whose sides are
# multiples of 4 and do not decrease, such as 4x4x8.
_SMALL_3D_SHAPES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_FLAT_SHAPES = {
    "v2": ("2x2", "4x4", "8x8", "16x16"),
    "v3": ("2x2", "4x4", "8x8", "16x16", "32x32"),
    "v5e": _FLAT,
    "v6e": _FLAT,
}
_LARGEST = {"v4": (16, 16, 16), "v5p": (16, 16, 24), "tpu7x": (16, 16, 36)}

# Links of a chip, and bytes per second of one link in one direction. Google's TPU documentation gives the sum of both
# directions: v5e 400 GB/s over 4 links, v6e 800 over 4, v5p 1200 over 6. v4 has 6 links of 50 GB/s (Jouppi et al. 2023,
# arXiv:2304.01433).
_LINKS = {"v4": (6, 50e9), "v5e": (4, 50e9), "v5p": (6, 100e9), "v6e": (4, 100e9)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of TPU chips.

    Attributes:
      name: such as "v5e:4x4".
      generation: such as "v5e".
      shape: chips along each dimension of a slice.
      slices: the number of slices, connected by the data centre's network.
      devices: the devices to compile for. A device is a chip, or half a chip for v2, v3 and tpu7x.
      hbm_bytes: the memory of a device that the compiler lets a program use.
    """

    name: str
    generation: str
    shape: tuple[int, ...]
    slices: int
    devices: Sequence[jax.Device]
    hbm_bytes: int

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    def seconds(self, sent_bytes: float) -> float | None:
        """The least time in which a chip can send this many bytes over all its links in the slice.

        None if no bandwidth is published, and for several slices, as XLA does not say which bytes go between slices.
        """
        if self.generation not in _LINKS or self.slices > 1:
            return None
        most, bandwidth = _LINKS[self.generation]
        links = min(most, sum(min(size - 1, 2) for size in self.shape))
        return sent_bytes / (links * bandwidth) if links else None


def make_topology(name: str, slices: int = 1) -> Topology:
    """The topology with a name such as "v5e:4x4" or "v5p:4x4x4", in this many slices.

    Raises:
      UserError: an unknown topology; libtpu is not installed.
    """
    generation, shape = _parse_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning needs the TPU compiler: pip install 'belief-trainer[tpu]'")
    os.environ.update(_QUIET)
    # The two cores of a v4 chip are one device, as on v5p.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    devices = tuple(description.devices)
    return Topology(name, generation, shape, slices, devices, _hbm_bytes(generation, devices[0]))


def _parse_name(name: str) -> tuple[str, tuple[int, ...]]:
    """The generation and the shape in a name; raises `UserError` if either is unknown."""
    generation, _, shape = name.partition(":")
    known = (*_FLAT_SHAPES, *_LARGEST)
    if generation not in known:
        raise UserError(f"no TPU generation {generation!r} in topology {name!r}{did_you_mean(generation, known)}")
    shapes = known_shapes(generation)
    if shape not in shapes:
        largest = "x".join(map(str, _LARGEST.get(generation, ())))
        listed = ", ".join(_SMALL_3D_SHAPES)
        listed += f", and shapes up to {largest} whose sides are multiples of 4 and do not decrease, such as 4x4x8"
        hint = re.sub(r" \(known: .*", "", did_you_mean(shape, shapes))
        raise UserError(
            f"no topology {name!r}{hint} (known for {generation}: "
            f"{', '.join(shapes) if generation in _FLAT_SHAPES else listed})"
        )
    return generation, tuple(int(size) for size in shape.split("x"))


def known_shapes(generation: str) -> Sequence[str]:
    """The shapes that a slice of this generation can have."""
    if generation in _FLAT_SHAPES:
        return _FLAT_SHAPES[generation]
    sizes = (range(4, largest + 1, 4) for largest in _LARGEST[generation])
    large = (size for size in itertools.product(*sizes) if list(size) == sorted(size))
    return (*_SMALL_3D_SHAPES, *("x".join(map(str, size)) for size in large))


@functools.cache
def _hbm_bytes(generation: str, device: jax.Device) -> int:
    """The memory of a device, from the error in which the compiler refuses a program that is far too large.

    This program's argument and result are 1 TiB each. The devices of a topology have no `memory_stats()`.
    """
    del generation  # the key of the cache, together with `device`
    huge = jax.ShapeDtypeStruct((2**40,), jnp.int8, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error)):
            return int(float(found[1]) * 2**30)
        raise
    raise AssertionError("the compiler accepted a program of 2 TiB")

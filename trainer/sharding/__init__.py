"""How a step spreads over devices: two strategies behind one protocol, writing the same checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np

from trainer import config
from trainer.errors import UserError
from trainer.experiment import Batch
from trainer.metrics import Metrics
from trainer.rules import paths
from trainer.sharding.mesh import axis_sizes, make_grid
from trainer.sharding.specs import ParamSpec, place
from trainer.sharding.strategies import Pmapped, Sharded
from trainer.state import TrainState


class Strategy(Protocol):
    """A strategy. `axis_name` is what a step needs to know of it: the replica axis, or None when arrays are global.

    Attributes:
      devices: all of them, those of other processes included.
      specs: what splits each parameter, by path; empty where nothing is split.
    """

    devices: list[jax.Device]
    specs: Mapping[str, ParamSpec]

    @property
    def axis_name(self) -> str | None:
        """The replica axis, or None."""
        ...

    @property
    def sizes(self) -> dict[str, int]:
        """How many devices lie along data, fsdp and tensor."""
        ...

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        ...

    def constrain_gradients(self, gradients: Any) -> Any:
        """Gradients, inside a step, laid out as they are to be summed and used."""
        ...

    def abstract_state(self, init: Callable[[], TrainState]) -> TrainState:
        """The state as shapes, dtypes and shardings; nothing is computed."""
        ...

    def init_state(self, init: Callable[[], TrainState]) -> TrainState:
        """The state, made on the devices."""
        ...

    def local_examples(self, batch_size: int) -> np.ndarray:
        """The rows of a global batch that this process holds, int64, ascending."""
        ...

    def shard_batch(self, batch: Batch) -> Batch:
        """A host batch (this process's rows, NumPy) on the devices."""
        ...

    def abstract_batch(self, batch: Mapping[str, Any]) -> Batch:
        """What `put` would make of a global batch, in shapes, dtypes and shardings."""
        ...

    def compile_train(self, step: Callable, state: TrainState) -> Callable[[TrainState, Batch], Any]:
        """The compiled update; it consumes the state that it is given. `state` may be abstract."""
        ...

    def compile_eval(self, step: Callable, state: TrainState) -> Callable[[TrainState, Batch], Metrics]:
        """The compiled evaluation; metrics come back replicated."""
        ...


def build_strategy(parallel: config.Parallel, params: Any, devices: Sequence[jax.Device] | None = None) -> Strategy:
    """The strategy that a config describes.

    Args:
      parallel: the settings.
      params: the parameters in shapes, with the boxes that name logical axes, if there are any.
      devices: those to use; by default all, or the first `parallel.devices`.

    Raises:
      UserError: devices that are not there, an axis that does not divide what it should split.
    """
    devices = _devices(parallel) if devices is None else devices
    if parallel.strategy == "pmap":
        axis_sizes(parallel, len(devices), parallel.num_slices or 1)  # sizes that do not divide, or are of no use here
        specs = [
            ParamSpec(path, tuple(x.shape), (), "pmap")
            for path, x in zip(paths(nn.unbox(params)), jax.tree.leaves(nn.unbox(params)), strict=True)
        ]
        return Pmapped(devices, specs)
    grid = make_grid(parallel, devices)
    specs = place(params, parallel, {axis: grid.size(axis) for axis in grid.axes})
    return Sharded(grid, specs, parallel.axis_rules, whole_params="zero1" in parallel.strategy)


def _devices(parallel: config.Parallel) -> Sequence[jax.Device]:
    devices = jax.devices()
    if (parallel.devices or 0) > len(devices):
        raise UserError(
            f"parallel.devices is {parallel.devices}, but there are {len(devices)}; for fake CPU devices set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={parallel.devices}"
        )
    if parallel.devices and jax.process_count() > 1 and parallel.devices < len(devices):
        raise UserError(f"parallel.devices is {parallel.devices}; several processes use all of theirs, {len(devices)}")
    return devices[: parallel.devices]


def check_divides(run: config.Run, shards: int) -> None:
    """Raises `UserError` unless every batch and microbatch splits evenly into this many shards of rows."""
    part = run.batch_size // run.microbatches
    if part % shards:
        what = f"batch_size {run.batch_size}" + (f" in {run.microbatches} microbatches" if run.microbatches > 1 else "")
        raise UserError(
            f"{what} does not divide over {shards} devices: it must be a multiple of {shards * run.microbatches}"
        )
    if run.evaluation.batch_size % shards:
        raise UserError(
            f"evaluation.batch_size {run.evaluation.batch_size} does not divide over {shards} devices: it must be a "
            f"multiple of {shards}"
        )

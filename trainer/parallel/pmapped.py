"""Pmapped: the classical replicated step through `jax.pmap`; a step sees its replica's share of the batch.

The state keeps no device axis: it goes in and comes out replicated, so that checkpoints are those of `Sharded`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer.experiment import Batch, Metrics
from trainer.parallel.placement import Placement
from trainer.parallel.rows import local_rows
from trainer.state import TrainState
from trainer.step import EvalStep, TrainStep


class Pmapped:
    """Data parallelism by replicas that sum their gradients; each draws dropout masks of its own."""

    axis_name = "replica"

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        """One replica on each of `devices`."""
        self.devices = list(devices)
        self.placements: Mapping[str, Placement] = {}
        mesh = Mesh(np.array(devices, object), (self.axis_name,), axis_types=(AxisType.Auto,))
        self.rows = NamedSharding(mesh, PartitionSpec(self.axis_name))
        self.replicated = NamedSharding(mesh, PartitionSpec())

    def place_gradients(self, gradients: Any) -> Any:
        """Gradients are whole in every replica."""
        return gradients

    def abstract(self, make_state: Callable[[], TrainState]) -> TrainState:
        """Shapes and dtypes of the state, replicated."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), jax.eval_shape(make_state)
        )

    def create(self, make_state: Callable[[], TrainState]) -> TrainState:
        """The state, whole on every device."""
        return jax.jit(make_state, out_shardings=self.replicated)()

    @property
    def sizes(self) -> dict[str, int]:
        """All devices lie along data."""
        return {"data": len(self.devices), "fsdp": 1, "tensor": 1}

    @property
    def row_shards(self) -> int:
        """Into how many parts a batch is split."""
        return len(self.devices)

    def local_rows(self, batch_size: int) -> np.ndarray:
        """The rows of a global batch that this process holds, int64, ascending."""
        return local_rows(self.rows, batch_size)

    def put(self, batch: Batch) -> Batch:
        """The batch as [this process's replicas, rows of one replica, …], one part on each device."""
        here = NamedSharding(self.rows.mesh.local_mesh, self.rows.spec)
        mine = here.num_devices
        return {name: jax.device_put(x.reshape(mine, -1, *x.shape[1:]), here) for name, x in batch.items()}

    def abstract_batch(self, batch: Mapping[str, Any]) -> Batch:
        """Shapes and dtypes with the replica axis in front."""
        replicas = len(self.devices)
        here = replicas if jax.process_count() == 1 else len(self.rows.addressable_devices)
        return {
            name: jax.ShapeDtypeStruct((here, x.shape[0] // replicas, *x.shape[1:]), x.dtype)
            for name, x in batch.items()
        }

    def compile_train(self, step: TrainStep, state: TrainState) -> Callable[[TrainState, Batch], Any]:
        """State and metrics come back replicated, without a device axis."""
        del state
        mapped = jax.pmap(
            step,
            self.axis_name,
            in_axes=(None, 0),
            out_axes=(None, None),
            donate_argnums=0,
            devices=self.devices,
        )
        return self._for_processes(mapped)

    def compile_eval(self, step: EvalStep, state: TrainState) -> Callable[[TrainState, Batch], Metrics]:
        """The compiled evaluation."""
        del state
        mapped = jax.pmap(step, self.axis_name, in_axes=(None, 0), out_axes=None, devices=self.devices)
        return self._for_processes(mapped)

    def _for_processes(self, mapped: Callable) -> Callable:
        """With several processes, `jax.pmap` takes and gives arrays of this one, where all else has global arrays."""
        if jax.process_count() == 1:
            return mapped

        def of_all(state: TrainState, batch: Batch) -> Any:
            here = NamedSharding(self.replicated.mesh.local_mesh, PartitionSpec())
            results = mapped(jax.tree.map(lambda x: _seen_as(x, here), state), batch)
            return jax.tree.map(lambda x: _seen_as(x, self.replicated), results)

        return of_all


def _seen_as(x: Any, replicated: NamedSharding) -> Any:
    """The same buffers on the devices of this process, as an array replicated over others, too, or over them alone."""
    if isinstance(x, jax.core.Tracer):
        return x
    return jax.make_array_from_single_device_arrays(x.shape, replicated, [shard.data for shard in x.addressable_shards])

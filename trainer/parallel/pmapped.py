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
from trainer.parallel.rows import global_array, local_rows
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
        """The batch as [replicas, rows of one replica, …], one part on each device."""
        mine = len(self.rows.addressable_devices)
        return {name: global_array(self.rows, x.reshape(mine, -1, *x.shape[1:])) for name, x in batch.items()}

    def abstract_batch(self, batch: Mapping[str, Any]) -> Batch:
        """Shapes and dtypes with the replica axis in front."""
        replicas = len(self.devices)
        return {
            name: jax.ShapeDtypeStruct((replicas, x.shape[0] // replicas, *x.shape[1:]), x.dtype, sharding=self.rows)
            for name, x in batch.items()
        }

    def compile_train(self, step: TrainStep, state: TrainState) -> Callable[[TrainState, Batch], Any]:
        """State and metrics come back replicated, without a device axis."""
        del state
        return jax.pmap(
            step,
            self.axis_name,
            in_axes=(None, 0),
            out_axes=(None, None),
            donate_argnums=0,
            devices=self.devices,
        )

    def compile_eval(self, step: EvalStep, state: TrainState) -> Callable[[TrainState, Batch], Metrics]:
        """The compiled evaluation."""
        del state
        return jax.pmap(step, self.axis_name, in_axes=(None, 0), out_axes=None, devices=self.devices)

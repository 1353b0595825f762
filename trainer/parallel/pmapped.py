"""Pmapped: the classical replicated step through `jax.pmap`; a step sees its replica's share of the batch.

The state keeps no device axis: it goes in and comes out replicated, so that checkpoints are those of `Sharded`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from trainer.experiment import Batch, Metrics
from trainer.state import TrainState
from trainer.step import EvalStep, TrainStep


class Pmapped:
    """Data parallelism by replicas that sum their gradients; each draws dropout masks of its own."""

    axis_name = "replica"

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        """One replica on each of `devices`."""
        self.devices = list(devices)
        mesh = jax.make_mesh((len(devices),), (self.axis_name,), axis_types=(AxisType.Auto,), devices=devices)
        self.rows = NamedSharding(mesh, PartitionSpec(self.axis_name))
        self.replicated = NamedSharding(mesh, PartitionSpec())

    def abstract(self, make_state: Callable[[], TrainState]) -> TrainState:
        """Shapes and dtypes of the state, replicated."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), jax.eval_shape(make_state)
        )

    def create(self, make_state: Callable[[], TrainState]) -> TrainState:
        """The state, whole on every device."""
        return jax.jit(make_state, out_shardings=self.replicated)()

    def _split(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        replicas = len(self.devices)
        return (replicas, shape[0] // replicas, *shape[1:])

    def put(self, batch: Batch) -> Batch:
        """The batch as [replicas, rows of one replica, …], one part on each device."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.rows, x.reshape(self._split(x.shape))), batch
        )

    def abstract_batch(self, batch: Batch) -> Batch:
        """Shapes and dtypes with the replica axis in front."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(self._split(x.shape), x.dtype), batch)

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

"""Sharded: `jax.jit` over a mesh of devices; a step sees global arrays and XLA adds the communication."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from trainer.experiment import Batch
from trainer.metrics import Metrics
from trainer.rules import path_of
from trainer.sharding.mesh import Grid
from trainer.sharding.specs import ParamSpec
from trainer.state import TrainState

_ROWS = ("data", "fsdp")  # the axes that split a batch


class Sharded:
    """Batches are split over data and fsdp; parameters and what follows them go where their placements say."""

    axis_name = None

    def __init__(
        self,
        grid: Grid,
        specs: Sequence[ParamSpec],
        axis_rules: Sequence[tuple[str, str | None]],
        *,
        whole_params: bool = False,
    ) -> None:
        """Prepares nothing on the devices.

        Args:
          grid: the devices.
          specs: one for each parameter.
          axis_rules: what the logical axes of activations mean while a step is traced.
          whole_params: whether fsdp splits the optimizer's state only (`zero1`).
        """
        self.grid = grid
        self.specs: Mapping[str, ParamSpec] = {spec.path: spec for spec in specs}
        self.devices: list[jax.Device] = list(grid.mesh.devices.flat)
        self.rows, self.replicated = grid.sharding((_ROWS,)), grid.sharding(())
        self._whole_params = whole_params
        names = {axis: grid.sharding((axis,)).spec[0] for axis in grid.axes}
        self._axis_rules = [("batch", self.rows.spec[0]), *((name, names.get(axis or "")) for name, axis in axis_rules)]

    @property
    def sizes(self) -> dict[str, int]:
        """How many devices lie along data, fsdp and tensor."""
        return {axis: self.grid.size(axis) for axis in self.grid.axes}

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return math.prod(self.sizes[axis] for axis in _ROWS)

    def shardings(self, state: TrainState) -> TrainState:
        """The tree of shardings of a state, of which only shapes are used.

        Whatever in the optimizer's state has the path and the shape of a parameter is placed as that parameter is.
        """
        whole: Any = jax.tree.map(lambda _: self.replicated, state)
        return whole.replace(
            params=self._like_params(state.params, whole=self._whole_params),
            opt_state=self._like_params(state.opt_state),
            ema=self._like_params(state.ema, whole=self._whole_params),
        )

    def _like_params(self, tree: Any, *, whole: bool = False, depth: int | None = None) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: self._sharding(path_of(keys), leaf.shape, whole, depth), tree
        )

    def _sharding(self, path: str, shape: tuple[int, ...], whole: bool, depth: int | None) -> NamedSharding:
        while path:
            spec = self.specs.get(path)
            if spec is not None and spec.shape == tuple(shape):
                axes = [None if whole and axis == "fsdp" else axis for axis in spec.axes]
                return self.grid.sharding(axes, depth)
            path = path.partition("/")[2]
        return self.replicated

    def constrain_gradients(self, gradients: Any) -> Any:
        """Lays gradients out as the optimizer's state is, so that each is summed where it is used.

        One mesh axis after the other: so XLA:TPU reduces and scatters along each dimension of a torus. All at once
        would become the sum of everything everywhere, of which most is thrown away.
        """
        for depth in range(1, len(self.grid.axes["fsdp"]) + 1):
            gradients = jax.lax.with_sharding_constraint(gradients, self._like_params(gradients, depth=depth))
        return gradients

    def abstract_state(self, init: Callable[[], TrainState]) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        shapes = jax.eval_shape(init)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self.shardings(shapes),
        )

    def init_state(self, init: Callable[[], TrainState]) -> TrainState:
        """The state, each part made where it will live."""
        return jax.jit(init, out_shardings=self.shardings(jax.eval_shape(init)))()

    def local_examples(self, batch_size: int) -> np.ndarray:
        """The rows of a global batch that this process holds, int64, ascending."""
        return local_examples(self.rows, batch_size)

    def shard_batch(self, batch: Batch) -> Batch:
        """The batch, of which this process gives its `local_examples`, with its rows split over the devices."""
        if len(self.devices) == 1 and self.devices[0].platform == "cpu":
            return batch  # it is where it should be; jit takes it as it is, sixfold faster than device_put
        return {name: global_array(self.rows, x) for name, x in batch.items()}

    def abstract_batch(self, batch: Mapping[str, Any]) -> Batch:
        """The global batch's shapes and dtypes."""
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows) for name, x in batch.items()}

    def compile_train(self, step: Callable, state: TrainState) -> Callable[[TrainState, Batch], Any]:
        """Output shardings are pinned to the input's: left to XLA, the second step would compile again."""
        shardings = self.shardings(state)
        return jax.jit(
            self._with_names(step),
            in_shardings=(shardings, self.rows),
            out_shardings=(shardings, self.replicated),
            donate_argnums=0,
        )

    def compile_eval(self, step: Callable, state: TrainState) -> Callable[[TrainState, Batch], Metrics]:
        """The compiled evaluation."""
        return jax.jit(
            self._with_names(step), in_shardings=(self.shardings(state), self.rows), out_shardings=self.replicated
        )

    def _with_names(self, step: Callable) -> Callable:
        """Traces a step where `nn.with_logical_constraint` in a model finds the mesh and what its names mean."""

        @functools.wraps(step)
        def traced(state: TrainState, batch: Batch) -> Any:
            with use_abstract_mesh(self.grid.mesh.abstract_mesh), nn.logical_axis_rules(self._axis_rules):
                return step(state, batch)

        return traced


class Pmapped:
    """Data parallelism by replicas that sum their gradients; each draws dropout masks of its own."""

    axis_name = "replica"

    def __init__(self, devices: Sequence[jax.Device], specs: Sequence[ParamSpec]) -> None:
        """One replica on each of `devices`."""
        self.devices = list(devices)
        self.specs: Mapping[str, ParamSpec] = {spec.path: spec for spec in specs}
        mesh = Mesh(np.array(devices, object), (self.axis_name,), axis_types=(AxisType.Auto,))
        self.rows = NamedSharding(mesh, PartitionSpec(self.axis_name))
        self.replicated = NamedSharding(mesh, PartitionSpec())

    def constrain_gradients(self, gradients: Any) -> Any:
        """Gradients are whole in every replica."""
        return gradients

    def abstract_state(self, init: Callable[[], TrainState]) -> TrainState:
        """Shapes and dtypes of the state, replicated."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), jax.eval_shape(init)
        )

    def init_state(self, init: Callable[[], TrainState]) -> TrainState:
        """The state, whole on every device."""
        return jax.jit(init, out_shardings=self.replicated)()

    @property
    def sizes(self) -> dict[str, int]:
        """All devices lie along data."""
        return {"data": len(self.devices), "fsdp": 1, "tensor": 1}

    @property
    def batch_shards(self) -> int:
        """Into how many parts a batch is split."""
        return len(self.devices)

    def local_examples(self, batch_size: int) -> np.ndarray:
        """The rows of a global batch that this process holds, int64, ascending."""
        return local_examples(self.rows, batch_size)

    def shard_batch(self, batch: Batch) -> Batch:
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

    def compile_train(self, step: Callable, state: TrainState) -> Callable[[TrainState, Batch], Any]:
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

    def compile_eval(self, step: Callable, state: TrainState) -> Callable[[TrainState, Batch], Metrics]:
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


def local_examples(sharding: NamedSharding, rows: int) -> np.ndarray:
    """Those of `rows` rows, int64 and ascending, that lie on devices of this process.

    They need not follow each other: on a slice of a torus the chips of a host are a block, not a run.
    """
    every = np.arange(rows)
    return np.unique(np.concatenate([every[i] for i in sharding.addressable_devices_indices_map((rows,)).values()]))


def global_array(sharding: NamedSharding, x: np.ndarray) -> jax.Array:
    """The array of which this process gives its `local_examples`, in their order."""
    if jax.process_count() == 1:
        return jax.make_array_from_process_local_data(sharding, x)
    shards = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
    mine = local_examples(sharding, shards)
    rows = len(x) // len(mine)

    def part(index: Any) -> np.ndarray:
        start = int(np.searchsorted(mine, (index[0].start or 0) // rows)) * rows
        return x[start : start + rows]

    return jax.make_array_from_callback((shards * rows, *x.shape[1:]), sharding, part)

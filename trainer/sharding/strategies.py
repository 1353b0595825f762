"""Strategies: how the steps of a run are compiled for several devices, by `jax.jit` or by `jax.pmap`."""

import abc
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from trainer import config
from trainer.compilation import quick_options
from trainer.experiment import Batch
from trainer.metrics import Metrics
from trainer.rules import path_of
from trainer.sharding.mesh import BATCH_AXES, REPLICA_AXIS, STRATEGIES, make_mesh, mesh_axes, named_sharding
from trainer.sharding.specs import ParamSpec, axis_rules, param_specs, unmapped_axes
from trainer.state import TrainState


class Strategy(abc.ABC):
    """How steps spread over the devices of a mesh. All strategies write the same checkpoint."""

    axis_name: str | None = None  # the replica axis of a step, or None where a step sees global arrays

    def __init__(self, parallel: config.Parallel, devices: Sequence[jax.Device], params: Any) -> None:
        """Checks `parallel` against the parameters, which may be abstract and boxed; computes nothing."""
        self._parallel, self._mesh = parallel, make_mesh(parallel, devices)
        self._axes, shape = mesh_axes(self._mesh), self._mesh.shape
        self.devices: list[jax.Device] = list(self._mesh.devices.flat)  # also those of other processes
        # The number of devices along data, fsdp and tensor.
        self.sizes = {axis: math.prod(shape[name] for name in names) for axis, names in self._axes.items()}
        sizes = self.sizes if self.axis_name is None else dict.fromkeys(self.sizes, 1)  # a replica holds all
        self.specs: Mapping[str, ParamSpec] = {spec.path: spec for spec in param_specs(params, parallel, sizes)}
        unmapped = ", ".join(unmapped_axes(params, parallel))
        note = f"logical axes that parallel.axis_rules does not map, replicated: {unmapped}"
        self.notes = (note,) if unmapped else ()  # lines for the user
        # The number of shards of a batch; the number of examples is a multiple of it.
        self.batch_shards = math.prod(self.sizes[axis] for axis in BATCH_AXES)
        self.batch_sharding = named_sharding(self._mesh, (BATCH_AXES,))
        self._replicated = named_sharding(self._mesh, ())

    def shardings(self, state: TrainState) -> TrainState:
        """The sharding of each array of a state, of which only paths and shapes are used."""
        strategy_axes, replicated = STRATEGIES[self._parallel.strategy], jax.tree.map(lambda _: self._replicated, state)
        opt_state_only_axes = set(strategy_axes.opt_state) - set(strategy_axes.params)
        return replicated.replace(
            params=self._like_params(state.params, replicate=opt_state_only_axes),
            opt_state=self._like_params(state.opt_state),
            ema=self._like_params(state.ema, replicate=opt_state_only_axes),
        )

    def _like_params(self, tree: Any, *, replicate: Collection[str] = (), max_mesh_axes: int | None = None) -> Any:
        def sharding(keys: Any, leaf: Any) -> NamedSharding:
            return self.sharding(path_of(keys), leaf.shape, replicate=replicate, max_mesh_axes=max_mesh_axes)

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def sharding(
        self,
        path: str,
        shape: Sequence[int],
        *,
        replicate: Collection[str] = (),
        max_mesh_axes: int | None = None,
    ) -> NamedSharding:
        """The sharding of an array by its path and shape.

        An array gets the sharding of the parameter whose path is a suffix of the array's path, if the shapes are equal;
        otherwise it is replicated. Axes in `replicate` shard nothing; `max_mesh_axes` is as in `named_sharding`.
        """
        while path:
            spec = self.specs.get(path)
            if spec is not None and spec.shape == tuple(shape):
                axes = [None if axis in replicate else axis for axis in spec.axes]
                return named_sharding(self._mesh, axes, max_mesh_axes) if any(axes) else self._replicated
            path = path.partition("/")[2]
        return self._replicated

    def abstract_state(self, init: Callable[[], TrainState]) -> TrainState:
        """The abstract state, a `jax.ShapeDtypeStruct` with its sharding for each array; nothing is computed."""
        shapes = jax.eval_shape(init)
        return jax.tree.map(_abstract, shapes, self.shardings(shapes))

    @property
    def is_one_cpu(self) -> bool:
        """Whether there is one device, a CPU: its memory is that of the host, so no batch has to be moved."""
        return len(self.devices) == 1 and self.devices[0].platform == "cpu"

    def jit_init(self, init: Callable[[], TrainState], state: TrainState) -> Any:
        """The jitted function that makes the state, each shard on its device. `state` may be abstract."""
        return jax.jit(init, out_shardings=self.shardings(state), compiler_options=quick_options(self.devices))

    def local_positions(self, batch_size: int) -> np.ndarray:
        """The positions in a global batch of the examples that this process reads, int64, ascending."""
        return local_positions(self.batch_sharding, batch_size)

    def shard_batch(self, batch: Batch) -> Batch:
        """A host batch, NumPy arrays of the examples at this process's `local_positions`, on the devices.

        On a single CPU device under `jax.jit`, it returns the NumPy arrays themselves, which `jax.jit` takes faster.
        """
        return {name: self._shard(x) for name, x in batch.items()}

    def global_batch(self, batch: Batch) -> Batch:
        """The same as global arrays, also under `pmap`, for functions that are not steps."""
        return {name: global_array(self.batch_sharding, x) for name, x in batch.items()}

    def abstract_batch(self, batch: Mapping[str, Any]) -> Batch:
        """The result of `shard_batch` for a global batch, abstract: a `jax.ShapeDtypeStruct` for each array."""
        return {name: self._abstract(x) for name, x in batch.items()}

    def constrain_gradients(self, gradients: Any) -> Any:
        """Called inside a step: returns the gradients in the sharding in which they are summed."""
        return gradients  # unchanged, unless a strategy overrides this method

    def jit_train(self, step: Callable, state: TrainState) -> Callable[[TrainState, Batch], Any]:
        """The jitted update: it donates its state, and returns one with the same shardings. `state` may be abstract."""
        return self._jit(step, state, train=True)

    def jit_eval(self, step: Callable, state: TrainState) -> Callable[[TrainState, Batch], Metrics]:
        """The jitted evaluation, whose metrics are replicated. `state` may be abstract."""
        return self._jit(step, state, train=False)

    def jit_predict(self, predict: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
        """The jitted predictions for global arrays, (variables, batch) → arrays, which are replicated."""
        return jax.jit(predict, out_shardings=self._replicated)

    @abc.abstractmethod
    def _shard(self, x: np.ndarray) -> Any: ...

    @abc.abstractmethod
    def _abstract(self, x: Any) -> jax.ShapeDtypeStruct: ...

    @abc.abstractmethod
    def _jit(self, step: Callable, state: TrainState, *, train: bool) -> Callable: ...


class Sharded(Strategy):
    """`jax.jit` over a mesh: a step sees global arrays and XLA adds the communication."""

    def constrain_gradients(self, gradients: Any) -> Any:
        """Gives the gradients the sharding of the optimizer state, over one axis of the mesh after the other.

        So XLA:TPU reduces and scatters along each dimension of a torus. Over all axes at once it would sum everything
        everywhere and drop most of the result.
        """
        for used in range(1, len(self._axes["fsdp"]) + 1):
            shardings = self._like_params(gradients, max_mesh_axes=used)
            gradients = jax.lax.with_sharding_constraint(gradients, shardings)
        return gradients

    def _shard(self, x: np.ndarray) -> Any:
        if self.is_one_cpu:
            return x  # jit takes NumPy arrays, six times faster than device_put
        return global_array(self.batch_sharding, x)

    def _abstract(self, x: Any) -> jax.ShapeDtypeStruct:
        return _abstract(x, self.batch_sharding)

    def jit_predict(self, predict: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
        """As that of `Strategy`."""
        return jax.jit(self._traced(predict), out_shardings=self._replicated)

    def _jit(self, step: Callable, state: TrainState, *, train: bool) -> Callable:
        shardings = self.shardings(state)
        return jax.jit(
            self._traced(step),
            in_shardings=(shardings, self.batch_sharding),
            # Pinned: with XLA's choice the second step would compile again.
            out_shardings=(shardings, self._replicated) if train else self._replicated,
            donate_argnums=0 if train else (),
        )

    def _traced(self, function: Callable) -> Callable:
        """The function under the mesh and the rules that `nn.with_logical_constraint` uses."""
        names = {axis: named_sharding(self._mesh, (axis,)).spec[0] for axis in self._axes}
        rules = [(name, names.get(axis or "")) for name, axis in axis_rules(self._parallel)]
        rules = [("batch", self.batch_sharding.spec[0]), *rules]

        def traced(state: Any, batch: Batch) -> Any:
            with use_abstract_mesh(self._mesh.abstract_mesh), nn.logical_axis_rules(rules):
                return function(state, batch)

        traced.__name__ = getattr(function, "func", function).__name__  # which profiles show
        return traced


class Pmapped(Strategy):
    """`jax.pmap`: a step sees one replica's examples, sums gradients over replicas, and draws its own dropout masks."""

    axis_name = REPLICA_AXIS

    def _shard(self, x: np.ndarray) -> Any:
        """An array [replicas of this process, examples of one replica, …]."""
        here = NamedSharding(self._mesh.local_mesh, self.batch_sharding.spec)
        return jax.device_put(x.reshape(here.num_devices, -1, *x.shape[1:]), here)

    def _abstract(self, x: Any) -> jax.ShapeDtypeStruct:
        replicas = len(self.devices)
        here = replicas if jax.process_count() == 1 else len(self.batch_sharding.addressable_devices)
        return jax.ShapeDtypeStruct((here, x.shape[0] // replicas, *x.shape[1:]), x.dtype)

    def _jit(self, step: Callable, state: TrainState, *, train: bool) -> Callable:
        mapped = jax.pmap(
            step,
            self.axis_name,
            in_axes=(None, 0),
            out_axes=(None, None) if train else None,  # replicated, without a replica axis
            donate_argnums=0 if train else (),
            devices=self.devices,
        )
        if jax.process_count() == 1:
            return mapped

        def on_global(state: TrainState, batch: Batch) -> Any:  # jax.pmap takes and gives arrays of this process
            here = NamedSharding(self._mesh.local_mesh, PartitionSpec())
            results = mapped(jax.tree.map(lambda x: _with_sharding(x, here), state), batch)
            return jax.tree.map(lambda x: _with_sharding(x, self._replicated), results)

        return on_global


def _abstract(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _with_sharding(x: Any, replicated: NamedSharding) -> Any:
    """The buffers of a replicated array as an array that is replicated over more devices, or over fewer."""
    if isinstance(x, jax.core.Tracer):
        return x
    return jax.make_array_from_single_device_arrays(x.shape, replicated, [shard.data for shard in x.addressable_shards])


def local_positions(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The positions in a global batch of the examples that this process reads, int64, ascending.

    They need not be consecutive: on a slice of a torus the chips of a host form a block.
    """
    every = np.arange(batch_size)
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([every[i] for i in indices]))


def global_array(sharding: NamedSharding, x: np.ndarray) -> jax.Array:
    """The global array of which `x` holds the examples at this process's `local_positions`, in their order."""
    if jax.process_count() == 1:
        return jax.make_array_from_process_local_data(sharding, x)
    shards = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
    local_shards = local_positions(sharding, shards)
    size = len(x) // len(local_shards)

    def shard(index: Any) -> np.ndarray:
        start = int(np.searchsorted(local_shards, (index[0].start or 0) // size)) * size
        return x[start : start + size]

    return jax.make_array_from_callback((shards * size, *x.shape[1:]), sharding, shard)

"""Sharded: `jax.jit` over a mesh of devices; a step sees global arrays and XLA adds the communication."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, use_abstract_mesh

from trainer.experiment import Batch, Metrics
from trainer.parallel.mesh import Grid
from trainer.parallel.placement import Placement
from trainer.parallel.rows import global_array, local_rows
from trainer.rules import path_of
from trainer.state import TrainState
from trainer.step import EvalStep, TrainStep

_ROWS = ("data", "fsdp")  # the axes that split a batch


class Sharded:
    """Batches are split over data and fsdp; parameters and what follows them go where their placements say."""

    axis_name = None

    def __init__(
        self,
        grid: Grid,
        placements: Sequence[Placement],
        axis_rules: Sequence[tuple[str, str | None]],
        *,
        whole_params: bool = False,
    ) -> None:
        """Prepares nothing on the devices.

        Args:
          grid: the devices.
          placements: one for each parameter.
          axis_rules: what the logical axes of activations mean while a step is traced.
          whole_params: whether fsdp splits the optimizer's state only (`zero1`).
        """
        self.grid = grid
        self.placements: Mapping[str, Placement] = {placement.path: placement for placement in placements}
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
    def row_shards(self) -> int:
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
            placement = self.placements.get(path)
            if placement is not None and placement.shape == tuple(shape):
                axes = [None if whole and axis == "fsdp" else axis for axis in placement.axes]
                return self.grid.sharding(axes, depth)
            path = path.partition("/")[2]
        return self.replicated

    def place_gradients(self, gradients: Any) -> Any:
        """Lays gradients out as the optimizer's state is, so that each is summed where it is used.

        One mesh axis after the other: so XLA:TPU reduces and scatters along each dimension of a torus. All at once
        would become the sum of everything everywhere, of which most is thrown away.
        """
        for depth in range(1, len(self.grid.axes["fsdp"]) + 1):
            gradients = jax.lax.with_sharding_constraint(gradients, self._like_params(gradients, depth=depth))
        return gradients

    def abstract(self, make_state: Callable[[], TrainState]) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        shapes = jax.eval_shape(make_state)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self.shardings(shapes),
        )

    def create(self, make_state: Callable[[], TrainState]) -> TrainState:
        """The state, each part made where it will live."""
        return jax.jit(make_state, out_shardings=self.shardings(jax.eval_shape(make_state)))()

    def local_rows(self, batch_size: int) -> np.ndarray:
        """The rows of a global batch that this process holds, int64, ascending."""
        return local_rows(self.rows, batch_size)

    def put(self, batch: Batch) -> Batch:
        """The batch, of which this process gives its `local_rows`, with its rows split over the devices."""
        if len(self.devices) == 1 and self.devices[0].platform == "cpu":
            return batch  # it is where it should be; jit takes it as it is, sixfold faster than device_put
        return {name: global_array(self.rows, x) for name, x in batch.items()}

    def abstract_batch(self, batch: Mapping[str, Any]) -> Batch:
        """The global batch's shapes and dtypes."""
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows) for name, x in batch.items()}

    def compile_train(self, step: TrainStep, state: TrainState) -> Callable[[TrainState, Batch], Any]:
        """Output shardings are pinned to the input's: left to XLA, the second step would compile again."""
        shardings = self.shardings(state)
        return jax.jit(
            self._with_names(step),
            in_shardings=(shardings, self.rows),
            out_shardings=(shardings, self.replicated),
            donate_argnums=0,
        )

    def compile_eval(self, step: EvalStep, state: TrainState) -> Callable[[TrainState, Batch], Metrics]:
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

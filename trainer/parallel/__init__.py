"""How a step spreads over devices: two strategies behind one protocol, writing the same checkpoint."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from trainer import config
from trainer.errors import UserError
from trainer.experiment import Batch, Metrics
from trainer.parallel.pmapped import Pmapped
from trainer.parallel.sharded import Sharded
from trainer.state import TrainState
from trainer.step import EvalStep, TrainStep


class Parallel(Protocol):
    """A strategy. `axis_name` is what a step needs to know of it: the replica axis, or None when arrays are global."""

    devices: list[jax.Device]

    @property
    def axis_name(self) -> str | None:
        """The replica axis, or None."""
        ...

    def abstract(self, make_state: Callable[[], TrainState]) -> TrainState:
        """The state as shapes, dtypes and shardings; nothing is computed."""
        ...

    def create(self, make_state: Callable[[], TrainState]) -> TrainState:
        """The state, made on the devices."""
        ...

    def put(self, batch: Batch) -> Batch:
        """A host batch (this process's rows, NumPy) on the devices."""
        ...

    def abstract_batch(self, batch: Batch) -> Batch:
        """What `put` would make of a batch, in shapes and dtypes."""
        ...

    def compile_train(self, step: TrainStep, state: TrainState) -> Callable[[TrainState, Batch], Any]:
        """The compiled update; it consumes the state that it is given. `state` may be abstract."""
        ...

    def compile_eval(self, step: EvalStep, state: TrainState) -> Callable[[TrainState, Batch], Metrics]:
        """The compiled evaluation; metrics come back replicated."""
        ...


def build_parallel(parallel: config.Parallel) -> Parallel:
    """The strategy that a config describes, over this machine's devices."""
    devices = jax.local_devices()
    if parallel.devices > len(devices):
        raise UserError(
            f"parallel.devices is {parallel.devices}, but this machine has {len(devices)}; for fake CPU devices set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={parallel.devices}"
        )
    devices = devices[: parallel.devices or None]
    return Pmapped(devices) if parallel.strategy == "pmap" else Sharded(devices, parallel.rules)


def check_divides(run: config.Run, devices: int) -> None:
    """Raises `UserError` unless every batch and microbatch spreads evenly over the devices."""
    part = run.batch_size // run.microbatches
    if part % devices:
        what = f"batch_size {run.batch_size}" + (f" in {run.microbatches} microbatches" if run.microbatches > 1 else "")
        raise UserError(
            f"{what} does not divide over {devices} devices: it must be a multiple of {devices * run.microbatches}"
        )
    if run.evaluation.batch_size % devices:
        raise UserError(
            f"evaluation.batch_size {run.evaluation.batch_size} does not divide over {devices} devices: it must be a "
            f"multiple of {devices}"
        )

"""How the steps of a run spread over its devices: a mesh, the sharding of each parameter, and a strategy."""

from collections.abc import Sequence
from typing import Any

import jax

from trainer import config
from trainer.errors import UserError
from trainer.sharding.mesh import STRATEGIES as STRATEGIES
from trainer.sharding.mesh import axis_sizes as axis_sizes
from trainer.sharding.strategies import Pmapped, Sharded, Strategy


def build_strategy(parallel: config.Parallel, params: Any, devices: Sequence[jax.Device] | None = None) -> Strategy:
    """The strategy that a config describes.

    Args:
      parallel: the settings.
      params: the parameters, abstract or not, with the boxes that name logical axes, if there are any.
      devices: the devices to use; by default all, or the first `parallel.devices`.

    Raises:
      UserError: missing devices, sizes that do not divide the devices, or a rule that does not fit the parameters.
    """
    kind = Pmapped if parallel.strategy == "pmap" else Sharded
    return kind(parallel, _devices(parallel) if devices is None else devices, params)


def _devices(parallel: config.Parallel) -> Sequence[jax.Device]:
    devices = jax.devices()
    if (parallel.devices or 0) > len(devices):
        raise UserError(
            f"parallel.devices is {parallel.devices}, but there are {len(devices)}; for fake CPU devices set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={parallel.devices}"
        )
    if parallel.devices and jax.process_count() > 1 and parallel.devices < len(devices):
        must = f"a run of several processes must use all of its {len(devices)} devices"
        raise UserError(f"parallel.devices is {parallel.devices}, but {must}")
    return devices[: parallel.devices]


def check_divides(run: config.Run, shards: int) -> None:
    """Raises `UserError` unless every batch and microbatch divides into this many batch shards."""
    microbatches = f" in {run.microbatches} microbatches" if run.microbatches > 1 else ""
    for name, size, text, parts in (
        ("batch_size", run.batch_size, microbatches, run.microbatches),
        ("evaluation.batch_size", run.evaluation.batch_size or run.batch_size, "", 1),
        *((f"evaluations.{k}.batch_size", e.batch_size or run.batch_size, "", 1) for k, e in run.evaluations.items()),
    ):
        if size // parts % shards:
            must = f"it must be a multiple of {shards * parts}"
            raise UserError(f"{name} {size}{text} does not divide over {shards} batch shards: {must}")

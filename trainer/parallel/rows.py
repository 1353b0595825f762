"""Rows of global arrays: which of them a process holds, and how it hands them in."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """Those of `rows` rows, int64 and ascending, that lie on devices of this process.

    They need not follow each other: on a slice of a torus the chips of a host are a block, not a run.
    """
    every = np.arange(rows)
    return np.unique(np.concatenate([every[i] for i in sharding.addressable_devices_indices_map((rows,)).values()]))


def global_array(sharding: NamedSharding, x: np.ndarray) -> jax.Array:
    """The array of which this process gives its `local_rows`, in their order."""
    if jax.process_count() == 1:
        return jax.make_array_from_process_local_data(sharding, x)
    shards = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
    mine = local_rows(sharding, shards)
    rows = len(x) // len(mine)

    def part(index: Any) -> np.ndarray:
        start = int(np.searchsorted(mine, (index[0].start or 0) // rows)) * rows
        return x[start : start + rows]

    return jax.make_array_from_callback((shards * rows, *x.shape[1:]), sharding, part)

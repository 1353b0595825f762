"""Costs of saving and restoring: blocking and whole time of a save against a raw write, verification against a read.

    python -m benchmarks.checkpoint [--megabytes=400] [--rounds=7] [--folder=DIR]

In each round, in turn: the same bytes written to one file with fsync; the state saved by `Store`, checksums included;
the state read by Orbax alone; its checksums made. Medians of the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import header
from trainer import config
from trainer.checkpoint import DataIdentity, Metadata, Store
from trainer.checkpoint.checksum import finite_and_checksums
from trainer.checkpoint.reading import read_arrays
from trainer.state import TrainState

LEAVES = 48  # parameters, each with two moments


def make_state(megabytes: int) -> TrainState:
    """A state of random float32 arrays."""
    size = megabytes * 10**6 // (4 * 3 * LEAVES)
    keys = jax.random.split(jax.random.key(0), 3 * LEAVES)
    arrays = [jax.random.normal(key, (size // 256, 256)) for key in keys]
    params, mu, nu = ({f"layer_{i}": arrays[LEAVES * j + i] for i in range(LEAVES)} for j in range(3))
    return jax.block_until_ready(TrainState(jnp.zeros((), jnp.int32), params, {}, {"mu": mu, "nu": nu}))


def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    """An array without its values."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def seconds(action: Callable[[], Any]) -> float:
    """How long an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def raw_write(file: Path, arrays: list[np.ndarray]) -> None:
    """The bytes of all arrays in one file, on disk."""
    with file.open("wb") as stream:
        for array in arrays:
            stream.write(array.data)
        stream.flush()
        os.fsync(stream.fileno())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="on the disk to measure (default: the temporary folder)")
    options = parser.parse_args()
    print(header())
    state = make_state(options.megabytes)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    times: dict[str, list[float]] = {}

    def measure(name: str, action: Callable[[], Any]) -> None:
        times.setdefault(name, []).append(seconds(action))

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = Store(Path(folder) / "checkpoints", config.Checkpoint(keep_last=1))
        for step in range(1, options.rounds + 2):
            arrays = [np.asarray(x) for x in jax.tree.leaves(state)]
            measure("raw write with fsync", lambda arrays=arrays: raw_write(Path(folder) / "raw", arrays))
            metadata = Metadata(step, {"$class": "none"}, {}, DataIdentity(1, None), 0, {})
            began = time.perf_counter()
            measure("save: blocking", lambda metadata=metadata: store.save(state, metadata))
            store.wait()
            times.setdefault("save: whole", []).append(time.perf_counter() - began)
            like, place = jax.tree.map(abstract, state), store.path(step)
            measure("restore: read", lambda like=like, place=place: jax.block_until_ready(read_arrays(like, place)))
            measure("restore: checksums", lambda: finite_and_checksums(state))
        store.close()
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first compiles
    print(f"{size:,} bytes, {len(jax.tree.leaves(state))} arrays, {options.rounds} rounds")
    for name, value in medians.items():
        print(f"{name:22} {value:7.3f} s   {size / value / 1e9:6.2f} GB/s")
    ratio = statistics.median(
        a / b for a, b in zip(times["save: whole"][1:], times["raw write with fsync"][1:], strict=True)
    )
    print(f"save / raw write: {ratio:.2f} (bar: 2.0)")
    print(f"blocking: {medians['save: blocking']:.3f} s (bar: 0.15)")
    whole = medians["restore: read"] + medians["restore: checksums"]
    print(f"verification / restore: {medians['restore: checksums'] / whole:.3f} (bar: 0.25)")


if __name__ == "__main__":
    main()

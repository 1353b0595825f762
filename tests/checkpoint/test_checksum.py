"""One flipped bit changes the checksum, and the sharding does not."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from trainer.checkpoint.checksum import checksum_on_host, finite_and_checksums

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, np.int8, np.uint32, np.bool, np.complex64)
SHAPES = ((), (1,), (5,), (3, 4), (2, 3, 4, 5), (0,), (4, 0))


def random(shape: tuple[int, ...], dtype) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return (data % 2).astype(bool).reshape(shape) if dtype is np.bool else data.view(dtype).reshape(shape)


def reference(x: np.ndarray) -> int:
    """The sum of the docstring in Python's integers."""
    x = x.astype(np.uint8) if x.dtype == np.bool else x
    size = min(x.dtype.itemsize, 4)
    data = x.tobytes()
    words = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
    return sum((2 * i + 1) * word for i, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_devices_and_numpy_compute_the_sum_of_the_docstring(dtype):
    arrays = [random(shape, dtype) for shape in SHAPES]
    _, sums = finite_and_checksums([jnp.asarray(x) for x in arrays])
    assert [int(s) for s in sums] == [checksum_on_host(x) for x in arrays] == [reference(x) for x in arrays]


def test_numpy_sums_arrays_that_are_longer_than_its_blocks():
    x = np.random.default_rng(0).integers(0, 2**32, (1 << 20) + 7, np.uint32)
    weights = 2 * np.arange(len(x), dtype=np.uint32) + np.uint32(1)
    assert checksum_on_host(x) == int(np.sum(x * weights, dtype=np.uint32))


@pytest.mark.parametrize("spec", [("a", "b"), ("b", None), (None, ("a", "b"))])
def test_the_sum_does_not_depend_on_the_sharding(spec):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])
    x = random((16, 8), np.float32)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert int(finite_and_checksums([sharded])[1][0]) == checksum_on_host(x)


def test_every_flipped_bit_and_every_exchange_of_two_elements_changes_the_sum():
    x = random((6, 7), np.float32)
    flat, whole = x.reshape(-1).view(np.uint32), checksum_on_host(x)
    for position in range(len(flat)):
        for bit in range(32):
            changed = flat.copy()
            changed[position] ^= np.uint32(1 << bit)
            assert checksum_on_host(changed) != whole
    for first in range(len(flat)):
        for second in range(first):
            changed = flat.copy()
            changed[[first, second]] = changed[[second, first]]
            assert checksum_on_host(changed) != whole


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (np.nan, False), (np.inf, False), (-np.inf, False)])
def test_it_finds_numbers_that_are_not_finite(value, finite):
    state = {"a": jnp.zeros(3, jnp.bfloat16).at[1].set(value), "count": jnp.asarray(3), "b": jnp.ones(2)}
    assert bool(finite_and_checksums(state)[0]) == finite

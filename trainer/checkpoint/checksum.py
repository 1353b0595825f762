"""Checksums of arrays that do not depend on how the arrays are sharded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def finite_and_checksums(state: Any) -> tuple[bool, UInt32[np.ndarray, " leaves"]]:
    """Whether every floating-point element is finite, and the checksum of each leaf, in one pass over the arrays.

    The checksum of a leaf whose 32-bit words are w₀, w₁, … is Σ (2i + 1)·wᵢ mod 2³². Elements of fewer bits are widened
    to a word each, and elements of 64 bits are two words. An odd weight has an inverse, so one changed word, or any one
    flipped bit, always changes the sum. Each device sums its own shards: no array is gathered.
    """
    # One program for each shape and dtype. One for a whole state of 400 leaves takes 0.6 s longer to load. On fake
    # devices XLA:CPU may deadlock when programs with collectives overlap, so there each ends before the next begins.
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(state)]
    fake = any(d.platform == "cpu" for leaf in leaves if len(leaf.devices()) > 1 for d in leaf.devices())
    results = [jax.device_get(_check(leaf)) if fake else _check(leaf) for leaf in leaves]
    is_finite, checksums = np.array(jax.device_get(results), np.uint32).reshape(-1, 2).T
    return bool(is_finite.all()), checksums


@jax.jit
def _check(x: Array) -> UInt32[Array, "2"]:
    """1 if all elements are finite, else 0; and the checksum."""
    words = _words(x)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in range(words.ndim - 1, -1, -1):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    exponent_mask = _exponent_mask(x.dtype)
    # One reduction of two operands: XLA:CPU makes it ten times as fast as a sum and a test one after the other.
    zero = jnp.zeros((), jnp.uint32)
    total, largest = jax.lax.reduce(
        (words * (2 * index + 1), words & jnp.uint32(exponent_mask)),
        (zero, zero),
        lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])),
        tuple(range(words.ndim)),
    )
    is_finite = largest != exponent_mask
    if not exponent_mask:
        is_finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else True
    return jnp.stack([jnp.asarray(is_finite, jnp.uint32), total])


def _exponent_mask(dtype: Any) -> int:
    """The mask of the exponent bits, which are all 1 only in Inf and NaN; 0 for dtypes without such a mask."""
    if dtype == jnp.complex64:
        dtype = jnp.float32
    if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        return 0
    info = jnp.finfo(dtype)
    return (2**info.nexp - 1) << info.nmant


def _words(x: Array) -> UInt32[Array, "..."]:
    """The elements as 32-bit words. An element of 64 bits is two words in a new last axis."""
    if x.dtype == jnp.bool:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = 8 * x.dtype.itemsize
    if bits == 64:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def checksum_on_host(x: np.ndarray) -> int:
    """The same checksum as `finite_and_checksums` gives, computed by NumPy."""
    if x.dtype == np.bool:
        x = x.astype(np.uint8)
    data = np.ascontiguousarray(x).reshape(-1)
    if np.iscomplexobj(x):
        data = data.view(x.real.dtype)
    words = data.view(np.uint32 if data.dtype.itemsize == 8 else f"uint{8 * data.dtype.itemsize}")
    total, block = 0, 1 << 20
    for start in range(0, len(words), block):
        part = words[start : start + block].astype(np.uint64)
        weights = 2 * np.arange(start, start + len(part), dtype=np.uint64) + 1
        total += int(np.sum((part * (weights & 0xFFFFFFFF)) & 0xFFFFFFFF, dtype=np.uint64))
    return total % 2**32

"""Checksums of arrays that do not depend on how the arrays are sharded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32


@jax.jit
def check_state(state: Any) -> tuple[Bool[Array, ""], UInt32[Array, " leaves"]]:
    """Whether every floating-point element is finite, and the checksum of each leaf, in one pass over the arrays.

    The checksum of a leaf whose 32-bit words are w₀, w₁, … is Σ (2i + 1)·wᵢ mod 2³². Elements of fewer bits are widened
    to a word each, and elements of 64 bits are two words. An odd weight has an inverse, so one changed word, or any one
    flipped bit, always changes the sum. The sum is made where the shards are: no array is gathered.
    """
    leaves = jax.tree.leaves(state)
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in floats]
    sums = [_checksum(leaf) for leaf in leaves]
    return jnp.all(jnp.stack([jnp.asarray(True), *finite])), jnp.stack(sums or [jnp.zeros((), jnp.uint32)])[: len(sums)]


def _checksum(x: Array) -> UInt32[Array, ""]:
    words = _words(x)
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in range(words.ndim - 1, -1, -1):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


def _words(x: Array) -> UInt32[Array, "..."]:
    """The elements as 32-bit words; two words for an element of 64 bits, in a new last axis."""
    if x.dtype == jnp.bool:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = jax.dtypes.bit_width(x.dtype) if hasattr(jax.dtypes, "bit_width") else 8 * x.dtype.itemsize
    if bits == 64:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def checksum_on_host(x: np.ndarray) -> int:
    """The same checksum as `check_state` gives, computed by NumPy."""
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

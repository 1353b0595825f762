"""How moments are stored: in their own dtype, and in bfloat16 by stochastic rounding, so that small changes survive."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Integer, Shaped, UInt32

STORED = ("float32", "float64", "bfloat16")
"""The dtypes that moments may have. Float16 is none of them: a squared gradient of 1e-4 is 0 in it."""


def compute_dtype(dtype: Any) -> Any:
    """The dtype in which a leaf of `dtype` is computed: its own, but no less than float32 (or complex64)."""
    return jnp.promote_types(dtype, jnp.float32)


def storage_dtype(leaf_dtype: Any, asked: Any, *, real: bool = False) -> Any:
    """The dtype of a moment: what was asked for, or the leaf's, but no less than float32; complex with the leaf.

    Args:
      leaf_dtype: of the parameter.
      asked: `mu_dtype` or `nu_dtype`; None for the default.
      real: whether the moment is real even if the leaf is complex.
    """
    dtype = compute_dtype(leaf_dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        if not real:
            return dtype
        dtype = jnp.finfo(dtype).dtype
    return dtype if asked is None else jnp.dtype(asked)


def key_of(seed: int | Integer[Array, ""], count: Int32[Array, ""], stream: int) -> UInt32[Array, ""]:
    """32 bits that look random, for one array in one update: a function of seed, count and the array's number."""
    key = jnp.asarray(seed).astype(jnp.uint32)
    for part in (count.astype(jnp.uint32), jnp.uint32(stream)):
        key = _avalanche(key ^ _avalanche(part + jnp.uint32(0x9E3779B9)))
    return key


def store(x: Shaped[Array, "*shape"], dtype: Any, key: UInt32[Array, ""]) -> Shaped[Array, "*shape"]:
    """`x` in `dtype`; rounded stochastically if that is bfloat16, with the expectation x.

    Rounding to nearest would lose every change below 2⁻⁹ of the value, and with b2 = 0.999 a moment changes by about
    2⁻¹⁰ of itself. Which way a value goes depends on `key` and on its place in the array alone, so the result is the
    same on every topology, and the same again when a run is resumed.
    """
    if dtype != jnp.bfloat16 or x.dtype == jnp.bfloat16:
        return x.astype(dtype)
    return _round(x.astype(jnp.float32), key)


@jax.custom_jvp
def _round(x: Float[Array, "*shape"], key: UInt32[Array, ""]) -> Float[Array, "*shape"]:
    # The carry would make a zero of the largest NaNs. CPU and TPU compute no such NaN, and looking for it there would
    # cost up to a fifth of the update; on NVIDIA devices it is the NaN that arithmetic gives.
    return lax.platform_dependent(x, key, cpu=_carry, tpu=_carry, default=_carry_but_for_nan)


def _carry(x: Float[Array, "*shape"], key: UInt32[Array, ""]) -> Float[Array, "*shape"]:
    # The lower 16 bits are cut off, after a random number of as many bits was added: with the probability that they
    # are of a whole, it carries into the last place that stays. Zero and the infinities stay what they are.
    noise = _hash(x.shape, key) >> 16
    bits = (lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def _carry_but_for_nan(x: Float[Array, "*shape"], key: UInt32[Array, ""]) -> Float[Array, "*shape"]:
    return jnp.where(jnp.isnan(x), x.astype(jnp.bfloat16), _carry(x, key))


@_round.defjvp
def _round_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return _round(*primals), tangents[0].astype(jnp.bfloat16)  # in expectation it is the identity


def _hash(shape: tuple[int, ...], key: UInt32[Array, ""]) -> UInt32[Array, "*shape"]:
    """A number for each element, of which the upper 16 bits are used.

    A single multiplication, because a CPU has no time for more. For a given element the numbers of different updates
    are as independent as their keys, which is what rounding without bias over time needs. In one update those of
    neighbours are correlated (by up to 0.7), much as the points of a lattice: sums over a leaf err less than with
    independent numbers. A flat iota costs XLA nothing, on a mesh either, where one per dimension becomes a small kernel
    each on TPU.
    """
    size = 1
    for n in shape:
        size *= n
    return (lax.iota(jnp.uint32, size).reshape(shape) ^ key) * jnp.uint32(0x9E3779B1)


def _avalanche(x: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """Every bit of the input changes half of the output's (constants: Wellons' hash prospector, lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)

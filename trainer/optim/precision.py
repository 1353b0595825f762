"""Accurate arithmetic in few bits: averages, bias corrections, rectification, and moments rounded stochastically."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, Int32, Integer, Shaped, UInt32

STORED = ("float32", "float64", "bfloat16")
"""The dtypes that moments may have. Float16 is not among them: a squared gradient of 1e-4 would be 0."""


def average(b: Any, mean: Inexact[Array, "*s"], x: Inexact[Array, "*s"]) -> Inexact[Array, "*s"]:
    """b · mean + (1 − b) · x; b = 0 gives x itself.

    If b is a Python number, this is computed as a step from the mean towards x, whose weights sum to 1 in float32. The
    step is clipped by `clip_for_square`: where |x − mean| is above 4.6e18, the result is nearer to the mean.
    """
    if isinstance(b, jax.Array):
        return b * mean + (1 - b) * x
    if b == 0:
        return x
    error = x - mean
    # 0 · error keeps NaN where x is infinite; clipping alone would hide the infinity.
    return mean + (1 - b) * (clip_for_square(error) + 0 * error)


def clip_for_square(x: Inexact[Array, "*s"]) -> Inexact[Array, "*s"]:
    """`x` clipped to ±√max/4, which is 4.6e18 in float32, where max is the largest number of its dtype.

    An average of squares would never recover from an infinity.
    """
    if jnp.iscomplexobj(x):
        return lax.complex(clip_for_square(x.real), clip_for_square(x.imag))
    limit = 0.25 * jnp.sqrt(jnp.finfo(x.dtype).max)
    return jnp.clip(x, -limit, limit)


def square(x: Inexact[Array, "*s"]) -> Inexact[Array, "*s"]:
    """|x|², real."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def global_norm(arrays: Sequence[Any]) -> Float[Array, ""]:
    """The Euclidean norm of arrays taken as one vector, in float32 or wider."""
    squares = [jnp.sum(square(x.astype(compute_dtype(x.dtype)))) for x in arrays]
    return jnp.sqrt(sum(squares, jnp.zeros(())))


def divide(sums: Any, weight: Float[Array, ""]) -> Any:
    """A tree of sums over a weight, as products: 1/weight is rounded to float32 or wider, and so is each product.

    XLA:CPU would write quotients to memory, so as to make none twice. It makes a product wherever it is read.
    """

    def divided(x: Array) -> Array:
        return (x * (1 / weight.astype(compute_dtype(x.dtype)))).astype(x.dtype)

    return jax.tree.map(divided, sums)


def one_minus_power(b: Any, t: Int32[Array, ""]) -> Array:
    """1 − b^t without cancellation: in float32, 1 − 0.999^1 would have a relative error of 5e-5."""
    if isinstance(b, jax.Array):
        return -jnp.expm1(t * jnp.log(b))
    return -jnp.expm1(t * math.log(b)) if b else jnp.ones(())


def rectification(b2: Any, t: Int32[Array, ""]) -> tuple[Array, Array]:
    r"""RAdam's factor r of update t, and whether the variance is still intractable (Liu et al., arXiv:1908.03265).

    .. math::

      N_\infty = \frac{2}{1 - b_2} - 1, \quad N = N_\infty - \frac{2 t b_2^t}{1 - b_2^t}, \quad
      r = \sqrt{\frac{(N - 4)(N - 2) N_\infty}{(N_\infty - 4)(N_\infty - 2) N}} \quad \text{where } N \ge 5

    At first, N is the difference of two numbers near 2/(1 − b2). With δ = −ln b2 and the Langevin function
    L(y) = coth y − 1/y nothing cancels: N∞ = 2/δ + L(δ/2) and N = L(δ/2) + t·(1 − L(tδ/2)).
    """
    delta = -(jnp.log(b2) if isinstance(b2, jax.Array) else jnp.asarray(math.log(b2) if b2 else -math.inf))
    langevin = 1 - _one_minus_langevin(delta / 2)
    n_infinity, n = 2 / delta + langevin, langevin + t * _one_minus_langevin(t * delta / 2)
    intractable = n < 5
    # The factor must be finite where it is not used, too: derivatives go through both branches of a `where`.
    n, n_infinity = jnp.maximum(n, 5.0), jnp.maximum(n_infinity, 5.0)
    return jnp.sqrt((n - 4) * (n - 2) * n_infinity / ((n_infinity - 4) * (n_infinity - 2) * n)), intractable


def _one_minus_langevin(y: Array) -> Array:
    """1 − coth y + 1/y, for y > 0; below 1/4 by the series of coth, where the two nearly cancel."""
    small, large = jnp.minimum(y, 0.25), jnp.maximum(y, 0.25)
    z = small * small
    tail = 1 / 4725 - z * (2 / 93555 - z * (1382 / 638512875))
    series = small * (1 / 3 - z * (1 / 45 - z * (2 / 945 - z * tail)))
    return jnp.where(y < 0.25, 1 - series, 1 / large - 2 / jnp.expm1(2 * large))


def compute_dtype(dtype: Any) -> Any:
    """The dtype in which a parameter of `dtype` is updated: its own, but at least float32 (or complex64)."""
    return jnp.promote_types(dtype, jnp.float32)


def storage_dtype(param_dtype: Any, requested: Any, *, real: bool = False) -> Any:
    """The dtype of a moment: the requested one, or the parameter's, but at least float32.

    Args:
      param_dtype: of the parameter; a moment of a complex parameter is complex.
      requested: `mu_dtype` or `nu_dtype`; None for the default.
      real: whether the moment is real even if the parameter is complex.
    """
    dtype = compute_dtype(param_dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        if not real:
            return dtype
        dtype = jnp.finfo(dtype).dtype
    return dtype if requested is None else jnp.dtype(requested)


def check_precision(param_dtype: Any, rule: Any, mu_dtype: Any, nu_dtype: Any) -> None:
    """Raises `ValueError` for a moment dtype that is not in `STORED`, and for an eps that the arithmetic would lose."""
    for name, requested in (("mu_dtype", mu_dtype), ("nu_dtype", nu_dtype)):
        if requested is not None and _name(requested) not in STORED:
            raise ValueError(f"{name} is {_name(requested)}; moments are stored as {', '.join(STORED)}")
    computed = jnp.finfo(compute_dtype(param_dtype)).dtype
    stored = storage_dtype(param_dtype, nu_dtype, real=True)
    # eps_root is added to the second moment and must not be lost when that is stored, either.
    for name, used in (("eps", computed), ("eps_root", computed), ("eps_root", stored)):
        value, smallest = getattr(rule, name, 0.0), float(jnp.finfo(used).tiny)
        if isinstance(value, float | int) and 0 < value < smallest:
            raise ValueError(f"{name} is {value}, which is 0 in {used}; its smallest number is {smallest:.3g}")


def _name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def rounding_bits(seed: int | Integer[Array, ""], count: Int32[Array, ""], stream: int) -> UInt32[Array, ""]:
    """32 bits that look random, for one array in one update: a function of seed, count and the array's number."""
    key = jnp.asarray(seed).astype(jnp.uint32)
    for part in (count.astype(jnp.uint32), jnp.uint32(stream)):
        key = _avalanche(key ^ _avalanche(part + jnp.uint32(0x9E3779B9)))
    return key


def round_to_storage(x: Shaped[Array, "*shape"], dtype: Any, key: UInt32[Array, ""]) -> Shaped[Array, "*shape"]:
    """`x` in `dtype`; rounded stochastically if that is bfloat16, with the expectation x.

    Rounding to nearest would lose every change below 2⁻⁹ of the value, and with b2 = 0.999 a moment changes by about
    2⁻¹⁰ of its value. Rounding up or down depends only on `key` and on the element's index in the array, so the result
    is the same on every topology, and the same again when a run is resumed.
    """
    if dtype != jnp.bfloat16 or x.dtype == jnp.bfloat16:
        return x.astype(dtype)
    return _round(x.astype(jnp.float32), key)


def rounded_update(u: Array, p: Array, key: Array) -> Array:
    """The float32 update that moves bfloat16 p to p + u, rounded up or down with the expectation p + u.

    Rounding to nearest would lose every update below 2⁻⁹ of its parameter. The difference of two bfloat16 numbers is
    exact in float32, or so nearly that adding it to p gives the rounded number.
    """
    wide = p.astype(u.dtype)
    return round_to_storage(wide + u, p.dtype, key).astype(u.dtype) - wide


def store_moment(due: Any, seed: Any, count: Array, number: int, x: Array, old: Array, *, second: bool) -> Array:
    """A new moment of leaf `number` in the dtype of the old one, or the old one where the group is not due."""
    if old.dtype == jnp.bfloat16:
        x = round_to_storage(x, old.dtype, rounding_bits(seed, count, 2 * number + second))
    else:  # no random bits are needed; skipping `rounding_bits` saves tracing time
        x = x.astype(old.dtype)
    return x if due is None else jnp.where(due, x, old)


@jax.custom_jvp
def _round(x: Float[Array, "*shape"], key: UInt32[Array, ""]) -> Float[Array, "*shape"]:
    # `_carry` would turn NaNs with the largest bit patterns into zeros. Arithmetic on CPU and TPU never gives such a
    # NaN, and a test for it would cost up to a fifth of the update. Arithmetic on NVIDIA devices does give it.
    return lax.platform_dependent(x, key, cpu=_carry, tpu=_carry, default=_carry_but_for_nan)


def _carry(x: Float[Array, "*shape"], key: UInt32[Array, ""]) -> Float[Array, "*shape"]:
    # A random 16-bit number is added before the lower 16 bits are cut off: it carries into the last place that is kept
    # with a probability proportional to the bits that are cut off. Zero and the infinities are not changed.
    noise = _hash(x.shape, key) >> 16
    bits = (lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def _carry_but_for_nan(x: Float[Array, "*shape"], key: UInt32[Array, ""]) -> Float[Array, "*shape"]:
    return jnp.where(jnp.isnan(x), x.astype(jnp.bfloat16), _carry(x, key))


@_round.defjvp
def _round_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return _round(*primals), tangents[0].astype(jnp.bfloat16)  # in expectation, rounding is the identity


def _hash(shape: tuple[int, ...], key: UInt32[Array, ""]) -> UInt32[Array, "*shape"]:
    """A number for each element, of which the upper 16 bits are used.

    One multiplication is all that a CPU has time for. The numbers of one element in different updates are as
    independent as the keys of these updates; rounding without bias over time needs no more. In one update the numbers
    of neighbours are correlated (by up to 0.7), like the points of a lattice: sums over an array err less than with
    independent numbers. XLA computes a flat iota at no cost, on a mesh too; an iota for each dimension would become a
    small kernel each on TPU.
    """
    numbers = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return (numbers ^ key) * jnp.uint32(0x9E3779B1)


def _avalanche(x: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """A hash in which every bit of the input changes half of the output's (lowbias32 of Wellons' hash prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def opaque(numbers: Any) -> Any:
    """Returns the numbers behind an optimization barrier, so that XLA treats them as arguments, not as constants.

    Without the barrier XLA folds constants: x · 0.002 · 0.01 becomes x · 0.00002, which is rounded differently. With
    the barrier, `trainer.compile_once` can turn the constants into arguments without changing a bit of the results.
    """
    return lax.optimization_barrier(numbers)

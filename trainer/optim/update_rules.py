"""How a gradient becomes a direction, element by element: AdaBelief, and Adam and momentum to compare it with.

Every class has the moments it keeps (`first`, and `second` but for momentum), the scalars of an update (`corrections`),
and the `direction` that the new moments give. All of it is elementwise, so that XLA makes one pass over each leaf.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Inexact, Int32

Scalar = Any
"""A Python number, exact in every dtype that it meets, or an array of shape ()."""


class Corrections(NamedTuple):
    """The scalars of one update, the same for all elements.

    Attributes:
      mean: factor of the first moment.
      gradient: factor of the gradient beside it, under Nesterov; else None.
      root: factor of the second moment, inside the root.
      undivided: whether the direction is not divided by the root at all, under rectification; else None.
    """

    mean: Array
    gradient: Array | None
    root: Array | None
    undivided: Array | None


@dataclasses.dataclass(frozen=True)
class Belief:
    """AdaBelief; the mathematics is in `trainer.optim.adabelief`."""

    b1: Scalar = 0.9
    b2: Scalar = 0.999
    eps: Scalar = 1e-16
    eps_root: Scalar = 1e-16
    nesterov: bool = False
    rectify: bool = False
    sgd_fallback: bool = True

    centred = True  # the second moment is that about the mean

    def first(self, g: Inexact[Array, "*s"], m: Inexact[Array, "*s"]) -> Inexact[Array, "*s"]:
        """The mean gradient."""
        return average(self.b1, m, g)

    def second(self, g: Inexact[Array, "*s"], m: Inexact[Array, "*s"], s: Inexact[Array, "*s"]) -> Any:
        """The mean squared error of the new mean `m` as a prediction of `g`."""
        # As a step towards the error rather than as b2·s + (1 − b2)·e²: in float32 1 − 0.999 is exact to 6e-8 of
        # itself, but 0.999 leaves 1e-5 of it out. And it ends on a sum of two arrays: XLA:CPU recomputes what ends
        # on one array and a scalar (`nu + eps_root`, as in Optax) in every fusion that reads it, from copies of the
        # old moments.
        return (1 - self.b2) * (square(squarable(g - m)) - s) + (s + self.eps_root)

    def corrections(self, t: Int32[Array, ""]) -> Corrections:
        """The scalars of update t, counted from 1, in the widest float that is enabled."""
        mean, gradient = _mean_corrections(self.b1, t, self.nesterov)
        remaining = one_minus_power(self.b2, t)
        if not self.rectify:
            return Corrections(mean, gradient, 1 / remaining, None)
        factor, undivided = rectification(self.b2, t)
        factor = jnp.where(undivided, 1.0 if self.sgd_fallback else 0.0, factor * jnp.sqrt(remaining))
        return Corrections(mean * factor, None if gradient is None else gradient * factor, None, undivided)

    def direction(self, g: Any, m: Any, s: Any, c: Corrections, scale: Any) -> Any:
        """`scale` times the mean over the root of the second moment."""
        root = jnp.sqrt(s if c.root is None else s * c.root) + self.eps
        if c.undivided is not None:
            root = jnp.where(c.undivided, jnp.ones_like(root), root)
        return _mean(g, m, c, scale) / root


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, 2014, arXiv:1412.6980), as `optax.adam` has it."""

    b1: Scalar = 0.9
    b2: Scalar = 0.999
    eps: Scalar = 1e-8
    eps_root: Scalar = 0.0
    nesterov: bool = False

    centred = False

    def first(self, g: Any, m: Any) -> Any:
        """The mean gradient."""
        return average(self.b1, m, g)

    def second(self, g: Any, m: Any, s: Any) -> Any:
        """The mean squared gradient."""
        del m
        return s + (1 - self.b2) * (square(squarable(g)) - s)

    def corrections(self, t: Int32[Array, ""]) -> Corrections:
        """The scalars of update t."""
        mean, gradient = _mean_corrections(self.b1, t, self.nesterov)
        return Corrections(mean, gradient, 1 / one_minus_power(self.b2, t), None)

    def direction(self, g: Any, m: Any, s: Any, c: Corrections, scale: Any) -> Any:
        """`scale` times the mean over the root of the second moment."""
        return _mean(g, m, c, scale) / (jnp.sqrt(s * c.root + self.eps_root) + self.eps)


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Gradient descent with momentum `b1`: m ← b1·m + g, as `optax.sgd` has it."""

    b1: Scalar = 0.9
    nesterov: bool = False

    def first(self, g: Any, m: Any) -> Any:
        """The sum of past gradients, decayed."""
        return g + self.b1 * m

    def corrections(self, t: Int32[Array, ""]) -> Corrections:
        """None: nothing depends on the count."""
        del t
        one = jnp.ones(())
        return Corrections(one * self.b1, one, None, None) if self.nesterov else Corrections(one, None, None, None)

    def direction(self, g: Any, m: Any, s: Any, c: Corrections, scale: Any) -> Any:
        """`scale` times the momentum."""
        del s
        return _mean(g, m, c, scale)


Scaling = Belief | Adam | Momentum


def average(b: Scalar, m: Inexact[Array, "*s"], g: Inexact[Array, "*s"]) -> Inexact[Array, "*s"]:
    """b·m + (1 − b)·g, as a step towards g, so that the two weights sum to 1 in float32; b = 0 gives g itself."""
    if isinstance(b, jax.Array):
        return b * m + (1 - b) * g
    if b == 0:
        return g
    error = g - m
    # 0 · error is NaN where the gradient is infinite, which must not pass for a large number.
    return m + (1 - b) * (squarable(error) + 0 * error)


def squarable(x: Inexact[Array, "*s"]) -> Inexact[Array, "*s"]:
    """`x` within ±√max/4 of its dtype, 4.6e18 in float32: a square that overflows would be a second moment for ever."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(squarable(x.real), squarable(x.imag))
    limit = 0.25 * jnp.sqrt(jnp.finfo(x.dtype).max)
    return jnp.clip(x, -limit, limit)


def one_minus_power(b: Scalar, t: Int32[Array, ""]) -> Array:
    """1 − b^t without cancellation: in float32, 1 − 0.999^1 would be wrong by 5e-5 of itself."""
    if isinstance(b, jax.Array):
        return -jnp.expm1(t * jnp.log(b))
    return -jnp.expm1(t * math.log(b)) if b else jnp.ones(())


def rectification(b2: Scalar, t: Int32[Array, ""]) -> tuple[Array, Array]:
    r"""RAdam's factor r of update t, and whether the variance is still intractable (arXiv:1908.03265, Liu et al.).

    .. math::

      N_\infty = \frac{2}{1 - b_2} - 1, \quad N = N_\infty - \frac{2 t b_2^t}{1 - b_2^t}, \quad
      r = \sqrt{\frac{(N - 4)(N - 2) N_\infty}{(N_\infty - 4)(N_\infty - 2) N}} \quad \text{where } N \ge 5

    N is the difference of two numbers near 2/(1 − b2) at first. With δ = −ln b2 and the Langevin function
    L(y) = coth y − 1/y, what cancels can be left out: N∞ = 2/δ + L(δ/2) and N = L(δ/2) + t·(1 − L(tδ/2)).
    """
    delta = -(jnp.log(b2) if isinstance(b2, jax.Array) else jnp.asarray(math.log(b2) if b2 else -math.inf))
    first = 1 - _one_minus_langevin(delta / 2)
    most, length = 2 / delta + first, first + t * _one_minus_langevin(t * delta / 2)
    undivided = length < 5
    # Where it is not used it must still be finite, for what is differentiated through it.
    n, limit = jnp.maximum(length, 5.0), jnp.maximum(most, 5.0)
    return jnp.sqrt((n - 4) * (n - 2) * limit / ((limit - 4) * (limit - 2) * n)), undivided


def _one_minus_langevin(y: Array) -> Array:
    """1 − coth y + 1/y, for y > 0; below 1/4 by the series of coth, where the two nearly cancel."""
    small, large = jnp.minimum(y, 0.25), jnp.maximum(y, 0.25)
    z = small * small
    tail = 1 / 4725 - z * (2 / 93555 - z * (1382 / 638512875))
    series = small * (1 / 3 - z * (1 / 45 - z * (2 / 945 - z * tail)))
    return jnp.where(y < 0.25, 1 - series, 1 / large - 2 / jnp.expm1(2 * large))


def _mean_corrections(b1: Scalar, t: Int32[Array, ""], nesterov: bool) -> tuple[Array, Array | None]:
    if not nesterov:
        return 1 / one_minus_power(b1, t), None
    following = jnp.asarray(optax.safe_increment(t))  # t + 1, but never beyond the largest int32
    return b1 / one_minus_power(b1, following), (1 - b1) / one_minus_power(b1, t)


def _mean(g: Any, m: Any, c: Corrections, scale: Any) -> Any:
    mean = (scale * c.mean) * m
    return mean if c.gradient is None else mean + (scale * c.gradient) * g


def square(x: Inexact[Array, "*s"]) -> Inexact[Array, "*s"]:
    """|x|², real."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x

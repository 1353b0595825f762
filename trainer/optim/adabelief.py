"""AdaBelief: steps sized by how far each gradient falls from its prediction (Zhuang et al., 2020, arXiv:2010.07468)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32


class ScaleByBeliefState(NamedTuple):
    """Moments of the gradients.

    Attributes:
      count: updates made.
      mu: mean of the gradients, like the parameters.
      nu: mean of the squared prediction errors, like the parameters.
    """

    count: Int32[Array, ""]
    mu: optax.Updates
    nu: optax.Updates


def scale_by_belief(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-16, eps_root: float = 1e-16
) -> optax.GradientTransformation:
    r"""Divides the mean gradient by the root of its mean squared prediction error.

    .. math::

      m_t &= b_1 m_{t-1} + (1 - b_1) g_t \\
      s_t &= b_2 s_{t-1} + (1 - b_2) (g_t - m_t)^2 + \varepsilon_{root} \\
      u_t &= \frac{m_t / (1 - b_1^t)}{\sqrt{s_t / (1 - b_2^t)} + \varepsilon}

    Args:
      b1: decay of the mean gradient, in [0, 1).
      b2: decay of the mean squared error, in [0, 1).
      eps: added to the denominator.
      eps_root: added to s at every update, where it accumulates: √ŝ never falls below √(eps_root / (1 − b2)).
    """

    def init(params: optax.Params) -> ScaleByBeliefState:
        return ScaleByBeliefState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        )

    def update(
        updates: optax.Updates, state: ScaleByBeliefState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByBeliefState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        # The sum ends on a binary add of two products: XLA then fuses the whole leaf into one pass.
        nu = jax.tree.map(
            lambda g, m, s: (1 - b2) * (g - m) ** 2 + (b2 * s + eps_root),
            updates,
            mu,
            state.nu,
        )
        debias1, debias2 = _one_minus_power(b1, count), _one_minus_power(b2, count)
        scaled = jax.tree.map(lambda m, s: (m / debias1) / (jnp.sqrt(s / debias2) + eps), mu, nu)
        return scaled, ScaleByBeliefState(count, mu, nu)

    return optax.GradientTransformation(init, update)  # pyrefly: ignore[bad-argument-type] - its state is ours


def _one_minus_power(b: float, count: Int32[Array, ""]) -> Float[Array, ""]:
    """1 − b^count without cancellation: in float32, 1 − 0.999^1 would be wrong by 5e-5 of itself."""
    if b == 0:
        return jnp.ones(())
    return -jnp.expm1(count * math.log(b))


def adabelief(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-16,
    eps_root: float = 1e-16,
) -> optax.GradientTransformation:
    """AdaBelief with a learning rate: `scale_by_belief`, then times −learning_rate.

    Args:
      learning_rate: a number, or a schedule of the number of updates already made.
      b1: decay of the mean gradient.
      b2: decay of the mean squared prediction error.
      eps: added to the denominator.
      eps_root: added to the second moment at every update.
    """
    return optax.chain(scale_by_belief(b1, b2, eps, eps_root), optax.scale_by_learning_rate(learning_rate))

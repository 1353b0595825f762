"""Adam and momentum, to compare AdaBelief with: update rules with the methods of `trainer.optim.adabelief.Belief`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int32

from trainer.optim.adabelief import BiasCorrections, mean_corrections
from trainer.optim.precision import average, clip_for_square, one_minus_power, square


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, 2014, arXiv:1412.6980), equal to `optax.adam`."""

    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-8
    eps_root: Any = 0.0
    nesterov: bool = False

    nu_center = "zero"

    def update_mu(self, g: Any, mu: Any) -> Any:
        """The mean gradient."""
        return average(self.b1, mu, g)

    def update_nu(self, g: Any, mu: Any, nu: Any) -> Any:
        """The mean squared gradient."""
        del mu
        return nu + (1 - self.b2) * (square(clip_for_square(g)) - nu)

    def bias_corrections(self, t: Int32[Array, ""]) -> BiasCorrections:
        """The bias corrections of update t."""
        mu, g = mean_corrections(self.b1, t, self.nesterov)
        return BiasCorrections(mu, g, 1 / one_minus_power(self.b2, t))

    def update(self, g: Any, mu: Any, nu: Any, corrections: BiasCorrections, scale: Any) -> Any:
        """`scale` times the mean over the root of the second moment."""
        root = jnp.sqrt(nu * corrections.nu + self.eps_root) + self.eps
        return corrections.mean(g, mu, scale) / root


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Gradient descent with momentum, mu ← b1 · mu + g, equal to `optax.sgd`."""

    b1: Any = 0.9
    nesterov: bool = False

    nu_center = None

    def update_mu(self, g: Any, mu: Any) -> Any:
        """The sum of past gradients, decayed."""
        return g + self.b1 * mu

    def update_nu(self, g: Any, mu: Any, nu: Any) -> Any:
        """No second moment is kept."""
        del g, mu, nu

    def bias_corrections(self, t: Int32[Array, ""]) -> BiasCorrections:
        """The factors of the moment and the gradient, the same in every update."""
        del t
        one = jnp.ones(())
        return BiasCorrections(one * self.b1, one) if self.nesterov else BiasCorrections(one)

    def update(self, g: Any, mu: Any, nu: Any, corrections: BiasCorrections, scale: Any) -> Any:
        """`scale` times the momentum."""
        del nu
        return corrections.mean(g, mu, scale)

"""AdaBelief: its update rule, and the Optax transformations with it (Zhuang et al., 2020, arXiv:2010.07468)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Inexact, Int32

from trainer.optim.fused import ParamGroup, fused_groups
from trainer.optim.precision import average, clip_for_square, one_minus_power, rectification, square


class BiasCorrections(NamedTuple):
    """The factors of one update, the same for all elements."""

    mu: Array  # of the first moment
    g: Array | None = None  # of the gradient that Nesterov's method adds to it
    nu: Array | None = None  # of the second moment, under the root
    intractable: Array | None = None  # under rectification: whether the update is the mean, not divided by the root

    def mean(self, g: Any, mu: Any, scale: Any) -> Any:
        """`scale` times the mean gradient without bias."""
        mean = (scale * self.mu) * mu
        return mean if self.g is None else mean + (scale * self.g) * g


@dataclasses.dataclass(frozen=True)
class Belief:
    r"""AdaBelief's update rule, elementwise, for gradient :math:`g_t` of update t = 1, 2, …:

    .. math::

      \mu_t &= b_1 \mu_{t-1} + (1 - b_1) g_t \\
      \nu_t &= b_2 \nu_{t-1} + (1 - b_2) |g_t - \mu_t|^2 + \varepsilon_{root} \\
      \hat\mu_t &= \mu_t / (1 - b_1^t), \quad \hat\nu_t = \nu_t / (1 - b_2^t) \\
      u_t &= \hat\mu_t / (\sqrt{\hat\nu_t} + \varepsilon)

    With `nesterov`, the corrected mu is b1 · mu / (1 − b1^(t+1)) + (1 − b1) · g / (1 − b1^t). With `rectify`, u is
    r · √(1 − b2^t) · corrected mu / (√nu + eps), where r is RAdam's factor. Until the variance is tractable, u is the
    corrected mu if `sgd_fallback`, and 0 if not. Attributes are as for `adabelief`.
    """

    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-16
    eps_root: Any = 1e-16
    nesterov: bool = False
    rectify: bool = False
    sgd_fallback: bool = True

    nu_center = "mean"  # what nu is the second moment about: "mean", "zero" as in Adam, or None in a rule without nu

    def update_mu(self, g: Inexact[Array, "*s"], mu: Inexact[Array, "*s"]) -> Inexact[Array, "*s"]:
        """The mean gradient."""
        return average(self.b1, mu, g)

    def update_nu(self, g: Inexact[Array, "*s"], mu: Inexact[Array, "*s"], nu: Inexact[Array, "*s"]) -> Any:
        """The mean squared error of the new `mu` as a prediction of `g`."""
        # A step towards error² is more exact than b2 · nu + (1 − b2) · error²: in float32 the two weights do not add
        # up to 1. And the last operation adds two arrays. If it added a scalar to an array (Optax's `nu + eps_root`),
        # XLA:CPU would compute the sum again in each fusion that reads it, from copies of the old moments.
        return (1 - self.b2) * (square(clip_for_square(g - mu)) - nu) + (nu + self.eps_root)

    def bias_corrections(self, t: Int32[Array, ""]) -> BiasCorrections:
        """The scalars of update t, counted from 1, in the widest float that is enabled."""
        mu, g = mean_corrections(self.b1, t, self.nesterov)
        remaining = one_minus_power(self.b2, t)
        if not self.rectify:
            return BiasCorrections(mu, g, 1 / remaining)
        factor, intractable = rectification(self.b2, t)
        factor = jnp.where(intractable, 1.0 if self.sgd_fallback else 0.0, factor * jnp.sqrt(remaining))
        return BiasCorrections(mu * factor, None if g is None else g * factor, None, intractable)

    def update(self, g: Any, mu: Any, nu: Any, corrections: BiasCorrections, scale: Any) -> Any:
        """`scale` times u, from the new moments."""
        root = jnp.sqrt(nu if corrections.nu is None else nu * corrections.nu) + self.eps
        if corrections.intractable is not None:
            root = jnp.where(corrections.intractable, jnp.ones_like(root), root)
        return corrections.mean(g, mu, scale) / root


def mean_corrections(b1: Any, t: Int32[Array, ""], nesterov: bool) -> tuple[Array, Array | None]:
    """The factors of mu and, under Nesterov, of the gradient, in the corrected mean."""
    if not nesterov:
        return 1 / one_minus_power(b1, t), None
    following = jnp.asarray(optax.safe_increment(t))  # t + 1, but never beyond the largest int32
    return b1 / one_minus_power(b1, following), (1 - b1) / one_minus_power(b1, t)


def adabelief(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-16,
    eps_root: Any = 1e-16,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    decay: Literal["decoupled", "fixed", "coupled"] = "decoupled",
    rectify: bool = False,
    sgd_fallback: bool = True,
    amsgrad: bool = False,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaBelief: Adam, but dividing by how far gradients fall from their mean instead of by how large they are.

    The update is p ← p − α · (u + λ · p), where `Belief` gives u. Its state is one `ScaleByBeliefState`. The arithmetic
    is in float32 or wider, also for 16-bit parameters; the update is rounded to their dtype once, at the end.

    **eps and eps_root differ.** `eps` is added outside the root, once. `eps_root` is added to nu in every update and
    accumulates: the root is at least √(eps_root / (1 − b2)), 3.2e-7 by default, 3.2e-3 with eps_root = 1e-8, and for
    smaller gradients the update is SGD with momentum. The paper's ε is both: 1e-8 for vision, 1e-12 or 1e-16 for LSTMs.

    >>> import jax, jax.numpy as jnp, optax
    >>> def f(x): return jnp.sum(x ** 2)
    >>> optimizer = adabelief(learning_rate=0.003)
    >>> x = jnp.array([1., 2., 3.])
    >>> state = optimizer.init(x)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(jax.grad(f)(x), state, x)
    ...     x = optax.apply_updates(x, updates)
    ...     print(f'f(x): {f(x):.2E}')
    f(x): 1.40E+01
    f(x): 1.39E+01

    Args:
      learning_rate: α, a number, an array, or a schedule of the number of updates already made.
      b1: decay of the mean gradient, in [0, 1).
      b2: decay of the mean squared error, in [0, 1).
      eps: added to the root in the denominator, ≥ 0.
      eps_root: added to nu in every update, ≥ 0. With 0, derivatives through the update are NaN where nu is 0.
      weight_decay: λ, of the same kinds as the learning rate; None for none. With it, `update` needs the parameters.
      weight_decay_mask: which leaves decay: a tree of bools, a prefix of such a tree, or a function of the parameters
        that returns one; None for all. Under `optax.inject_hyperparams`, a function needs
        static_args="weight_decay_mask".
      nesterov: looks one update ahead.
      decay: "decoupled", as above; "fixed", p ← p − α · u − λ · p; "coupled", λ · p is added to the gradient first.
      rectify: RAdam's rectification (see `Belief` and `trainer.optim.precision.rectification`).
      sgd_fallback: whether the first steps, until the variance is tractable, are SGD with momentum; else only decay.
      amsgrad: divides by the root of the largest nu so far.
      mu_dtype: dtype of mu in the state, float32, float64 or bfloat16; None for the parameter's, but at least float32.
      nu_dtype: dtype of nu in the state, likewise. Bfloat16 is rounded stochastically.
      seed: of the stochastic rounding, which depends only on it, on the update, and on the leaf's number in the tree.

    Raises:
      ValueError: a number out of its range, a bad array or `decay`; from `init`: an eps that is 0, a bad moment dtype.
    """
    b1, b2, eps, eps_root = (x.item() if isinstance(x, np.generic) else x for x in (b1, b2, eps, eps_root))
    rule = Belief(b1, b2, eps, eps_root, nesterov, rectify, sgd_fallback)
    _check_ranges(rule)
    if rectify and amsgrad:
        raise ValueError("rectify and amsgrad cannot be combined: rectification assumes the variance, not its maximum")
    if decay not in ("decoupled", "fixed", "coupled"):
        raise ValueError(f"decay is {decay!r}; it must be 'decoupled', 'fixed' or 'coupled'")
    if isinstance(weight_decay_mask, jax.Array):
        raise ValueError("weight_decay_mask is an array: give optax.inject_hyperparams static_args='weight_decay_mask'")
    plain = ParamGroup(rule, learning_rate, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    groups = {"plain": plain, "decayed": dataclasses.replace(plain, weight_decay=weight_decay, decay=decay)}
    mask = True if weight_decay is None or weight_decay_mask is None else weight_decay_mask

    def labels(params: optax.Params) -> Any:
        tree = mask(params) if callable(mask) else mask
        return jax.tree.map(lambda keep: "decayed" if keep else "plain", tree)

    return fused_groups(groups, labels, amsgrad=amsgrad, seed=seed)


def scale_by_belief(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-16,
    eps_root: Any = 1e-16,
    *,
    nesterov: bool = False,
    rectify: bool = False,
    sgd_fallback: bool = True,
    amsgrad: bool = False,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """`adabelief` without learning rate and decay, for `optax.chain`: it returns +u. Arguments and errors as there."""
    options = {"nesterov": nesterov, "rectify": rectify, "sgd_fallback": sgd_fallback, "amsgrad": amsgrad}
    return adabelief(-1.0, b1, b2, eps, eps_root, **options, mu_dtype=mu_dtype, nu_dtype=nu_dtype, seed=seed)


def _check_ranges(rule: Belief) -> None:
    for name in ("b1", "b2", "eps", "eps_root"):
        value = getattr(rule, name)
        if isinstance(value, jax.Array | np.ndarray):
            if not jnp.issubdtype(value.dtype, jnp.floating) or jnp.finfo(value.dtype).bits < 32:
                raise ValueError(
                    f"{name} is a {value.dtype} array, which has too few bits (0.999 is 1 in bfloat16): give a Python "
                    "number or a float32 array, and to optax.inject_hyperparams hyperparam_dtype=jnp.float32"
                )
        elif isinstance(value, bool) or not isinstance(value, float | int):
            raise ValueError(f"{name} is {value!r}; a number is expected")
        elif name.startswith("b") and not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must be in [0, 1)")
        elif not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be a finite number and not negative")
    if all(isinstance(value, float | int) and value == 0 for value in (rule.eps, rule.eps_root)):
        raise ValueError("eps and eps_root are both 0: a gradient of zero would be divided by zero")

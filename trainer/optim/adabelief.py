"""AdaBelief: steps sized by how far each gradient falls from its prediction (Zhuang et al., 2020, arXiv:2010.07468)."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.optim.fused import ScaleByBeliefState, fused
from trainer.optim.treatment import ParamGroup
from trainer.optim.update_rules import Belief

__all__ = ["ScaleByBeliefState", "adabelief", "scale_by_belief"]


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

    With gradient :math:`g_t` in update t = 1, 2, …, all of it elementwise:

    .. math::

      m_t &= b_1 m_{t-1} + (1 - b_1) g_t \\
      s_t &= b_2 s_{t-1} + (1 - b_2) |g_t - m_t|^2 + \varepsilon_{root} \\
      \hat m_t &= m_t / (1 - b_1^t), \quad \hat s_t = s_t / (1 - b_2^t) \\
      d_t &= \hat m_t / (\sqrt{\hat s_t} + \varepsilon) \\
      p_t &= p_{t-1} - \alpha_t (d_t + \lambda_t p_{t-1})

    **What eps and eps_root do.** `eps` is added outside the root, once. `eps_root` is added to s at every update and so
    accumulates inside it: √ŝ never falls below √(eps_root / (1 − b2)), which is 3.2e-7 by default, and 3.2e-3 with
    eps_root = 1e-8, where gradients below that size make the update one of SGD with momentum. Algorithm 2 of the paper
    has its ε in both places, and the authors' package has one argument for both. The paper's settings are 1e-8 for
    vision and 1e-12 or 1e-16 for LSTMs.

    With 16-bit parameters the moments are float32 unless told otherwise, the arithmetic is in float32, and the update
    is rounded to the parameter's dtype once, at its end.

    >>> import jax, jax.numpy as jnp, optax
    >>> def f(x): return jnp.sum(x ** 2)
    >>> optimizer = adabelief(learning_rate=0.003)
    >>> x = jnp.array([1., 2., 3.])
    >>> print('f(x):', f(x))
    f(x): 14.0
    >>> state = optimizer.init(x)
    >>> for _ in range(5):
    ...     updates, state = optimizer.update(jax.grad(f)(x), state, x)
    ...     x = optax.apply_updates(x, updates)
    ...     print(f'f(x): {f(x):.2E}')
    f(x): 1.40E+01
    f(x): 1.39E+01
    f(x): 1.39E+01
    f(x): 1.38E+01
    f(x): 1.38E+01

    Args:
      learning_rate: α, a number, an array, or a schedule of the number of updates already made.
      b1: decay of the mean gradient, in [0, 1).
      b2: decay of the mean squared error, in [0, 1).
      eps: added to the root in the denominator, ≥ 0.
      eps_root: added to s at every update, ≥ 0. With 0, derivatives through the update are NaN where s is 0.
      weight_decay: λ, a number, an array, or a schedule like the learning rate; None for none. `update` then needs the
        parameters.
      weight_decay_mask: which leaves decay: a tree of bools, a prefix of such a tree, or a function of the parameters
        that returns one; None for all. Under `optax.inject_hyperparams` name a function in `static_args`.
      nesterov: looks one step ahead: m̂ = b1 · m / (1 − b1^(t+1)) + (1 − b1) · g / (1 − b1^t).
      decay: "decoupled", as above; "fixed" is not multiplied by the learning rate, p − α·d − λ·p; "coupled" is added to
        the gradient before anything else.
      rectify: RAdam's rectification (see `trainer.optim.update_rules.rectification`): d = r · √(1 − b2^t) · m̂ / (√s + eps)
        from the update on in which the variance is tractable.
      sgd_fallback: what rectification does until then: d = m̂, or nothing but decay.
      amsgrad: divides by the largest s so far.
      mu_dtype: in which m is stored: float32, float64 or bfloat16; None for the parameter's dtype, but at least
        float32. Bfloat16 is rounded stochastically.
      nu_dtype: in which s is stored, likewise.
      seed: of the stochastic rounding, which depends on it, on the update, and on the place in the tree alone.

    Returns:
      A transformation whose state is one `ScaleByBeliefState`.

    Raises:
      ValueError: an argument is out of its range, or is lost in the dtype that it would be used in; `rectify` together
        with `amsgrad`, which the authors' package ignores there.
    """
    scaling = _belief(b1, b2, eps, eps_root, nesterov, rectify, sgd_fallback, amsgrad)
    if decay not in ("decoupled", "fixed", "coupled"):
        raise ValueError(f"decay is {decay!r}; it must be 'decoupled', 'fixed' or 'coupled'")
    if isinstance(weight_decay_mask, jax.Array):
        raise ValueError(
            "weight_decay_mask is an array, as optax.inject_hyperparams makes of a function: give it "
            "static_args='weight_decay_mask'"
        )
    dtypes = {"mu_dtype": mu_dtype, "nu_dtype": nu_dtype}
    plain = ParamGroup(scaling, learning_rate, **dtypes)
    decayed = ParamGroup(scaling, learning_rate, weight_decay, decay, **dtypes)
    if weight_decay is None or weight_decay_mask is None:
        return fused(decayed, amsgrad=amsgrad, seed=seed)

    def treatments(params: optax.Params) -> Any:
        mask = weight_decay_mask(params) if callable(weight_decay_mask) else weight_decay_mask
        return jax.tree.map(lambda keep: decayed if keep else plain, mask)

    return fused(treatments, amsgrad=amsgrad, seed=seed)


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
    """The direction d of `adabelief`, without learning rate and decay, for chains of transformations.

    Args:
      b1: as for `adabelief`, like all others.
      b2: decay of the mean squared error.
      eps: added to the root.
      eps_root: added to s at every update.
      nesterov: looks one step ahead.
      rectify: RAdam's rectification.
      sgd_fallback: what rectification does at first.
      amsgrad: divides by the largest s so far.
      mu_dtype: in which m is stored.
      nu_dtype: in which s is stored.
      seed: of the stochastic rounding.

    Raises:
      ValueError: as for `adabelief`.
    """
    scaling = _belief(b1, b2, eps, eps_root, nesterov, rectify, sgd_fallback, amsgrad)
    # The update of a learning rate of −1 is the direction itself.
    treatment = ParamGroup(scaling, -1.0, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    return fused(treatment, amsgrad=amsgrad, seed=seed)


def _belief(
    b1: Any, b2: Any, eps: Any, eps_root: Any, nesterov: bool, rectify: bool, sgd_fallback: bool, amsgrad: bool
) -> Belief:
    b1, b2, eps, eps_root = (x.item() if isinstance(x, np.generic) else x for x in (b1, b2, eps, eps_root))
    for name, value in {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}.items():
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
    if isinstance(eps, float | int) and isinstance(eps_root, float | int) and eps == eps_root == 0:
        raise ValueError("eps and eps_root are both 0: a gradient of zero would be divided by zero")
    if rectify and amsgrad:
        raise ValueError("rectify and amsgrad cannot be combined: rectification assumes the variance, not its maximum")
    return Belief(b1, b2, eps, eps_root, nesterov, rectify, sgd_fallback)

"""AdaBelief in NumPy's float64, one line per formula, and helpers for comparisons with it.

AdaBelief is Algorithm 2 of arXiv:2010.07468, AMSGrad the maximum of arXiv:1904.09237, rectification Algorithm 2 of
arXiv:1908.03265, whose rho is N here. Where the papers leave a choice, it is that of adabelief-pytorch 0.2.1.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import jax
import numpy as np
import optax

Setting = float | Callable[[int], float]


def steps(
    params: Any,
    grads: Iterable[Any],
    learning_rate: Setting,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-16,
    eps_root: float = 1e-16,
    weight_decay: Setting = 0.0,
    weight_decay_mask: Any = True,
    *,
    nesterov: bool = False,
    decay: str = "decoupled",
    rectify: bool = False,
    sgd_fallback: bool = True,
    amsgrad: bool = False,
) -> Iterator[np.ndarray]:
    """Yields the parameters after each step: an array, like each gradient and the mask."""
    p = np.array(params, np.complex128 if np.iscomplexobj(params) else np.float64)
    m = np.zeros_like(p)
    s = s_max = np.zeros_like(p.real)
    for t, grad in enumerate(grads, 1):
        lr = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        wd = weight_decay(t - 1) if callable(weight_decay) else weight_decay
        wd = np.where(weight_decay_mask, wd, 0.0)
        g = np.asarray(grad, p.dtype)
        if decay == "coupled":
            g = g + wd * p

        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * np.abs(g - m) ** 2 + eps_root
        s_max = np.maximum(s_max, s)
        s_used = s_max if amsgrad else s

        m_hat = m / float(1 - power(b1, t))
        if nesterov:
            m_hat = b1 * m / float(1 - power(b1, t + 1)) + (1 - b1) * g / float(1 - power(b1, t))

        if not rectify:
            d = m_hat / (np.sqrt(s_used / float(1 - power(b2, t))) + eps)
        else:
            n_inf = 2 / (1 - Decimal(b2)) - 1
            n = n_inf - 2 * t * power(b2, t) / (1 - power(b2, t))
            if n >= 5:
                r = (((n - 4) * (n - 2) * n_inf) / ((n_inf - 4) * (n_inf - 2) * n)).sqrt()
                d = float(r * (1 - power(b2, t)).sqrt()) * m_hat / (np.sqrt(s_used) + eps)
            else:
                d = m_hat if sgd_fallback else 0 * m_hat

        if decay == "decoupled":
            p = p - lr * (d + wd * p)
        elif decay == "fixed":
            p = p - (lr * d + wd * p)
        else:
            p = p - lr * d
        yield p


@functools.cache
def power(b: float, t: int) -> Decimal:
    """b^t in 28 digits: of 1 − b^t, and then of N, both differences of nearly equal numbers, float64 would lose six."""
    return Decimal(b) ** t


def reference(params: Any, grads: Iterable[Any], learning_rate: Setting, **options: Any) -> np.ndarray:
    """The parameters after each step; options as those of `steps`."""
    return np.stack(list(steps(params, grads, learning_rate, **options)))


def run(optimizers: Mapping[str, optax.GradientTransformation], params: Any, grads: Any) -> dict[str, tuple[Any, Any]]:
    """The parameters after each step and the updates, for each optimizer.

    All step in one scan: it compiles in a fifth of a second, and a few hundredths for each optimizer.
    """

    def step(carry: dict[str, Any], grads: Any) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
        new, found = {}, {}
        for name, (params, state) in carry.items():
            updates, state = optimizers[name].update(grads, state, params)
            params = optax.apply_updates(params, updates)
            new[name], found[name] = (params, state), (params, updates)
        return new, found

    def steps(params: Any, grads: Any) -> dict[str, tuple[Any, Any]]:
        return jax.lax.scan(step, {name: (params, o.init(params)) for name, o in optimizers.items()}, grads)[1]

    return jax.tree.map(np.asarray, jax.jit(steps)(params, grads))


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of any parameter at any step, as a share of that parameter at that step."""
    return float(np.max(np.abs(found - expected) / np.abs(expected)))


def adam(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: Any = 0.0,
    weight_decay_mask: Any = None,
    *,
    nesterov: bool = False,
    decay: str = "decoupled",
    rectify: bool = False,
    sgd_fallback: bool = True,
    amsgrad: bool = False,
) -> optax.GradientTransformation:
    """Optax's Adam, or its RAdam or AMSGrad, with AdaBelief's arguments: comparisons have to tell it from AdaBelief."""
    del sgd_fallback  # RAdam always falls back
    if rectify:
        rule = optax.scale_by_radam(b1, b2, eps, eps_root, nesterov=nesterov)
    elif amsgrad:
        rule = optax.scale_by_amsgrad(b1, b2, eps, eps_root)
    else:
        rule = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
    rate, decayed = (
        optax.scale_by_learning_rate(learning_rate),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
    )
    negative = optax.scale(-1.0)
    return {
        "coupled": optax.chain(decayed, rule, rate),
        "decoupled": optax.chain(rule, decayed, rate),
        "fixed": optax.chain(rule, rate, negative, decayed, negative),
    }[decay]

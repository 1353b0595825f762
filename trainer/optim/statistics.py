"""What an update did to each label: numbers to log, made of the update's results, which are in memory anyway."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from trainer.optim.fused import ScaleByBeliefState, prepare, take_apart
from trainer.optim.treatment import Leaf, Scalars, norm, rates, with_scalars
from trainer.optim.update_rules import Momentum, one_minus_power, square

Statistics = Callable[[optax.Updates, optax.Params, ScaleByBeliefState], dict[str, Float[Array, ""]]]


def build_statistics(treatments: Any, labels: Any, clip_norm: float | None = None) -> Statistics:
    """A function of gradients and of the parameters and the state after an update.

    For each label that is not frozen it gives

    - `grad_norm/LABEL`: the norm of the gradient, not clipped;
    - `update_ratio/LABEL`: the norm of the update over that of the new parameters; the update as it was computed,
      before the parameters' dtype rounds it, and of a label that is not updated at every step its last one;
    - `belief/LABEL`: the mean of √(s/v̂) over all elements, where v̂ = ŝ + m̂² is the second moment of the gradient about
      zero, s being that about the mean. Near 1 gradients are noise, and AdaBelief does what Adam would do; near 0 they
      are as predicted, and its steps are larger by 1/belief. None for momentum;
    - `learning_rate/LABEL` and `weight_decay/LABEL`, where the label has a schedule of its own.

    Nothing is kept for it: what is asked for is what the update left behind, and the update itself is computed again
    from its moments, p − p' = (d + λp')/(1 − λ) where p' = (1 − λ)p − d.

    Args:
      treatments: as for `build_optimizer`.
      labels: a tree like the parameters, with a label for each leaf.
      clip_norm: as for `build_optimizer`.
    """

    def statistics(
        grads: optax.Updates, params: optax.Params, state: ScaleByBeliefState
    ) -> dict[str, Float[Array, ""]]:
        leaves, _ = take_apart(treatments, grads, state, params)
        groups: dict[str, list[tuple[Leaf, Scalars]]] = {}
        scaled = with_scalars(leaves, state.count - 1, clip_norm)
        for label, (leaf, scalars) in zip(jax.tree.leaves(labels), scaled, strict=True):
            if scalars is not None:
                groups.setdefault(label, []).append((leaf, scalars))
        found: dict[str, Float[Array, ""]] = {}
        rates_of = {id(leaf.treatment.learning_rate) for leaf in leaves if leaf.treated}
        for label, group in groups.items():
            found[f"grad_norm/{label}"] = norm([leaf.g for leaf, _ in group])
            weights = norm([leaf.p for leaf, _ in group])
            found[f"update_ratio/{label}"] = norm([_displacement(*pair) for pair in group]) / jnp.where(
                weights == 0, 1.0, weights
            )
            first, scalars = group[0]
            if len(rates_of) > 1:
                found[f"learning_rate/{label}"] = scalars.learning_rate
            if callable(first.treatment.weight_decay):
                found[f"weight_decay/{label}"] = jnp.asarray(scalars.weight_decay)
            if not isinstance(first.treatment.scaling, Momentum):
                total = sum((jnp.sum(_belief_of(*pair, state.count)) for pair in group), jnp.zeros(()))
                found[f"belief/{label}"] = total / sum(leaf.p.size for leaf, _ in group)
        return {name: value.astype(jnp.float32) for name, value in found.items()}

    return statistics


def _displacement(leaf: Leaf, scalars: Scalars) -> Array:
    """The new parameter minus the old one, from what the update left."""
    leaf, scalars = prepare(leaf, scalars)
    rate, shrink = rates(leaf.treatment, scalars)
    root = leaf.s if leaf.s_max is None else leaf.s_max
    moved = -leaf.treatment.scaling.direction(leaf.g, leaf.m, root, scalars.corrections, rate)
    if shrink is not None:
        moved = (moved - shrink * leaf.p) / (1 - shrink)
    return moved


def _belief_of(leaf: Leaf, scalars: Scalars, count: Array) -> Array:
    leaf, _ = prepare(leaf, scalars)
    scaling: Any = leaf.treatment.scaling
    updates = (count - 1) // leaf.treatment.every + 1
    m = square(leaf.m / one_minus_power(scaling.b1, updates).astype(leaf.s.dtype))
    second = leaf.s / one_minus_power(scaling.b2, updates).astype(leaf.s.dtype)
    about_mean, about_zero = (second, second + m) if scaling.centred else (jnp.maximum(second - m, 0), second)
    # What never had a gradient counts as noise. (A `where` instead would keep XLA:CPU from fusing this into the sum.)
    tiny = jnp.finfo(leaf.s.dtype).tiny
    return jnp.sqrt((about_mean + tiny) / (about_zero + tiny))

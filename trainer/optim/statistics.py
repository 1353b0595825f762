"""Per-label statistics of an update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Bool, Float

from trainer.metrics import Mean, Metrics
from trainer.optim import fused
from trainer.optim.precision import divide, global_norm, one_minus_power, square
from trainer.optim.transforms import Groups, clip_all, split_groups

Statistics = Callable[[optax.Updates, optax.Params, Any], dict[str, Float[Array, ""]]]


def build_statistics(groups: Groups, labels: Any, clip_norm: float | None) -> Statistics:
    """Per-label statistics of an update, from its gradients and the parameters and state after it.

    For each label that is not frozen:

    - `grad_norm/LABEL`: the norm of the gradient, before clipping;
    - `update_ratio/LABEL`: the norm of the update over that of the new parameters. The update is not yet rounded to the
      parameters' dtype. In a step that does not update the label, the last update counts. For fused groups this update
      is recomputed with the learning rate of the present step;
    - `belief/LABEL`: the mean of √(nu/v) over all elements. Here nu and mu are corrected for bias, and v = nu + mu² is
      the second moment of the gradient about zero. Near 1, gradients are noise, and AdaBelief does what Adam would do.
      Near 0, gradients are as mu predicts, and its steps are 1/belief times those of Adam. Momentum has no belief;
    - `learning_rate/LABEL`, for every label, if two labels have learning rates of their own. Two groups with the same
      `lr_multiplier` other than 1 count as different;
    - `weight_decay/LABEL`, where the weight decay of the label is a schedule.

    Fused groups store nothing: the update is recomputed from the moments. For groups of Optax, the state stores the
    norm of the update.
    """
    fused_only, others = split_groups(groups)
    fused_only = {**fused_only, **dict.fromkeys(others)}

    def statistics(grads: optax.Updates, params: optax.Params, state: Any) -> dict[str, Array]:
        moments, clip = (state, clip_norm) if not others else (state.fused, None)
        raw, structure = jax.tree.flatten(grads, is_leaf=lambda x: x is None)
        frozen = [groups[name] is None for name in jax.tree.leaves(labels)]
        clipped = clip_all(raw, frozen, clip_norm) if others else raw
        leaves, _ = fused.flatten(labels, structure.unflatten(clipped), moments, params)
        scalars_of = fused.update_scalars(fused_only, leaves, state.count - 1, clip)
        with_gradient = dict.fromkeys(leaf[0] for leaf in leaves if leaf[1] is not None)
        updated: dict[str, Any] = {label: groups[label] for label in with_gradient if groups[label] is not None}
        several_rates = len({group.learning_rate for group in updated.values()}) > 1
        found: dict[str, Any] = {}
        for label, group in updated.items():
            own = [(g, *leaf[1:]) for g, leaf in zip(raw, leaves, strict=True) if leaf[0] == label and g is not None]
            found[f"grad_norm/{label}"] = global_norm([g for g, *_ in own])
            weights = global_norm([p for *_, p in own])
            if label in others:
                moved, rate = state.others[label].moved, group.learning_rate(state.count - 1)
                decay = group.weight_decay(state.count - 1) if callable(group.weight_decay) else None
            else:
                scalars = scalars_of[label]
                moved = global_norm([_displacement(group, scalars, *leaf[1:]) for leaf in own])
                rate, decay = scalars.learning_rate, scalars.weight_decay
                if group.rule.nu_center is not None:
                    beliefs = (jnp.sum(_belief(group, scalars, *leaf[1:], state.count)) for leaf in own)
                    count = float(sum(p.size for *_, p in own))  # XLA takes no int of more than 31 bits
                    found[f"belief/{label}"] = sum(beliefs, jnp.zeros(())) / count
            found[f"update_ratio/{label}"] = moved / jnp.where(weights == 0, 1.0, weights)
            if several_rates:
                found[f"learning_rate/{label}"] = rate
            if callable(group.weight_decay):
                found[f"weight_decay/{label}"] = decay
        return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}

    return statistics


def statistics_if(
    condition: Bool[Array, ""],
    statistics: Statistics,
    sums: optax.Updates,
    weight: Float[Array, ""],
    params: optax.Params,
    state: Any,
) -> Metrics:
    """The statistics if the condition holds; otherwise a `Mean` of weight 0 for each, which costs nothing.

    They get the gradient `sums` / `weight`. To take the gradient itself, XLA would write it to memory in every step.
    """

    def measure(sums: Any, weight: Any, *after: Any) -> Metrics:
        return {k: Mean.single(v) for k, v in statistics(divide(sums, weight), *after).items()}

    # Traced once for both uses. (A jitted function would hide its constants from `trainer.compile_once`.)
    arguments = sums, weight, params, state
    traced, shapes = jax.make_jaxpr(measure, return_shape=True)(*arguments)
    nothing = [jnp.zeros(x.shape, x.dtype) for x in jax.tree.leaves(shapes)]
    values = jax.lax.cond(condition, jaxpr_as_fun(traced), lambda *_: nothing, *jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), values)


def _displacement(group: fused.ParamGroup, scalars: fused.UpdateScalars, g: Array, moments: tuple, p: Array) -> Array:
    """The new parameter p' minus the old one p: p' − p = −(u + λp') / (1 − λ), since p' = (1 − λ)p − u."""
    scalars, g, mu, nu, nu_max, p = fused.prepare_leaf(group, scalars, g, moments, p)
    moved = fused.scaled_update(group, scalars, g, mu, nu if nu_max is None else nu_max)
    if scalars.weight_decay is None:
        return moved
    return (moved - scalars.weight_decay * p) / (1 - scalars.weight_decay)


def _belief(
    group: fused.ParamGroup, scalars: fused.UpdateScalars, g: Array, moments: tuple, p: Array, count: Array
) -> Array:
    _, _, mu, nu, _, _ = fused.prepare_leaf(group, scalars, g, moments, p)
    t = (count - 1) // group.every + 1
    squared_mean = square(mu / one_minus_power(group.rule.b1, t).astype(nu.dtype))
    nu = nu / one_minus_power(group.rule.b2, t).astype(nu.dtype)
    if group.rule.nu_center == "mean":
        about_mean, about_zero = nu, nu + squared_mean
    else:
        about_mean, about_zero = jnp.maximum(nu - squared_mean, 0), nu
    # An element that never had a gradient counts as noise. (With a `where`, XLA:CPU would not fuse this into the sum.)
    tiny = jnp.finfo(nu.dtype).tiny
    return jnp.sqrt((about_mean + tiny) / (about_zero + tiny))

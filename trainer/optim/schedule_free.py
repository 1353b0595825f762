"""Schedule-free optimizers of Optax, which keep two sets of parameters (Defazio et al., 2024, arXiv:2405.15682)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from trainer.errors import UserError


def evaluation_params(params: Any, state: Any) -> Any:
    """The parameters to evaluate: those of a schedule-free optimizer are an average, x = (y − (1 − b1) · z) / b1."""
    for free in filter(_is_free, jax.tree.leaves(state, is_leaf=_is_free)):
        params = jax.tree.map(functools.partial(_average, free.b1), free.z, params, is_leaf=_is_masked)
    return params


def decay(u: Any, old: Any, new: Any, p: Any, share: Float[Array, ""]) -> tuple[Any, Any]:
    """The updates `u` and the state `new` of a transformation, with `share` of the parameters `p` subtracted.

    A schedule-free optimizer decays z, as it does in Optax with a decay of its own, and y = b1 · x + (1 − b1) · z
    follows: the average x takes the part c of the new z, so y loses (b1 · c + 1 − b1) · share · p.
    """
    if (before := find(old)) is None:
        return jax.tree.map(lambda x, q: x - share * q, u, p), new

    def with_decay(after: Any) -> Any:
        if not _is_free(after):
            return after
        return after._replace(z=jax.tree.map(lambda z, q: (z - share * q).astype(z.dtype), after.z, p))

    after: Any = find(new)
    part = jnp.nan_to_num((after.weight_sum - before.weight_sum) / after.weight_sum)
    moved = (after.b1 * part + 1 - after.b1) * share
    return jax.tree.map(lambda x, q: x - moved * q, u, p), jax.tree.map(with_decay, new, is_leaf=_is_free)


def find(state: Any) -> Any:
    """The schedule-free part of the state of a transformation, or None; raises `UserError` if there are several."""
    found = [node for node in jax.tree.leaves(state, is_leaf=_is_free) if _is_free(node)]
    if len(found) > 1:
        raise UserError("an optimizer with two schedule-free parts has no average to evaluate at; use one of them")
    return found[0] if found else None


def _is_free(node: Any) -> bool:
    return isinstance(node, optax.contrib.ScheduleFreeState)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _average(b1: Array, z: Any, y: Any) -> Any:
    return y if _is_masked(z) else ((y - (1 - b1) * z) / b1).astype(y.dtype)

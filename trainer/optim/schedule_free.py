"""The parameters at which a schedule-free optimizer is evaluated (Defazio et al., 2024, arXiv:2405.15682)."""

import functools
from typing import Any

import jax
import optax
from jaxtyping import Array

from trainer.optim.transforms import MixedState


def evaluation_params(params: Any, state: Any) -> Any:
    """The parameters to evaluate: those of a schedule-free optimizer are an average, x = (y − (1 − b1) · z) / b1."""
    if not isinstance(state, MixedState):
        return params
    for free in filter(_is_free, jax.tree.leaves([other.inner for other in state.others.values()], is_leaf=_is_free)):
        params = jax.tree.map(functools.partial(_average, free.b1), free.z, params, is_leaf=_is_masked)
    return params


def _is_free(node: Any) -> bool:
    return isinstance(node, optax.contrib.ScheduleFreeState)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _average(b1: Array, z: Any, y: Any) -> Any:
    return y if _is_masked(z) else ((y - (1 - b1) * z) / b1).astype(y.dtype)

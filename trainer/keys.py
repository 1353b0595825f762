"""Every key of a run, as functions of (seed, step, example): nothing of them has to be saved for a resume."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Key

from trainer import config


def run_keys(run: config.Run) -> tuple[Any, Any]:
    """The key of the initial parameters, and the key that those of all steps come from."""
    init_key, step_key = jax.random.split(jax.random.key(run.seed))
    return init_key, step_key


def step_keys(key: Key[Array, ""], step: Int32[Array, ""] | int) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """The key of an update and that of its examples, where `step` counts the steps before it."""
    key, example_key = jax.random.split(jax.random.fold_in(key, step))
    return key, example_key


def per_example_keys(key: Key[Array, ""], count: int, axis: str | None) -> Key[Array, " examples"]:
    """A key for each example, by its position in the global batch."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * count
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))

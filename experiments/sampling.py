"""Tokens drawn one after the other from a model that reads a sequence piece by piece."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Forward = Callable[[Any, Array], tuple[Array, Any]]


def extend(
    forward: Forward,
    state: Any,
    prompt: Int[Array, "examples prompt"],
    keys: Key[Array, " count"],
    temperature: float,
    top_k: int | None,
) -> Int[Array, "examples count"]:
    """The tokens after each prompt, one for each key. Runs under `jax.jit`.

    Args:
      forward: (state, tokens [examples, length]) → (logits [examples, length, vocab], the state after these tokens).
      state: before the prompt.
      prompt: at least one token.
      keys: from which the tokens are drawn.
      temperature: divides the logits; 0 for the likeliest token.
      top_k: how many of the likeliest tokens are drawn from; None for all.
    """

    def step(carry: tuple[Any, Array], key: Array) -> tuple[tuple[Any, Array], Array]:
        logits, state = forward(carry[0], carry[1][:, None])
        token = draw(logits[:, -1], key, temperature, top_k)
        return (state, token), token

    logits, state = forward(state, prompt)
    first = draw(logits[:, -1], keys[0], temperature, top_k)
    _, rest = jax.lax.scan(step, (state, first), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def draw(
    logits: Float[Array, "examples vocab"], key: Key[Array, ""], temperature: float, top_k: int | None
) -> Int[Array, " examples"]:
    """A token for each example; the arguments are those of `extend`."""
    if temperature == 0:
        return jnp.argmax(logits, -1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature)

"""Compilation ahead of the first call."""

import jax
import jax.numpy as jnp
import pytest

from trainer.compilation import AheadCompiled, compile_ahead

ARGUMENT = jax.ShapeDtypeStruct((), jnp.float32)


def test_steps_are_compiled_in_their_order_and_once_however_often_they_are_given():
    traced = []

    def first(x):
        traced.append("first")
        return x + 1

    def second(x):
        traced.append("second")
        return x + 2

    steps = [AheadCompiled(jax.jit(f), (ARGUMENT,)) for f in (first, second)]
    for _ in range(3):
        compile_ahead(*steps)
    assert [float(step(jnp.float32(1))) for step in reversed(steps)] == [3, 2]
    assert traced == ["first", "second"]


def test_an_error_of_the_first_step_is_raised_by_its_call_and_the_other_is_compiled():
    def fails(x):
        raise ValueError("no such step")

    steps = [AheadCompiled(jax.jit(f), (ARGUMENT,)) for f in (fails, lambda x: x + 1)]
    compile_ahead(*steps)
    assert float(steps[1](jnp.float32(1))) == 2
    with pytest.raises(ValueError, match="no such step"):
        steps[0](jnp.float32(1))

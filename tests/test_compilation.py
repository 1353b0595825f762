"""Compilation ahead of the first call."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from trainer.compilation import AheadCompiled, compile_ahead

ARGUMENT = jax.ShapeDtypeStruct((), jnp.float32)


def test_a_step_that_is_needed_later_is_compiled_after_the_one_that_is_needed_first():
    may_end, traced = threading.Event(), []

    def first(x):
        assert may_end.wait(60)
        traced.append("first")
        return x + 1

    def second(x):
        traced.append("second")
        return x + 2

    steps = [AheadCompiled(jax.jit(f), (ARGUMENT,)) for f in (first, second)]
    compile_ahead(steps[0])
    compile_ahead(steps[1], after=steps[0])
    time.sleep(0.2)  # else the second could be traced first unnoticed
    may_end.set()
    assert [float(step(jnp.float32(1))) for step in steps] == [2, 3]
    assert traced == ["first", "second"]


def test_a_step_waits_for_no_other_that_nothing_compiles():
    steps = [AheadCompiled(jax.jit(lambda x: x + 1), (ARGUMENT,)) for _ in range(2)]
    compile_ahead(steps[1], after=steps[0])
    assert float(steps[1](jnp.float32(1))) == 2


def test_an_error_of_the_first_step_is_raised_by_its_call_and_the_other_is_compiled():
    def fails(x):
        raise ValueError("no such step")

    steps = [AheadCompiled(jax.jit(f), (ARGUMENT,)) for f in (fails, lambda x: x + 1)]
    compile_ahead(steps[0])
    compile_ahead(steps[1], after=steps[0])
    assert float(steps[1](jnp.float32(1))) == 2
    with pytest.raises(ValueError, match="no such step"):
        steps[0](jnp.float32(1))

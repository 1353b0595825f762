"""Compilation ahead of the first call, and the cache that a killed process leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

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


COMPILES = """
import sys, warnings
from trainer.compilation import use_cache
warnings.simplefilter("error")
use_cache(sys.argv[1])
import jax
jax.config.update("jax_raise_persistent_cache_errors", True)
assert jax.jit(lambda x: x * float(sys.argv[2]))(2.0) == 2 * float(sys.argv[2])
"""


def compiled_in(folder: Path, *factors: int) -> dict[str, bytes]:
    """Multiplies by each factor in a process of its own; returns the programs in the cache by name."""
    for factor in factors:
        command = [sys.executable, "-c", COMPILES, str(folder), str(factor)]
        subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    return {file.name: file.read_bytes() for file in folder.glob("jit__lambda*-cache")}


def test_a_program_that_a_killed_process_half_wrote_is_compiled_and_written_again(tmp_path):
    first = compiled_in(tmp_path, 3)
    (name,) = first
    both = compiled_in(tmp_path, 5)
    (tmp_path / name).write_bytes(first[name][: len(first[name]) // 2])  # JAX writes the time of its use afterwards
    (tmp_path / name.replace("-cache", "-atime")).unlink()
    again = compiled_in(tmp_path, 7, 3)
    assert len(again) == 3
    assert both.items() - {(name, first[name])} < again.items()
    assert len(again[name]) >= len(first[name]) * 0.9
    assert all((tmp_path / file.replace("-cache", "-atime")).exists() for file in again)

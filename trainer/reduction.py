"""The dtype in which gradients are summed: over the rows of a device, and over devices.

A model that computes in bfloat16 with float32 parameters, such as `nn.Dense(dtype=jnp.bfloat16)`, casts its parameters.
Their gradient is summed over rows in bfloat16 and cast afterwards. Under `jax.jit` XLA sums over devices where the sum
over rows ends, so in bfloat16, too; under `jax.pmap` the step sums what was cast, in float32.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_CONTRACTIONS = ("dot_general", "conv_general_dilated")
# What sums, or only moves numbers: in float32 on float32 operands it gives what these sums would be before rounding.
_LINEAR = ("add_any", "add", "reduce_sum", "scatter-add", "transpose", "reshape", "squeeze", "copy")


def sum_in_float32(gradient: Callable) -> Callable:
    """`gradient` with every 16-bit sum that is then cast to float32 made in float32 from the start.

    The function is traced and its program rewritten: where a contraction, a convolution, a sum or a scatter-add gives
    a 16-bit result that is cast to float32, as gradients of parameters that were cast are, the operation itself gives
    float32. Its operands, and all other operations, stay as they are.

    Args:
      gradient: a pure function of arrays.
    """

    @functools.wraps(gradient)
    def rewritten(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(gradient, return_shape=True)(*arguments)
        results = _run(program, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rewritten


class _Value:
    """A result that is computed when it is asked for, as it is or in float32, once each."""

    def __init__(self, narrow: Callable[[], Any], wide: Callable[[], Any]) -> None:
        self.narrow, self.wide = functools.cache(narrow), functools.cache(wide)


def _run(program: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a program, rewriting it on the way."""
    jaxpr = program.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= zip(jaxpr.constvars, program.consts, strict=True)

    def read(atom: Any) -> Any:
        value = atom.val if isinstance(atom, core.Literal) else values[atom]
        return value.narrow() if isinstance(value, _Value) else value

    def read_wide(atom: Any) -> Any:
        value = None if isinstance(atom, core.Literal) else values[atom]
        if isinstance(value, _Value):
            return value.wide()
        value = read(atom)
        return value.astype(jnp.float32) if _is_16_bit(atom.aval) else value

    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, equation.invars
        if name in ("jit", "pjit"):  # a sum inside may be cast outside
            results = _run(equation.params["jaxpr"], [read(atom) for atom in operands])
        elif name == "convert_element_type" and equation.params["new_dtype"] == jnp.float32:
            results = [
                read_wide(operands[0]) if _is_16_bit(operands[0].aval) else _bind(equation, map(read, operands))[0]
            ]
        elif name in (*_CONTRACTIONS, *_LINEAR) and _is_16_bit(equation.outvars[0].aval):
            narrow = functools.partial(_first, equation, operands, read)
            results = [_Value(narrow, functools.partial(_first_wide, equation, operands, read, read_wide))]
        else:
            results = _bind(equation, map(read, operands))
        values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _is_16_bit(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype in (jnp.bfloat16, jnp.float16)


def _first(equation: Any, operands: Sequence[Any], read: Callable) -> Any:
    return _bind(equation, map(read, operands))[0]


def _first_wide(equation: Any, operands: Sequence[Any], read: Callable, read_wide: Callable) -> Any:
    def widened(*wide: Any) -> Any:
        return _bind(equation, wide, **as_float32)[0]

    if equation.primitive.name not in _CONTRACTIONS:
        as_float32 = {}
        return widened(*map(read_wide, operands))
    as_float32 = {"preferred_element_type": np.dtype(np.float32)}
    # TPUs multiply 16-bit numbers and add up in float32; XLA:CPU has no such contraction.
    return jax.lax.platform_dependent(
        *map(read, operands),
        cpu=lambda *xs: widened(*(x.astype(jnp.float32) for x in xs)),
        default=widened,
    )


def _bind(equation: Any, operands: Any, **changes: Any) -> list[Any]:
    """Applies the operation of an equation; programs inside of it are rewritten, too."""
    inner = {name: _rewritten(value) for name, value in equation.params.items()}
    parameters = equation.primitive.get_bind_params({**inner, **changes})
    results = equation.primitive.bind(*operands, **parameters)
    return list(results) if equation.primitive.multiple_results else [results]


def _rewritten(value: Any) -> Any:
    if type(value) is tuple:  # branches of a cond
        return tuple(map(_rewritten, value))
    if isinstance(value, core.ClosedJaxpr):
        return jax.make_jaxpr(lambda *xs: _run(value, xs))(*[var.aval for var in value.jaxpr.invars])
    if isinstance(value, core.Jaxpr):  # of jax.checkpoint, which has no constants
        return _rewritten(core.ClosedJaxpr(value, ())).jaxpr
    return value

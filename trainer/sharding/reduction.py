"""The dtype in which gradients are summed: over the rows of a device, and over devices.

A model that computes in bfloat16 with float32 parameters, such as `nn.Dense(dtype=jnp.bfloat16)`, casts its parameters.
Their gradient is summed over rows in bfloat16 and cast afterwards. Under `jax.jit` XLA sums over devices where the sum
over rows ends, so in bfloat16, too; under `jax.pmap` the step sums what was cast, in float32.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_CONTRACTIONS = ("dot_general", "conv_general_dilated")
# What sums, or only moves numbers: in float32 on float32 operands it gives what these sums would be before rounding.
_LINEAR = ("add_any", "reduce_sum", "scatter-add", "transpose", "reshape", "squeeze", "copy")
_CAST = "convert_element_type"


def sum_in_float32(gradient: Callable) -> Callable:
    """`gradient` with the 16-bit sums that become its float32 results made in float32 from the start.

    The function is traced and its program rewritten: where a contraction, a convolution, a sum or a scatter-add gives
    a 16-bit result of which nothing but the cast to float32 is used, and that cast is a result, as it is for gradients
    of parameters that were cast, the operation itself gives float32. Its operands, and all other operations, stay as
    they are; activations keep their dtype. A loop, a branch or a `jax.checkpoint` is a program of its own: parameters
    must be cast inside of it, as Linen modules do.

    Args:
      gradient: a pure function of arrays.
    """

    @functools.wraps(gradient)
    def rewritten(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(gradient, return_shape=True)(*arguments)
        results = _run(_inlined(program), jax.tree.leaves(arguments), rewrite=True)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rewritten


def _inlined(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The program without calls of `jax.jit` that give 16 bits: a sum inside may be cast outside."""
    return jax.make_jaxpr(lambda *xs: _run(program, xs, rewrite=False))(*program.in_avals)


def _run(program: core.ClosedJaxpr, arguments: Sequence[Any], *, rewrite: bool) -> list[Any]:
    """Evaluates a program, with its sums rewritten or else with calls inlined."""
    jaxpr = program.jaxpr
    wide = _sums_of_results(jaxpr) if rewrite else set()
    values: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= zip(jaxpr.constvars, program.consts, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        name, operands, results = equation.primitive.name, list(map(read, equation.invars)), equation.outvars
        if name in ("jit", "pjit") and not rewrite and any(_is_16_bit(var.aval) for var in results):
            values |= zip(results, _run(equation.params["jaxpr"], operands, rewrite=False), strict=True)
        elif wide.intersection(results):
            values[results[0]] = _in_float32(equation, operands)
        elif name == _CAST and not isinstance(equation.invars[0], core.Literal) and equation.invars[0] in wide:
            values[results[0]] = operands[0]  # which is float32 already
        else:
            inner = {name: _rewritten(value) if rewrite else value for name, value in equation.params.items()}
            values |= zip(results, _bind(equation, operands, **inner), strict=True)
    return list(map(read, jaxpr.outvars))


def _sums_of_results(jaxpr: core.Jaxpr) -> set[Any]:
    """The 16-bit sums of which nothing is used but their cast to float32, and that only to add up or hand out."""
    uses: dict[Any, list[Any]] = defaultdict(list)
    for equation in jaxpr.eqns:
        for atom in equation.invars:
            if not isinstance(atom, core.Literal):
                uses[atom].append(equation)
    results = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
    lead: set[Any] = set()  # to float32 results, and nowhere else
    for equation in reversed(jaxpr.eqns):
        if _is_linear(equation) or equation.primitive.name in _CONTRACTIONS:
            [var] = equation.outvars
            fits = uses[var] and var not in results if _is_16_bit(var.aval) else _dtype(var.aval) == jnp.float32
            if fits and all(_is_linear(use) and use.outvars[0] in lead for use in uses[var]):
                lead.add(var)
    return {var for var in lead if _is_16_bit(var.aval)}


def _is_linear(equation: Any) -> bool:
    """Whether float32 operands make an operation give what it gives now before rounding."""
    name = equation.primitive.name
    scales = name in ("mul", "div") and isinstance(equation.invars[1], core.Literal)
    return name in _LINEAR or scales or (name == _CAST and equation.params["new_dtype"] == jnp.float32)


def _is_16_bit(aval: Any) -> bool:
    return _dtype(aval) in (jnp.bfloat16, jnp.float16)


def _dtype(aval: Any) -> Any:
    return getattr(aval, "dtype", None)  # effects have none


def _in_float32(equation: Any, operands: Sequence[Any]) -> Any:
    """The result of an operation in float32."""

    def on_float32(*operands: Any, **changes: Any) -> Any:
        wide = [x.astype(jnp.float32) if _is_16_bit(x) else x for x in operands]
        return _bind(equation, wide, **changes)[0]

    if equation.primitive.name == "scatter-add":  # its parameters hold an addition of 16-bit numbers
        return on_float32(*operands, update_jaxpr=jax.make_jaxpr(jax.lax.add)(*np.zeros(2, np.float32)).jaxpr)
    if equation.primitive.name not in _CONTRACTIONS:
        return on_float32(*operands)
    as_float32 = {"preferred_element_type": np.dtype(np.float32)}
    # TPUs multiply 16-bit numbers and add up in float32; XLA:CPU has no such contraction.
    return jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(on_float32, **as_float32),
        default=lambda *operands: _bind(equation, operands, **as_float32)[0],
    )


def _bind(equation: Any, operands: Sequence[Any], **changes: Any) -> list[Any]:
    """Applies the operation of an equation."""
    results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params({**equation.params, **changes}))
    return list(results) if equation.primitive.multiple_results else [results]


def _rewritten(value: Any) -> Any:
    """A parameter of an operation; programs in it are rewritten."""
    if type(value) is tuple:  # branches of a cond
        return tuple(map(_rewritten, value))
    if isinstance(value, core.ClosedJaxpr):
        inlined = _inlined(value)
        return jax.make_jaxpr(lambda *xs: _run(inlined, xs, rewrite=True))(*inlined.in_avals)
    if isinstance(value, core.Jaxpr):  # of jax.checkpoint
        closed = _rewritten(core.ClosedJaxpr(value, ()))
        assert not closed.consts, "a program without constants cannot get any by rewriting"
        return closed.jaxpr
    return value

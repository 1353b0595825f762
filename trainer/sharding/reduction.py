"""The dtype in which gradients are summed: over the examples of a device, and over devices.

Without this module: a model that computes in bfloat16 with float32 parameters, such as `nn.Dense(dtype=jnp.bfloat16)`,
casts its parameters. Their gradient is summed over examples in bfloat16 and cast afterwards. Under `jax.jit` XLA sums
over devices right after the sum over examples, before the cast, so in bfloat16, too. Under `jax.pmap` the step sums the
gradients over devices after the cast, in float32.

`with_float32_sums` makes both sums in float32, under `jax.jit` and under `jax.pmap`.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

_CONTRACTIONS = ("dot_general", "conv_general_dilated")
# Sums, and operations that only move numbers. With float32 operands they give the same result as with 16-bit ones, but
# not rounded to 16 bits.
_LINEAR = ("add_any", "reduce_sum", "scatter-add", "transpose", "reshape", "squeeze", "copy")
_CAST = "convert_element_type"
_OPAQUE = ("pallas_call", "shard_map")  # their bodies mean something only inside of them


def with_float32_sums(gradient: Callable) -> Callable:
    """`gradient`, a function of arrays, rewritten: a 16-bit sum that ends up as a float32 result is summed in float32.

    The function is traced and its jaxpr rewritten. A contraction, a convolution, a sum or a scatter-add is made to
    return float32 if its 16-bit output is only moved, scaled, added up and cast to float32 on the way to results.
    The gradient of a parameter that the model casts comes from such an output. Operands and other operations stay, so
    activations keep their dtype, and every operation keeps its module name. The body of a loop, a branch or a
    `jax.checkpoint` is rewritten separately: parameters must be cast inside it, as Linen modules do. Pallas kernels and
    the bodies of `jax.shard_map` stay as they are, and so do the equations of a function without a 16-bit operation.
    """

    @functools.wraps(gradient)
    def rewritten(*arguments: Any) -> Any:
        jaxpr, shapes = jax.make_jaxpr(gradient, return_shape=True)(*arguments)
        leaves = jax.tree.leaves(arguments)
        # Without 16 bits the equations are the same. To trace a large model again would take seconds.
        inlined, apply = _rewriting(jaxpr) if _has_16_bits(jaxpr.jaxpr) else (jaxpr, _bind)
        results = _evaluate(inlined, leaves, apply)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rewritten


def _has_16_bits(jaxpr: core.Jaxpr) -> bool:
    """Whether an operation, or one in an inner jaxpr, gives a 16-bit result."""
    outvars = (var for equation in jaxpr.eqns for var in equation.outvars)
    inner = (inner for equation in jaxpr.eqns for inner in core.jaxprs_in_params(equation.params))
    return any(_is_16_bit(var.aval) for var in outvars) or any(map(_has_16_bits, inner))


def _rewriting(jaxpr: core.ClosedJaxpr) -> tuple[core.ClosedJaxpr, Callable]:
    """The jaxpr with calls of `jax.jit` inlined, as a sum inside may be cast outside; and what makes its sums float32.

    Both are arguments of `_evaluate`.
    """
    inlined = jax.make_jaxpr(lambda *xs: _evaluate(jaxpr, xs, _inline))(*jaxpr.in_avals)
    return inlined, functools.partial(_rewrite, wide=_sums_to_widen(inlined.jaxpr))


def _rewritten(jaxpr: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The jaxpr with its sums in float32."""
    inlined, apply = _rewriting(jaxpr)
    return jax.make_jaxpr(lambda *xs: _evaluate(inlined, xs, apply))(*inlined.in_avals)


def _evaluate(closed: core.ClosedJaxpr, arguments: Sequence[Any], apply: Callable) -> list[Any]:
    """Evaluates a jaxpr, each equation by `apply` under the equation's own name stack, traceback and context."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= zip(jaxpr.constvars, closed.consts, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        source = equation.source_info
        names = source_info_util.current_name_stack() + source.name_stack
        with source_info_util.user_context(source.traceback, name_stack=names), equation.ctx.manager:
            values |= zip(equation.outvars, apply(equation, list(map(read, equation.invars))), strict=True)
    return list(map(read, jaxpr.outvars))


def _inline(equation: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    if equation.primitive.name in ("jit", "pjit") and any(_is_16_bit(var.aval) for var in equation.outvars):
        with source_info_util.extend_name_stack(f"jit({equation.params['name']})"):
            return _evaluate(equation.params["jaxpr"], operands, _inline)
    return _bind(equation, operands)


def _rewrite(equation: core.JaxprEqn, operands: list[Any], *, wide: set[Any]) -> list[Any]:
    if wide.intersection(equation.outvars):
        return [_in_float32(equation, operands)]
    if equation.primitive.name == _CAST and wide.intersection(_variables(equation.invars)):
        return operands  # in float32 already
    if equation.primitive.name in _OPAQUE:
        return _bind(equation, operands)
    return _bind(equation, operands, **{name: _rewritten_parameter(x) for name, x in equation.params.items()})


def _rewritten_parameter(value: Any) -> Any:
    """A parameter of an operation, with the jaxprs in it rewritten."""
    if type(value) is tuple:  # branches of a cond
        return tuple(map(_rewritten_parameter, value))
    if isinstance(value, core.Jaxpr):  # of jax.checkpoint
        closed = _rewritten(core.ClosedJaxpr(value, ()))
        assert not closed.consts, "a jaxpr without constants cannot get any by rewriting"
        return closed.jaxpr
    return _rewritten(value) if isinstance(value, core.ClosedJaxpr) else value


def _sums_to_widen(jaxpr: core.Jaxpr) -> set[Any]:
    """The 16-bit variables that lead to float32 results only: sums, and what they become before the cast.

    On the way they are only moved, scaled, added up and cast to float32.
    """
    uses: dict[Any, list[Any]] = defaultdict(list)
    for equation in jaxpr.eqns:
        for var in _variables(equation.invars):
            uses[var].append(equation)
    results = set(_variables(jaxpr.outvars))
    only_to_results: set[Any] = set()  # variables that lead to float32 results only
    for equation in reversed(jaxpr.eqns):
        if _is_linear(equation) or equation.primitive.name in _CONTRACTIONS:
            var: Any = equation.outvars[0]
            fits = uses[var] and var not in results if _is_16_bit(var.aval) else var.aval.dtype == jnp.float32
            if fits and all(_is_linear(use) and use.outvars[0] in only_to_results for use in uses[var]):
                only_to_results.add(var)
    return {var for var in only_to_results if _is_16_bit(var.aval)}


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _is_linear(equation: core.JaxprEqn) -> bool:
    """Whether an operation gives the same result with float32 operands, but not rounded to 16 bits."""
    name = equation.primitive.name
    scales = name in ("mul", "div") and isinstance(equation.invars[1], core.Literal)
    return name in _LINEAR or scales or (name == _CAST and equation.params["new_dtype"] == jnp.float32)


def _is_16_bit(x: Any) -> bool:
    return getattr(x, "dtype", None) in (jnp.bfloat16, jnp.float16)  # tokens have no dtype


def _in_float32(equation: core.JaxprEqn, operands: list[Any]) -> Any:
    """The result of an operation in float32."""
    name, changes = equation.primitive.name, {}
    if name in _CONTRACTIONS:
        changes = {"preferred_element_type": np.dtype(np.float32)}
    elif name == "scatter-add":  # its parameters hold an addition of 16-bit numbers
        changes = {"update_jaxpr": jax.make_jaxpr(jax.lax.add)(*np.zeros(2, np.float32)).jaxpr}

    def on_16_bits(*operands: Any) -> Any:
        return _bind(equation, operands, **changes)[0]

    def on_float32(*operands: Any) -> Any:
        return on_16_bits(*(x.astype(jnp.float32) if _is_16_bit(x) else x for x in operands))

    if name not in _CONTRACTIONS:
        return on_float32(*operands)
    # TPUs multiply 16-bit numbers and add up in float32; XLA:CPU has no such contraction.
    return jax.lax.platform_dependent(*operands, cpu=on_float32, default=on_16_bits)


def _bind(equation: core.JaxprEqn, operands: Sequence[Any], **changes: Any) -> list[Any]:
    results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params({**equation.params, **changes}))
    return list(results) if equation.primitive.multiple_results else [results]

"""Runs that differ only in numbers share one compiled program, which JAX's compilation cache then holds once.

A program has its constants inside, and so has its key in the cache: another seed or another learning rate compiles
everything again. `with_shared_program` makes these constants arguments, where no bit of any result can change:

- random keys, which are integers;
- arrays that only `jax.lax.optimization_barrier` reads. The optimizer reads three kinds of numbers in this way: peaks
  and final values of schedules, and weight decays (see `trainer.optim.precision.opaque`).

Every other constant stays inside. XLA folds float constants into each other. If a constant became an argument, it would
not be folded, and results would be rounded differently.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from trainer import distributed
from trainer.compilation import AheadCompiled, quick_options
from trainer.errors import UserError
from trainer.program import Program


def with_shared_program(program: Program) -> Program:
    """The program with seed, schedules' values and weight decays as arguments of its compiled functions.

    It computes the same, bit for bit. Raises `UserError` for several processes and for `jax.pmap`.
    """
    strategy = program.strategy
    if distributed.count() > 1 or strategy.axis_name is not None:
        what = "the strategy pmap" if strategy.axis_name is not None else "a run of several processes"
        raise UserError(f"--compile-once cannot share the program of {what}")
    arguments = (program.state, strategy.abstract_batch(program.train_spec))
    state, replicated = strategy.shardings(program.state), strategy.sharding("", ())
    traced = program.train_step.jitted.trace(*arguments)
    train_step = _Shared(traced.jaxpr, traced.out_info, "train_step").jit(
        in_shardings=(None, state, strategy.batch_sharding), out_shardings=(state, replicated), donate_argnums=1
    )

    def init() -> Any:
        traced = program.init.trace()
        options = quick_options(strategy.devices)  # as the strategy has them
        return _Shared(traced.jaxpr, traced.out_info, "init").jit(out_shardings=state, compiler_options=options)()

    return dataclasses.replace(program, init=init, train_step=AheadCompiled(train_step, arguments))


class _Shared:
    """A traced function with some of its constants as its first argument."""

    def __init__(self, closed: ClosedJaxpr, results: Any, name: str) -> None:
        self._closed, self._structure, self._name = closed, jax.tree.structure(results), name
        constants = zip(closed.jaxpr.constvars, closed.consts, strict=True)
        self._is_argument = [_is_key(c) or _only_behind_barriers(closed.jaxpr, v) for v, c in constants]
        self.numbers = [c for c, taken in zip(closed.consts, self._is_argument, strict=True) if taken]

    def jit(self, **options: Any) -> "_Jitted":
        """The function under `jax.jit`, with options for the numbers and then for its own arguments."""

        def call(numbers: Sequence[Any], *arguments: Any) -> Any:
            given = iter(numbers)
            pairs = zip(self._closed.consts, self._is_argument, strict=True)
            constants = [next(given) if taken else c for c, taken in pairs]
            results = jax.core.eval_jaxpr(self._closed.jaxpr, constants, *jax.tree.leaves(arguments))
            return jax.tree.unflatten(self._structure, results)

        call.__name__ = self._name  # which profiles show
        return _Jitted(jax.jit(call, **options), self.numbers)


class _Jitted:
    """A jitted function that is called without its first argument."""

    def __init__(self, jitted: Any, numbers: Sequence[Any]) -> None:
        self._jitted, self._numbers = jitted, numbers

    def __call__(self, *arguments: Any) -> Any:
        return self._jitted(self._numbers, *arguments)

    def lower(self, *arguments: Any) -> "_Lowered":
        """As that of the jitted function."""
        return _Lowered(self._jitted.lower(self._numbers, *arguments), self._numbers)


class _Lowered:
    """A lowered function that compiles to one that is called without its first argument."""

    def __init__(self, lowered: Any, numbers: Sequence[Any]) -> None:
        self._lowered, self._numbers = lowered, numbers

    def compile(self) -> Callable[..., Any]:
        """As that of the lowered function."""
        compiled = self._lowered.compile()
        return lambda *arguments: compiled(self._numbers, *arguments)

    def as_text(self) -> str:
        """The program, without any of the numbers."""
        return self._lowered.as_text()


def _is_key(constant: Any) -> bool:
    return jax.dtypes.issubdtype(constant.dtype, jax.dtypes.prng_key)


def _only_behind_barriers(jaxpr: Jaxpr, variable: Var) -> bool:
    """Whether nothing but optimization barriers reads a variable, in this program and in those that it calls."""
    if any(result is variable for result in jaxpr.outvars):
        return False
    for equation in jaxpr.eqns:
        places = [i for i, read in enumerate(equation.invars) if not isinstance(read, Literal) and read is variable]
        if not places or equation.primitive.name == "optimization_barrier":
            continue
        inner = list(_inner(equation.params))
        # The arguments of a called program are the last ones of its call, as those of a branch after its condition.
        shifts = [len(equation.invars) - len(called.invars) for called in inner]
        if not inner or any(place < shift for shift in shifts for place in places):
            return False
        arguments = [(j, j.invars[i - shift]) for j, shift in zip(inner, shifts, strict=True) for i in places]
        if not all(_only_behind_barriers(called, argument) for called, argument in arguments):
            return False
    return True


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs that an equation calls."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr | Jaxpr):
                yield one.jaxpr if isinstance(one, ClosedJaxpr) else one

"""One update for every leaf of a tree, whatever its group: moments, direction, decay and learning rate in one pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from trainer.optim.precision import key_of, storage_dtype, store
from trainer.optim.treatment import Leaf, Scalars, Treatments, check_precision, is_none, per_leaf, rates, with_scalars
from trainer.optim.update_rules import Momentum


class ScaleByBeliefState(NamedTuple):
    """Moments of the gradients.

    Attributes:
      count: updates made; stays at the largest int32 when it gets there.
      mu: mean of the gradients, like the parameters; `optax.MaskedNode` for a leaf that is frozen.
      nu: mean of the squared prediction errors, like the parameters but real; `MaskedNode` also where none is kept.
      nu_max: the largest `nu` so far, under `amsgrad`; else None.
    """

    count: Int32[Array, ""]
    mu: Any
    nu: Any
    nu_max: Any = None


def fused(
    treatments: Treatments, *, amsgrad: bool = False, clip_norm: float | None = None, seed: Any = 0
) -> optax.GradientTransformationExtraArgs:
    """The transformation that treats every leaf as `treatments` says.

    The arithmetic is in float32 or wider; updates have the parameter's dtype (the gradient's, without parameters). A
    leaf whose gradient is None is left alone, and so is one that is frozen: its update is −0, which added to any number
    gives that number to the bit.

    Args:
      treatments: what happens to each leaf.
      amsgrad: whether leaves are divided by the root of their largest second moment so far.
      clip_norm: the largest norm of the gradient of all leaves that are not frozen; None for any.
      seed: of the stochastic rounding of bfloat16 moments.
    """

    def init(params: optax.Params) -> ScaleByBeliefState:
        leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
        # `optax.tree_map_params` calls with a node that has no leaf, to find where in the state parameters are.
        given = per_leaf(treatments, params) if leaves else []
        for leaf, treatment in zip(leaves, given, strict=True):
            if leaf is not None:
                check_precision(treatment, jnp.result_type(leaf))
        moments = [_zeros(leaf, treatment) for leaf, treatment in zip(leaves, given, strict=True)]
        mu, nu = structure.unflatten(m for m, _ in moments), structure.unflatten(s for _, s in moments)
        nu_max = jax.tree.map(jnp.zeros_like, nu) if amsgrad else None
        return ScaleByBeliefState(jnp.zeros((), jnp.int32), mu, nu, nu_max)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ScaleByBeliefState]:
        del extra
        leaves, structure = take_apart(treatments, updates, state, params)
        if amsgrad and state.nu_max is None and jax.tree.leaves(state.nu):
            raise ValueError("amsgrad needs a state with the largest second moments, made by its own init")
        results = []
        for i, (leaf, scalars) in enumerate(with_scalars(leaves, state.count, clip_norm)):
            if scalars is None:
                u = None if leaf.g is None else jnp.full_like(leaf.g, -0.0, _dtype(leaf))
                results.append((u, leaf.m, leaf.s, leaf.s_max))
            else:
                results.append(_update_leaf(leaf, scalars, partial(_save, seed, state.count, i)))
        updates, mu, nu, nu_max = (structure.unflatten([result[i] for result in results]) for i in range(4))
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, ScaleByBeliefState(count, mu, nu, None if state.nu_max is None else nu_max)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type] - its state is ours


def take_apart(
    treatments: Treatments, updates: optax.Updates, state: Any, params: optax.Params | None
) -> tuple[list[Leaf], Any]:
    """The leaves of an update, and the structure of its tree, in which None is a leaf."""
    if not isinstance(state, ScaleByBeliefState):
        raise ValueError(
            f"the state is a {type(state).__name__}, not what init returned; trainer.optim.migrate.from_optax makes "
            "one of a state of optax.adabelief"
        )
    gradients, structure = jax.tree.flatten(updates, is_leaf=is_none)
    none = [None] * len(gradients)
    trees = (state.mu, state.nu, state.nu_max, params)
    columns = [none if tree is None else structure.flatten_up_to(tree) for tree in trees]
    given = per_leaf(treatments, updates)
    # Python numbers are parameters, too.
    gradients, columns[3] = ([None if x is None else jnp.asarray(x) for x in xs] for xs in (gradients, columns[3]))
    return [Leaf(*values) for values in zip(gradients, *columns, given, strict=True)], structure


def prepare(leaf: Leaf, scalars: Scalars) -> tuple[Leaf, Scalars]:
    """Leaf and scalars in the dtype of the computation; the gradient clipped, and with the coupled decay in it."""
    arrays: list[Any] = [None if x is None or isinstance(x, optax.MaskedNode) else x for x in leaf[:5]]
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in arrays if x is not None))
    real = jnp.finfo(dtype).dtype
    to = (dtype, dtype, real, real, dtype)
    values: list[Any] = [None if x is None else x.astype(t) for x, t in zip(arrays, to, strict=True)]
    g, m, s, s_max, p = values
    scalars = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(real), scalars)
    if scalars.clip is not None:
        g = g * scalars.clip
    if scalars.weight_decay is not None:
        if p is None:
            raise ValueError("weight decay needs the parameters: call update(gradients, state, params)")
        if leaf.treatment.decay == "coupled":
            g = g + scalars.weight_decay * p
    return Leaf(g, m, s, s_max, p, leaf.treatment), scalars


def _save(seed: Any, count: Int32[Array, ""], index: int, x: Array, old: Array, *, second: bool) -> Array:
    """A new moment of leaf number `index` as it is stored, in the dtype of the old one."""
    if old.dtype != jnp.bfloat16:  # no key is needed, and tracing one for every leaf takes its time
        return x.astype(old.dtype)
    return store(x, old.dtype, key_of(seed, count, 2 * index + second))


def _update_leaf(stored: Leaf, scalars: Scalars, save: Callable[..., Array]) -> tuple[Any, Any, Any, Any]:
    """The update, and the new moments."""
    leaf, scalars = prepare(stored, scalars)
    scaling, due = leaf.treatment.scaling, scalars.due
    m = _if_due(due, save(scaling.first(leaf.g, leaf.m), stored.m, second=False), stored.m)
    # From here on the moments are those that are stored: the next update will know no others.
    leaf = leaf._replace(m=m.astype(leaf.m.dtype))
    s, s_max = stored.s, stored.s_max
    if not isinstance(scaling, Momentum):
        s = _if_due(due, save(scaling.second(leaf.g, leaf.m, leaf.s), stored.s, second=True), stored.s)
        leaf = leaf._replace(s=s.astype(leaf.s.dtype))
        if s_max is not None:
            s_max = jnp.maximum(s_max, s)
            leaf = leaf._replace(s=s_max.astype(leaf.s.dtype))
    rate, shrink = rates(leaf.treatment, scalars)
    u = scaling.direction(leaf.g, leaf.m, leaf.s, scalars.corrections, -rate)
    if shrink is not None:
        u = u - shrink * leaf.p
    u = u.astype(_dtype(stored))
    return _if_due(due, u, jnp.full_like(u, -0.0)), m, s, s_max


def _if_due(due: Any, new: Any, old: Any) -> Any:
    return new if due is None else jnp.where(due, new, old)


def _dtype(leaf: Leaf) -> Any:
    """The dtype of an update."""
    return (leaf.g if leaf.p is None else leaf.p).dtype


def _zeros(leaf: Any, treatment: Any) -> tuple[Any, Any]:
    """The first moments of a parameter, which may be None."""
    if leaf is None:
        return None, None
    dtype, masked = jnp.result_type(leaf), optax.MaskedNode()
    if treatment.frozen:
        return masked, masked
    m = jnp.zeros_like(leaf, storage_dtype(dtype, treatment.mu_dtype))
    if isinstance(treatment.scaling, Momentum):
        return m, masked
    return m, jnp.zeros_like(leaf, storage_dtype(dtype, treatment.nu_dtype, real=True))

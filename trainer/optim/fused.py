"""One update for every leaf of a tree, whatever its group: moments, direction, decay and learning rate in one pass."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from trainer.optim.rounding import STORED, compute_dtype, key_of, storage_dtype, store
from trainer.optim.scalings import Corrections, Momentum, Scaling, square


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


@dataclasses.dataclass(frozen=True, eq=False)
class Treatment:
    """What happens to the leaves of a group. Two leaves are of one group if their treatment is the same object.

    Attributes:
      scaling: how gradients become directions.
      learning_rate: a number, an array, or a schedule of the updates already made.
      weight_decay: likewise; None for none.
      decay: "decoupled" adds decay · p to the direction; "fixed" does not multiply that by the learning rate;
        "coupled" adds it to the gradient.
      frozen: nothing happens, and no moments are kept.
      clip_norm: the largest norm of the gradient of the whole group; None for any.
      every: the group is updated at counts 0, every, 2·every, …; the gradients between are not looked at.
      mu_dtype: of the first moment; None for the parameter's, but at least float32.
      nu_dtype: of the second moment, likewise.
    """

    scaling: Scaling
    learning_rate: Any
    weight_decay: Any = None
    decay: str = "decoupled"
    frozen: bool = False
    clip_norm: float | None = None
    every: int = 1
    mu_dtype: Any = None
    nu_dtype: Any = None


Treatments = Any
"""A tree of `Treatment` like the parameters, or a prefix of it, or a function of the parameters that gives one."""


class Scalars(NamedTuple):
    """What a treatment comes to in one update.

    Attributes:
      corrections: of the scaling.
      learning_rate: its value.
      weight_decay: its value; None for none.
      clip: factor of the gradient; None for none.
      due: whether the group is updated at all; None for always.
    """

    corrections: Corrections
    learning_rate: Array
    weight_decay: Array | None
    clip: Array | None
    due: Array | None


class Leaf(NamedTuple):
    """One leaf of an update.

    Attributes:
      g: its gradient, or None.
      m: its first moment, or `MaskedNode`.
      s: its second moment, or `MaskedNode`.
      s_max: its largest second moment; None without `amsgrad`.
      p: its parameter; None if no parameters were given.
      treatment: that of its group.
    """

    g: Any
    m: Any
    s: Any
    s_max: Any
    p: Any
    treatment: Any

    @property
    def treated(self) -> bool:
        """Whether there is something to do: it is not frozen, and there is a gradient."""
        return self.g is not None and not self.treatment.frozen


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
        leaves, structure = jax.tree.flatten(params, is_leaf=_is_none)
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
                results.append((None if leaf.g is None else jnp.full_like(leaf.g, -0.0, _dtype(leaf)), *leaf[1:4]))
            else:
                results.append(_update_leaf(leaf, scalars, partial(_save, seed, state.count, i)))
        updates, mu, nu, nu_max = (structure.unflatten([result[i] for result in results]) for i in range(4))
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, ScaleByBeliefState(count, mu, nu, None if state.nu_max is None else nu_max)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type] - its state is ours


def per_leaf(treatments: Treatments, tree: Any) -> list[Any]:
    """The treatment of each leaf of `tree`, of which None is one; it may have None for its treatment."""
    prefix = treatments(tree) if callable(treatments) else treatments
    found: list[Any] = []

    def extend(treatment: Treatment | None, below: Any) -> None:
        found.extend([treatment] * len(jax.tree.leaves(below, is_leaf=_is_none)))

    jax.tree.map(extend, prefix, tree, is_leaf=_is_none)
    return found


def take_apart(
    treatments: Treatments, updates: optax.Updates, state: Any, params: optax.Params | None
) -> tuple[list[Leaf], Any]:
    """The leaves of an update, and the structure of its tree, in which None is a leaf."""
    if not isinstance(state, ScaleByBeliefState):
        raise ValueError(
            f"the state is a {type(state).__name__}, not what init returned; trainer.optim.migrate.from_optax makes "
            "one of a state of optax.adabelief"
        )
    gradients, structure = jax.tree.flatten(updates, is_leaf=_is_none)
    none = [None] * len(gradients)
    trees = (state.mu, state.nu, state.nu_max, params)
    columns = [none if tree is None else structure.flatten_up_to(tree) for tree in trees]
    given = per_leaf(treatments, updates)
    # Python numbers are parameters, too.
    gradients, columns[3] = ([None if x is None else jnp.asarray(x) for x in xs] for xs in (gradients, columns[3]))
    return [Leaf(*values) for values in zip(gradients, *columns, given, strict=True)], structure


def with_scalars(
    leaves: Sequence[Leaf], count: Int32[Array, ""], clip_norm: float | None
) -> list[tuple[Leaf, Scalars | None]]:
    """Each leaf with the scalars of its treatment in the update after `count` others; None if it is not treated."""
    treated = [leaf for leaf in leaves if leaf.treated]
    clip = None if clip_norm is None else _clip(treated, clip_norm, None)
    groups: dict[Treatment, list[Leaf]] = {}
    for leaf in treated:
        groups.setdefault(leaf.treatment, []).append(leaf)
    found = {treatment: _scalars(treatment, count, group, clip) for treatment, group in groups.items()}
    return [(leaf, found[leaf.treatment] if leaf.treated else None) for leaf in leaves]


def _scalars(treatment: Treatment, count: Int32[Array, ""], group: Sequence[Leaf], clip: Array | None) -> Scalars:
    def value(number: Any) -> Array:
        return jnp.asarray(number(count) if callable(number) else number)

    every, decay = treatment.every, treatment.weight_decay
    # Corrections follow the updates of the group, schedules those of the run.
    t = optax.safe_increment(count if every == 1 else count // every)
    return Scalars(
        treatment.scaling.corrections(jnp.asarray(t)),
        value(treatment.learning_rate),
        None if decay is None else value(decay),
        clip if treatment.clip_norm is None else _clip(group, treatment.clip_norm, clip),
        None if every == 1 else count % every == 0,
    )


def _clip(leaves: Sequence[Leaf], limit: float, before: Array | None) -> Array:
    """The factor that brings the norm of the gradients, already multiplied by `before`, down to `limit`."""
    length = norm([leaf.g for leaf in leaves])
    if before is None:
        return limit / jnp.maximum(length, limit)
    return before * (limit / jnp.maximum(length * before, limit))


def norm(leaves: Sequence[Any]) -> Float[Array, ""]:
    """The Euclidean norm of arrays taken as one vector, in float32 or wider."""
    squares = [jnp.sum(square(x.astype(compute_dtype(x.dtype)))) for x in leaves]
    return jnp.sqrt(sum(squares, jnp.zeros(())))


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


def rates(treatment: Treatment, scalars: Scalars) -> tuple[Array, Array | None]:
    """By what an update multiplies the direction and the parameter before it subtracts them; None for no decay."""
    rate, decay = scalars.learning_rate, scalars.weight_decay
    if decay is None or treatment.decay == "coupled":
        return rate, None
    return rate, decay if treatment.decay == "fixed" else rate * decay


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


def check_precision(treatment: Treatment, dtype: Any) -> None:
    """Raises `ValueError` for a number that is lost in the dtype in which a leaf of `dtype` is computed or stored."""
    for name in ("mu_dtype", "nu_dtype"):
        asked = getattr(treatment, name)
        if asked is not None and _name(asked) not in STORED:
            raise ValueError(f"{name} is {_name(asked)}; moments are stored as {', '.join(STORED)}")
    computed = jnp.finfo(compute_dtype(dtype)).dtype
    stored = storage_dtype(dtype, treatment.nu_dtype, real=True)
    # eps_root is added to the second moment and must not be lost in that either.
    for name, used in (("eps", computed), ("eps_root", computed), ("eps_root", stored)):
        value, smallest = getattr(treatment.scaling, name, 0.0), float(jnp.finfo(used).tiny)
        if isinstance(value, float | int) and 0 < value < smallest:
            raise ValueError(f"{name} is {value}, which is 0 in {used}; its smallest number is {smallest:.3g}")


def _name(dtype: Any) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def _is_none(x: Any) -> bool:
    return x is None

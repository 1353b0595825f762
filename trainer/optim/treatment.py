"""What happens to each leaf of an update, and which numbers that comes to."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from trainer.optim.precision import STORED, compute_dtype, storage_dtype
from trainer.optim.update_rules import Corrections, Scaling, square


@dataclasses.dataclass(frozen=True, eq=False)
class ParamGroup:
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
"""A tree of `ParamGroup` like the parameters, or a prefix of it, or a function of the parameters that gives one."""


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


def per_leaf(treatments: Treatments, tree: Any) -> list[Any]:
    """The treatment of each leaf of `tree`, of which None is one; it may have None for its treatment."""
    prefix = treatments(tree) if callable(treatments) else treatments
    found: list[Any] = []

    def extend(treatment: ParamGroup | None, below: Any) -> None:
        found.extend([treatment] * len(jax.tree.leaves(below, is_leaf=is_none)))

    jax.tree.map(extend, prefix, tree, is_leaf=is_none)
    return found


def with_scalars(
    leaves: Sequence[Leaf], count: Int32[Array, ""], clip_norm: float | None
) -> list[tuple[Leaf, Scalars | None]]:
    """Each leaf with the scalars of its treatment in the update after `count` others; None if it is not treated."""
    treated = [leaf for leaf in leaves if leaf.treated]
    clip = None if clip_norm is None else _clip(treated, clip_norm, None)
    groups: dict[ParamGroup, list[Leaf]] = {}
    for leaf in treated:
        groups.setdefault(leaf.treatment, []).append(leaf)
    found = {treatment: _scalars(treatment, count, group, clip) for treatment, group in groups.items()}
    return [(leaf, found[leaf.treatment] if leaf.treated else None) for leaf in leaves]


def _scalars(treatment: ParamGroup, count: Int32[Array, ""], group: Sequence[Leaf], clip: Array | None) -> Scalars:
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


def rates(treatment: ParamGroup, scalars: Scalars) -> tuple[Array, Array | None]:
    """By what an update multiplies the direction and the parameter before it subtracts them; None for no decay."""
    rate, decay = scalars.learning_rate, scalars.weight_decay
    if decay is None or treatment.decay == "coupled":
        return rate, None
    return rate, decay if treatment.decay == "fixed" else rate * decay


def check_precision(treatment: ParamGroup, dtype: Any) -> None:
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


def is_none(x: Any) -> bool:
    """Whether it is None, which is a leaf here."""
    return x is None

"""One pass over the parameters of all groups: clipping, update rule, weight decay, learning rate, stored moments."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from trainer.optim.precision import (
    check_precision,
    global_norm,
    opaque,
    rounded_update,
    rounding_bits,
    storage_dtype,
    store_moment,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ParamGroup:
    """How the parameters of one label are updated.

    `decay` "decoupled" adds weight_decay · p to the rule's update, and the sum is multiplied by the learning rate. With
    "fixed", the decay is not multiplied by it. With "coupled", weight_decay · p is added to the gradient. With
    "corrected", the decay is multiplied by the squared learning rate over the `peak_rate` (Defazio, arXiv:2506.02285).
    """

    rule: Any  # the update rule, `trainer.optim.adabelief.Belief` or another class with its methods
    learning_rate: Any  # a number, an array, or a schedule of the number of updates already made
    weight_decay: Any = None  # likewise; None for no decay
    decay: str = "decoupled"
    clip_norm: float | None = None  # largest norm of the gradient of the whole group; None for no limit
    every: int = 1  # the group is updated at counts 0, every, 2·every, …; the gradients between are not used
    mu_dtype: Any = None  # dtype of mu in the state; None for the parameter's, but at least float32
    nu_dtype: Any = None  # dtype of nu in the state, likewise
    peak_rate: Any = None  # the largest learning rate; needed for "corrected"
    cautious: bool = False  # whether `scaled_update` drops elements that disagree with the gradient in sign
    rounds_randomly: bool = False  # whether bfloat16 parameters are rounded stochastically, see `rounded_update`


FusedGroups = Mapping[str, ParamGroup | None]  # by label; None: the fused pass leaves this label alone


class ScaleByBeliefState(NamedTuple):
    """Moments of all groups of a fused pass, in trees like the parameters, with the field names of Optax's state."""

    count: Int32[Array, ""]  # updates made; stays at the largest int32 when it gets there
    mu: Any  # mean of the gradients (sgd: their decayed sum); `optax.MaskedNode` for a frozen leaf
    nu: Any  # mean of the squared prediction errors (Adam: gradients), real; `MaskedNode` also where none is kept
    nu_max: Any = None  # the largest `nu` so far, under `amsgrad`; else None


class UpdateScalars(NamedTuple):
    """The scalars of one group in one update."""

    bias_corrections: Any  # of the update rule
    learning_rate: Array
    weight_decay: Array | None
    clip: Array | None  # factor of the gradient
    due: Array | None  # whether the group is updated at all; None for always


def fused_groups(
    groups: FusedGroups, labels: Any, *, amsgrad: bool = False, clip_norm: float | None = None, seed: Any = 0
) -> optax.GradientTransformationExtraArgs:
    """The transformation that updates each leaf as the group of its label says.

    The arithmetic is in float32 or wider; updates have the parameter's dtype (the gradient's, without parameters), and
    float32 where bfloat16 parameters are rounded stochastically. A leaf whose gradient is None is left alone. The
    update of a frozen leaf is −0: any number plus −0 is that number, bit for bit.

    Args:
      groups: by label; None for a label that is left alone.
      labels: a tree of labels like the parameters, a prefix of one, or a function of the parameters that returns one.
      amsgrad: whether leaves are divided by the root of their largest second moment so far.
      clip_norm: largest norm of the gradient of all leaves that are not frozen; None for no limit.
      seed: of the stochastic rounding of bfloat16 moments and parameters.
    """

    def init(params: optax.Params) -> ScaleByBeliefState:
        # `optax.tree_map_params` calls this with a placeholder without leaves, to find the parameters in the state.
        names = _label_tree(labels, params) if jax.tree.leaves(params) else params

        def zeros(label: str, p: Any, *, second: bool) -> Any:
            group, dtype = groups[label], jnp.result_type(p)
            if group is None or (second and group.rule.nu_center is None):
                return optax.MaskedNode()
            check_precision(dtype, group.rule, group.mu_dtype, group.nu_dtype)
            return jnp.zeros_like(p, storage_dtype(dtype, group.nu_dtype if second else group.mu_dtype, real=second))

        mu, nu = (jax.tree.map(partial(zeros, second=second), names, params) for second in (False, True))
        nu_max = jax.tree.map(jnp.zeros_like, nu) if amsgrad else None
        return ScaleByBeliefState(jnp.zeros((), jnp.int32), mu, nu, nu_max)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ScaleByBeliefState]:
        del extra
        leaves, structure = flatten(labels, updates, state, params)
        if amsgrad and state.nu_max is None and jax.tree.leaves(state.nu):
            raise ValueError("amsgrad needs a state with the largest second moments, made by its own init")
        scalars = update_scalars(groups, leaves, state.count, clip_norm)
        results: list[tuple] = []
        for number, (label, g, moments, p) in enumerate(leaves):
            if g is None:
                results.append((None, *moments))
            elif (group := groups[label]) is None:
                results.append((jnp.full_like(g, -0.0, (g if p is None else p).dtype), *moments))
            else:
                store_new = partial(store_moment, scalars[label].due, seed, state.count, number)
                u, *moments = _update_leaf(group, scalars[label], g, moments, p, store_new)
                if group.rounds_randomly and p is not None and p.dtype == jnp.bfloat16:
                    u = rounded_update(u, p, rounding_bits(seed, state.count, 2 * len(leaves) + number))
                else:
                    u = u.astype((g if p is None else p).dtype)
                results.append((u, *moments))
        updates, mu, nu, nu_max = (structure.unflatten([result[i] for result in results]) for i in range(4))
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, ScaleByBeliefState(count, mu, nu, None if state.nu_max is None else nu_max)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type] - its state is ours


def _update_leaf(
    group: ParamGroup, scalars: UpdateScalars, g: Array, moments: tuple, p: Any, store_new: Callable[..., Array]
) -> tuple[Array, Any, Any, Any]:
    """The update of one leaf in the dtype of the computation, and its new mu, nu and nu_max as they are stored."""
    rule, (stored_mu, stored_nu, stored_max) = group.rule, moments
    scalars, g, mu, nu, nu_max, p = prepare_leaf(group, scalars, g, moments, p)
    stored_mu = store_new(rule.update_mu(g, mu), stored_mu, second=False)
    # From here on the moments are as they are stored: the next update reads nothing else.
    mu = stored_mu.astype(mu.dtype)
    if nu is not None:
        stored_nu = store_new(rule.update_nu(g, mu, nu), stored_nu, second=True)
        nu = stored_nu.astype(nu.dtype)
    if nu_max is not None:
        stored_max = jnp.maximum(stored_max, stored_nu)
        nu = stored_max.astype(nu_max.dtype)
    u = scaled_update(group, scalars, g, mu, nu)
    if scalars.weight_decay is not None:
        u = u - scalars.weight_decay * p
    u = u if scalars.due is None else jnp.where(scalars.due, u, jnp.full_like(u, -0.0))
    return u, stored_mu, stored_nu, stored_max


def scaled_update(group: ParamGroup, scalars: UpdateScalars, g: Array, mu: Array, nu: Any) -> Array:
    """The rule's update times minus the learning rate, from the new moments, without weight decay.

    A cautious group drops the elements with u · g ≥ 0, where u is the signed update, and multiplies the kept ones by
    (number of all elements) / (number of kept elements), at most by 1,000 (Liang et al., arXiv:2411.16085).
    """
    u = group.rule.update(g, mu, nu, scalars.bias_corrections, -scalars.learning_rate)
    if not group.cautious:
        return u
    agrees = (jnp.real(jnp.sign(u) * jnp.conj(jnp.sign(g))) < 0).astype(jnp.finfo(u.dtype).dtype)
    return u * (agrees / jnp.maximum(jnp.mean(agrees), 1e-3))


def prepare_leaf(group: ParamGroup, scalars: UpdateScalars, g: Any, moments: tuple, p: Any) -> tuple[Any, ...]:
    """Scalars, gradient, mu, nu, nu_max and parameter in the dtype of the computation; None for a moment not kept.

    The gradient is clipped. Coupled decay is added to it; otherwise `scalars.weight_decay` becomes the fraction of p
    that is subtracted.
    """
    arrays = [None if isinstance(x, optax.MaskedNode) else x for x in (g, *moments, p)]
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in arrays if x is not None))
    real = jnp.finfo(dtype).dtype
    cast = zip(arrays, (dtype, dtype, real, real, dtype), strict=True)
    values: list[Any] = [None if x is None else x.astype(to) for x, to in cast]
    g, mu, nu, nu_max, p = values
    scalars = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(real), scalars)
    if scalars.clip is not None:
        g = g * scalars.clip
    if scalars.weight_decay is not None:
        if p is None:
            raise ValueError("weight decay needs the parameters: call update(gradients, state, params)")
        if group.decay == "coupled":
            g, scalars = g + scalars.weight_decay * p, scalars._replace(weight_decay=None)
        elif group.decay == "decoupled":
            scalars = scalars._replace(weight_decay=scalars.learning_rate * scalars.weight_decay)
        elif group.decay == "corrected":
            share = scalars.learning_rate * (scalars.learning_rate / group.peak_rate) * scalars.weight_decay
            scalars = scalars._replace(weight_decay=share)
    return scalars, g, mu, nu, nu_max, p


def update_scalars(
    groups: FusedGroups, leaves: Sequence[tuple], count: Int32[Array, ""], clip_norm: float | None
) -> dict[str, UpdateScalars]:
    """The scalars of each group that has a gradient, in the update after `count` others; leaves are from `flatten`."""
    gradients = [(label, g) for label, g, _, _ in leaves if g is not None and groups[label] is not None]
    clip_all = None if clip_norm is None else _clip([g for _, g in gradients], clip_norm, None)
    scalars = {}
    for label in dict.fromkeys(label for label, _ in gradients):
        group: Any = groups[label]
        decay = None if group.weight_decay is None else value_at(group.weight_decay, count)
        # Bias corrections follow the updates of the group, schedules those of the run.
        t = jnp.asarray(optax.safe_increment(count if group.every == 1 else count // group.every))
        own = [g for other, g in gradients if other == label]
        clip = clip_all if group.clip_norm is None else _clip(own, group.clip_norm, clip_all)
        due = None if group.every == 1 else count % group.every == 0
        corrections, rate = group.rule.bias_corrections(t), value_at(group.learning_rate, count)
        scalars[label] = UpdateScalars(corrections, rate, decay, clip, due)
    return scalars


def value_at(number: Any, count: Int32[Array, ""]) -> Array:
    """The value of a number, an array or a schedule after `count` updates."""
    if isinstance(number, jax.Array) and not isinstance(number, jax.core.Tracer):
        return opaque(number)
    return jnp.asarray(number(count) if callable(number) else number)


def _clip(gradients: Sequence[Array], limit: float, before: Array | None) -> Array:
    """The factor that brings the norm of the gradients, already multiplied by `before`, down to `limit`."""
    norm = global_norm(gradients)
    if before is None:
        return limit / jnp.maximum(norm, limit)
    return before * (limit / jnp.maximum(norm * before, limit))


def flatten(labels: Any, updates: Any, state: Any, params: Any) -> tuple[list[tuple[Any, Any, tuple, Any]], Any]:
    """(label, gradient, (mu, nu, nu_max), parameter) of each leaf, and the structure of the tree; None is a leaf."""
    if not isinstance(state, ScaleByBeliefState):
        raise ValueError(
            f"the state is a {type(state).__name__}, not what init returned; trainer.from_optax "
            "converts a state of optax.adabelief"
        )
    gradients, structure = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
    trees = (state.mu, state.nu, state.nu_max, params)
    none = [None] * len(gradients)
    mu, nu, nu_max, params = (none if tree is None else structure.flatten_up_to(tree) for tree in trees)
    names = jax.tree.leaves(_label_tree(labels, updates), is_leaf=lambda x: x is None)
    # Python numbers are parameters, too.
    gradients, params = ([None if x is None else jnp.asarray(x) for x in column] for column in (gradients, params))
    return list(zip(names, gradients, zip(mu, nu, nu_max, strict=True), params, strict=True)), structure


def _label_tree(labels: Any, tree: Any) -> Any:
    """The label of each leaf, in a tree like `tree`; None where that has None."""
    return jax.tree.broadcast(labels(tree) if callable(labels) else labels, tree, is_leaf=lambda x: x is None)

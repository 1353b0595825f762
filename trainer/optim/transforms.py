"""Groups that an Optax transformation updates, beside those of the fused pass."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from trainer.optim import fused, schedule_free
from trainer.optim.fused import ParamGroup, ScaleByBeliefState
from trainer.optim.precision import compute_dtype, global_norm
from trainer.rules import path_of

# Names of the counters in Optax's states, and what they are before the first update.
_FIRST_COUNTS = {"count": 0, "count_m2": 0, "t": 0, "step_count": 1}
_MASKED = optax.MaskedNode()  # a leaf of another label; a tree without leaves to JAX


@dataclasses.dataclass(frozen=True, eq=False)
class TransformGroup:
    """How an Optax transformation updates the parameters of one label; fields are as in `fused.ParamGroup`."""

    transform: optax.GradientTransformation
    learning_rate: Any
    weight_decay: Any = None
    decay: str = "decoupled"
    clip_norm: float | None = None
    every: int = 1
    peak_rate: Any = None


Groups = Mapping[str, ParamGroup | TransformGroup | None]  # by label; None for a label whose leaves are frozen


def split_groups(groups: Groups) -> tuple[fused.FusedGroups, dict[str, TransformGroup]]:
    """Two mappings: groups of the fused pass (frozen labels included), and groups that Optax transformations update."""
    others = {label: group for label, group in groups.items() if isinstance(group, TransformGroup)}
    return {label: group for label, group in groups.items() if not isinstance(group, TransformGroup)}, others


class OtherState(NamedTuple):
    """The state of one label that an Optax transformation updates."""

    inner: Any  # of the transformation
    moved: Float[Array, ""]  # the norm of its last update, for the statistics


@flax.struct.dataclass
class MixedState:
    """The state of an optimizer some of whose labels are updated by Optax transformations.

    Such a label is clipped before and decayed after the transformation, as the fused groups are, so every setting of a
    group means the same for all of them. The arithmetic is in float32 or wider.
    """

    fused: Any  # the `ScaleByBeliefState` of the fused pass, without moments where all labels are others
    others: Mapping[str, OtherState]  # by label

    @property
    def count(self) -> Int32[Array, ""]:
        """Updates made."""
        return self.fused.count


def mixed(
    groups: fused.FusedGroups,
    others: Mapping[str, TransformGroup],
    labels: Any,
    *,
    amsgrad: bool,
    clip_norm: float | None,
    seed: int,
) -> optax.GradientTransformationExtraArgs:
    """The fused pass over `groups` and the transformations of the `others`, as one; arguments as for `fused_groups`."""
    main = fused.fused_groups({**groups, **dict.fromkeys(others)}, labels, amsgrad=amsgrad, seed=seed)
    names = jax.tree.leaves(labels)
    frozen = {label for label, group in groups.items() if group is None}

    def init(params: Any) -> MixedState:
        if not jax.tree.leaves(params):  # of `optax.tree_map_params`, a placeholder
            return MixedState(main.init(params), {label: OtherState(params, params) for label in others})
        leaves, structure = jax.tree.flatten(params)
        inner = {
            label: group.transform.init(structure.unflatten(_only(label, names, leaves)))
            for label, group in others.items()
        }
        for state in inner.values():
            schedule_free.find(state)  # refuses two of them
        return MixedState(main.init(params), {label: OtherState(x, jnp.zeros(())) for label, x in inner.items()})

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, MixedState]:
        del extra
        if params is None:
            raise ValueError("the parameters are needed: call update(gradients, state, params)")
        grads, structure = jax.tree.flatten(updates, is_leaf=lambda x: x is None)
        grads = clip_all(grads, [name in frozen for name in names], clip_norm)
        own = structure.flatten_up_to(params)
        found, fused_state = main.update(structure.unflatten(grads), state.fused, params)
        results, states = structure.flatten_up_to(found), {}
        for label, group in others.items():
            g, p = (structure.unflatten(_only(label, names, leaves)) for leaves in (grads, own))
            tree, states[label] = _update(group, g, state.others[label], p, state.count)
            for place, u in enumerate(structure.flatten_up_to(tree)):
                if not isinstance(u, optax.MaskedNode):
                    results[place] = u.astype(own[place].dtype)
        return structure.unflatten(results), MixedState(fused_state, states)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type] - its state is ours


def clip_all(grads: list[Any], frozen: list[bool], clip_norm: float | None) -> list[Any]:
    """The gradients, scaled so that their common norm is at most `clip_norm`.

    Gradients that are None or frozen do not count in the norm and are returned unchanged.
    """
    if clip_norm is None:
        return grads
    is_used = [g is not None and not still for g, still in zip(grads, frozen, strict=True)]
    norm = global_norm([g for g, used in zip(grads, is_used, strict=True) if used])
    factor = clip_norm / jnp.maximum(norm, clip_norm)
    return [(g * factor).astype(g.dtype) if used else g for g, used in zip(grads, is_used, strict=True)]


def _only(label: str, names: list[str], leaves: list[Any]) -> list[Any]:
    """The leaves of a label in the dtype of the computation, and a node without leaves for each of the others."""
    is_own = [name == label and x is not None for name, x in zip(names, leaves, strict=True)]
    return [x.astype(compute_dtype(x.dtype)) if own else _MASKED for own, x in zip(is_own, leaves, strict=True)]


def _update(
    group: TransformGroup, g: Any, state: OtherState, p: Any, count: Int32[Array, ""]
) -> tuple[Any, OtherState]:
    """The update of one label and its new state."""
    rate = group.learning_rate(count)
    decay = None if group.weight_decay is None else fused.value_at(group.weight_decay, count)
    if group.clip_norm is not None:
        factor = group.clip_norm / jnp.maximum(global_norm(jax.tree.leaves(g)), group.clip_norm)
        g = jax.tree.map(lambda x: x * factor, g)
    if decay is not None and group.decay == "coupled":
        g = jax.tree.map(lambda x, q: x + decay * q, g, p)
    u, inner = group.transform.update(g, state.inner, p)
    if decay is not None and group.decay != "coupled":
        factors = {"fixed": 1.0, "decoupled": rate, "corrected": rate * rate / group.peak_rate}
        u, inner = schedule_free.decay(u, state.inner, inner, p, decay * factors[group.decay])
    new = OtherState(inner, global_norm(jax.tree.leaves(u)))
    if group.every == 1:
        return u, new
    due = count % group.every == 0
    u = jax.tree.map(lambda x: jnp.where(due, x, jnp.full_like(x, -0.0)), u)
    return u, jax.tree.map(lambda x, old: jnp.where(due, x, old), new, state)


def set_count(state: Any, groups: Groups, count: Int32[Array, ""]) -> Any:
    """The optimizer state with every counter set as it is after `count` updates of the run; moments stay."""
    if not isinstance(state, MixedState):
        return state._replace(count=count)

    def counted(label: str, other: OtherState) -> OtherState:
        every = getattr(groups[label], "every", 1)

        def replace(keys: Any, leaf: Any) -> Any:
            first = _FIRST_COUNTS.get(path_of(keys).rpartition("/")[2])
            if first is None or not jnp.issubdtype(leaf.dtype, jnp.integer):  # a moment of a parameter of that name
                return leaf
            return jnp.asarray(first - (-count // every), leaf.dtype)

        return jax.tree_util.tree_map_with_path(replace, other)

    others = {label: counted(label, other) for label, other in state.others.items()}
    return MixedState(state.fused._replace(count=count), others)


def recounted(state: Any, groups: Groups, like: Any) -> Any:
    """The optimizer state of a changed run with the counters that follow from its `count`, sharded as `like`.

    A group that is now updated every other step, say, has made fewer updates after as many of the run.
    """
    return jax.device_put(set_count(state, groups, state.count), jax.tree.map(lambda x: x.sharding, like))


def candidate_paths(path: str) -> list[str]:
    """The possible paths of an array in a checkpoint: with and without the level `fused/` that `MixedState` adds."""
    inner = "opt_state/fused/"
    if path.startswith(inner):
        return [path, path.replace(inner, "opt_state/", 1)]
    if path.startswith("opt_state/") and not path.startswith("opt_state/others/"):
        return [path, path.replace("opt_state/", inner, 1)]
    return [path]


def move_without_gradient(label: str, group: TransformGroup, names: list[str], params: Any, count: Any) -> list[Any]:
    """The update that the label's transformation makes from zero gradients, by leaf; None for leaves of other labels.

    It is not always 0, for example with Yogi.
    """
    leaves, structure = jax.tree.flatten(params)
    own = structure.unflatten(_only(label, names, leaves))
    state = MixedState(ScaleByBeliefState(count, None, None), {label: OtherState(group.transform.init(own), count)})
    inner = set_count(state, {label: group}, count).others[label].inner
    updates, _ = group.transform.update(jax.tree.map(jnp.zeros_like, own), inner, own)
    return [None if isinstance(u, optax.MaskedNode) else u for u in structure.flatten_up_to(updates)]

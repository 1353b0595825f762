"""Carrying the state of another AdaBelief over."""

from typing import Any

import jax
import optax

from trainer.optim.fused import ScaleByBeliefState
from trainer.rules import path_of


def from_optax(state: optax.OptState, like: ScaleByBeliefState | None = None) -> ScaleByBeliefState:
    """The state of this project's `adabelief` that goes on where one of `optax.adabelief` stands.

    Both keep the same three things: the count of updates, m, and s with every eps_root in it. What else an Optax state
    has, such as the counts of its schedules, is the same number again.

    Args:
      state: of `optax.adabelief` or `optax.scale_by_belief`, alone or anywhere inside of chains and wrappers.
      like: the result of `init`, in whose dtypes the moments are wanted; None to keep those of Optax.

    Raises:
      ValueError: there is no AdaBelief state in `state`, or more than one; or its arrays are not those of `like`. An
        Adam state has another second moment, which nothing can be made of: start anew, with a warm-up.
    """
    nodes = jax.tree.leaves(state, is_leaf=_is_belief)
    found: list[Any] = [node for node in nodes if _is_belief(node)]
    if len(found) != 1:
        raise ValueError(f"there are {len(found)} states of optax.scale_by_belief in this state; one is expected")
    ours = ScaleByBeliefState(found[0].count, found[0].mu, found[0].nu)
    if like is None:
        return ours
    if not isinstance(like, ScaleByBeliefState):
        raise ValueError(f"`like` is a {type(like).__name__}; what the init of `adabelief` returns is expected")
    if like.nu_max is not None:
        raise ValueError("amsgrad needs the largest second moment, which an Optax state does not have")
    if jax.tree.structure(ours) != jax.tree.structure(like):
        raise ValueError("the state has other parameters than `like`")

    def cast(keys: Any, old: Any, new: Any) -> Any:
        if old.shape != new.shape:
            raise ValueError(f"{path_of(keys)} has shape {old.shape}; {new.shape} is expected")
        return old.astype(new.dtype)

    return jax.tree_util.tree_map_with_path(cast, ours, like)


def _is_belief(node: Any) -> bool:
    return isinstance(node, optax.ScaleByBeliefState)

"""From the state of Optax's AdaBelief to that of ours."""

from typing import Any

import jax
import optax

from trainer.optim.fused import ScaleByBeliefState
from trainer.rules import path_of


def from_optax(state: optax.OptState, like: ScaleByBeliefState | None = None) -> ScaleByBeliefState:
    """The state with which `adabelief` continues a run of `optax.adabelief`: the same count, mu and nu.

    Args:
      state: of `optax.adabelief` or `optax.scale_by_belief`, alone or anywhere inside of chains and wrappers.
      like: the result of `init`, whose dtypes the moments get; None to keep those of Optax.

    Raises:
      ValueError: `state` does not hold exactly one `optax.ScaleByBeliefState`, or its shapes differ from `like`'s.
    """
    theirs: Any = optax.ScaleByBeliefState
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, theirs))
    found = [node for node in nodes if isinstance(node, theirs)]
    if len(found) != 1:
        raise ValueError(f"there are {len(found)} states of optax.scale_by_belief in this state; one is expected")
    ours = ScaleByBeliefState(found[0].count, found[0].mu, found[0].nu)
    if like is None:
        return ours
    if not isinstance(like, ScaleByBeliefState):
        raise ValueError(f"`like` is a {type(like).__name__}; the result of the init of `adabelief` is expected")
    if like.nu_max is not None:
        raise ValueError("amsgrad needs the largest second moment, which an Optax state does not have")
    if jax.tree.structure(ours) != jax.tree.structure(like):
        raise ValueError("the state has other parameters than `like`")

    def cast(keys: Any, old: Any, new: Any) -> Any:
        if old.shape != new.shape:
            raise ValueError(f"{path_of(keys)} has shape {old.shape}; {new.shape} is expected")
        return old.astype(new.dtype)

    return jax.tree_util.tree_map_with_path(cast, ours, like)

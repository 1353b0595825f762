"""The decay check: do parameters decay as their labels say in one step with zero gradients?"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.observe import table
from trainer.optim.fused import ParamGroup
from trainer.optim.transforms import TransformGroup, move_without_gradient, set_count
from trainer.rules import paths


@dataclasses.dataclass(frozen=True)
class DecayResult:
    """The result for one label."""

    label: str
    step: int  # the step that was made, counted from 1
    factor: float | None  # by which it must multiply the parameters; None for coupled decay, which has no factor
    arrays: int  # number of parameter arrays
    wrong: tuple[str, ...]  # paths of the arrays that were not multiplied by `factor`
    lost: bool = False  # nothing moved at all: the decay of a step is too small for the dtype of the parameters
    moves: bool = False  # the Optax transformation moves parameters without gradients, perhaps by a decay of its own

    @property
    def holds(self) -> bool:
        """Whether the step multiplied the parameters by `factor`, if that is known, and `factor` is above 0."""
        return not self.wrong and not self.lost and (self.factor is None or self.factor > 0)

    def __str__(self) -> str:
        """The result in words."""
        if self.wrong:
            return f"WRONG: {', '.join(self.wrong)}"
        if self.lost:
            return "LOST: too small a step for the dtype of the parameters, nothing moves"
        if self.factor is None:
            return "not checked: coupled decay goes through the moments"
        if self.factor <= 0:
            return "WRONG: this is no decay"
        text = "as stated" if self.factor != 1 else "untouched, as stated"
        return f"{text}, beside a move that the optimizer makes without gradients" if self.moves else text


def check_decay(
    params: Any,
    labels: Sequence[str],
    groups: Mapping[str, ParamGroup | TransformGroup | None],
    optimizer: optax.GradientTransformation,
    total_steps: int,
) -> list[DecayResult]:
    """For every label, makes a step with zero gradients and fresh moments, and compares parameters before and after.

    The step must multiply them by 1 − learning rate · weight decay, to the last place of their dtype. With "corrected"
    decay, the subtracted share is additionally multiplied by learning rate / peak; with "fixed" decay, the factor is
    1 − weight decay; "coupled" decay is not checked. The step must keep every bit of parameters without decay and of
    frozen ones. The check uses the step in which the label decays most, or without decay that of the highest learning
    rate (of up to 10,000 steps, evenly spaced over the run), since the first step of a warm-up has neither.
    A parameter that is 0 is replaced by 1, since no decay would change it. The move that an Optax transformation makes
    without gradients is allowed for, and reported.

    Args:
      params: the parameters at the start of the run.
      labels: the label of each leaf of `params`, in order.
      groups: the parameter group of each label; None for a frozen label.
      optimizer: the optimizer to check.
      total_steps: length of the run.
    """
    params = jax.tree.map(lambda p: jnp.where(p == 0, jnp.ones_like(p), p), params)
    fresh: Any = jax.jit(optimizer.init)(params)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def after(count: jax.Array) -> Any:
        updates, _ = optimizer.update(zeros, set_count(fresh, groups, count), params)
        return optax.apply_updates(params, updates)

    results = []
    for label, group in groups.items():
        count, shrink = _steepest(group, total_steps)
        new_params = jax.tree.leaves(after(jnp.asarray(count, jnp.int32)))
        rows = zip(paths(params), labels, jax.tree.leaves(params), new_params, strict=True)
        own = [(path, np.asarray(old), np.asarray(new)) for path, other, old, new in rows if other == label]
        moves: list[Any] = [0.0] * len(own)
        if isinstance(group, TransformGroup):
            updates = move_without_gradient(label, group, list(labels), params, jnp.asarray(count, jnp.int32))
            moves = [np.asarray(u, np.float64) for u in updates if u is not None]
        if shrink and group is not None and group.decay == "coupled":
            results.append(DecayResult(label, count + 1, None, len(own), ()))
            continue
        pairs = zip(own, moves, strict=True)
        wrong = tuple(path for (path, old, new), move in pairs if not _shrunk(old, new, shrink, move))
        may_stay = isinstance(group, ParamGroup) and group.rounds_randomly
        lost = shrink > 0 and not may_stay and all(old.tobytes() == new.tobytes() for _, old, new in own)
        pairs = zip(own, moves, strict=True)
        is_moved = any(
            np.any(np.abs(move) > 4 * np.spacing(np.abs(old)).astype(np.float64)) for (_, old, _), move in pairs
        )
        results.append(DecayResult(label, count + 1, 1 - shrink, len(own), wrong, lost, is_moved))
    return results


def decay_table(results: Sequence[DecayResult]) -> str:
    """A row for each label."""
    factors = ["-" if r.factor is None else f"{r.factor:.9g}" for r in results]
    cells = [(r.label, f"{r.arrays:,}", f"{r.step:,}", f, str(r)) for r, f in zip(results, factors, strict=True)]
    return table(("label", "arrays", "step", "factor", "result"), cells, right=("arrays", "step"))


def _steepest(group: ParamGroup | TransformGroup | None, total_steps: int) -> tuple[int, float]:
    """The count of updates before the step that the check makes, and the share of its parameters that a group loses.

    Of at most 10,000 steps, evenly spaced over the run.
    """
    if group is None:
        return 0, 0.0
    decay = group.weight_decay if callable(group.weight_decay) else optax.constant_schedule(group.weight_decay or 0.0)
    updates = -(-total_steps // group.every)
    counts = np.unique(np.linspace(0, updates - 1, min(updates, 10_000)).astype(int)) * group.every
    decays = np.broadcast_to(jax.vmap(lambda count: jnp.asarray(decay(count), float))(counts), counts.shape)
    rates = np.asarray(jax.vmap(lambda count: jnp.asarray(group.learning_rate(count), float))(counts), np.float64)
    if group.decay in ("decoupled", "corrected"):
        decays = decays * rates * (rates / group.peak_rate if group.decay == "corrected" else 1)
    steepest = int(np.argmax(decays if np.any(decays) else rates))
    return int(counts[steepest]), float(decays[steepest])


def _shrunk(old: np.ndarray, new: np.ndarray, shrink: float, move: Any) -> bool:
    """Whether `new` is `old` times 1 − shrink, plus `move`, to the last place."""
    if shrink == 0 and not np.any(move):
        return old.tobytes() == new.tobytes()
    expected = old.astype(np.float64) * (1 - shrink) + move
    # Rounding errs by half an ulp. The arithmetic of the share that is subtracted errs by another half.
    return bool(np.all(np.abs(new.astype(np.float64) - expected) <= np.abs(np.spacing(np.abs(old)).astype(np.float64))))

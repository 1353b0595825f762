"""The decay probe: what one step does to every parameter when gradients are zero, against what the labels say."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.observe import table
from trainer.program import Program
from trainer.rules import paths


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the probe found of one label.

    Attributes:
      label: the label.
      step: the step that was made, the first being 1.
      factor: by which its parameters must be multiplied in that step; None for coupled decay, which goes through the
        moments and has none.
      parameters: how many arrays were looked at.
      wrong: the paths of those that came out otherwise.
      lost: whether nothing moved at all, because the decay of a step is too small for the dtype of the parameters.
    """

    label: str
    step: int
    factor: float | None
    parameters: int
    wrong: tuple[str, ...]
    lost: bool = False

    @property
    def holds(self) -> bool:
        """Whether the parameters do what the label says, and that is a decay."""
        return not self.wrong and not self.lost and (self.factor is None or self.factor > 0)


def probe(program: Program) -> list[Verdict]:
    """Makes a step with zero gradients and fresh moments for every label, and compares its parameters before and after.

    They must have been multiplied by 1 − learning rate · decay, to the last place of their dtype; parameters without
    decay, and those that are frozen, must be the same bit for bit. The step is the one in which the label decays most,
    since under a warm-up it does not in the first. The parameters are those of the run at its start, with 1 in place of
    0, which no decay would change.
    """
    start = program.init()
    params = jax.tree.map(lambda p: jnp.where(p == 0, jnp.ones_like(p), p), start.params)
    fresh: Any = jax.jit(program.optimizer.init)(params)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def after(count: jax.Array) -> Any:
        updates, _ = program.optimizer.update(zeros, fresh._replace(count=count), params)
        return optax.apply_updates(params, updates)

    names, labels = paths(params), [param.label for param in program.params.rows]
    verdicts = []
    for label in program.run.optimizer.groups:
        count, shrink = _steepest(program, label)
        found = jax.tree.leaves(after(jnp.asarray(count, jnp.int32)))
        rows = zip(names, labels, jax.tree.leaves(params), found, strict=True)
        mine = [(name, np.asarray(old), np.asarray(new)) for name, of, old, new in rows if of == label]
        wrong = tuple(name for name, old, new in mine if not _as_stated(old, new, shrink))
        if shrink and program.run.optimizer.decay == "coupled":
            verdicts.append(Verdict(label, count + 1, None, len(mine), ()))
        else:
            lost = shrink > 0 and all(old.tobytes() == new.tobytes() for _, old, new in mine)
            verdicts.append(Verdict(label, count + 1, 1 - shrink, len(mine), wrong, lost))
    return verdicts


def probe_text(verdicts: Sequence[Verdict]) -> str:
    """What the decay probe found, a line for each label."""
    cells = []
    for verdict in verdicts:
        if verdict.factor is None:
            factor, text = "-", "not probed: coupled decay goes through the moments"
        else:
            factor = f"{verdict.factor:.9g}"
            text = "as stated" if verdict.factor != 1 else "untouched, as stated"
        if verdict.factor is not None and verdict.factor <= 0:
            text = "WRONG: this is no decay"
        if verdict.lost:
            text = "LOST: too small a step for the dtype of the parameters, nothing moves"
        if verdict.wrong:
            text = f"WRONG: {', '.join(verdict.wrong)}"
        cells.append((verdict.label, f"{verdict.parameters:,}", f"{verdict.step:,}", factor, text))
    return table(("label", "arrays", "step", "factor", "verdict"), cells, right=("arrays", "step"))


def _steepest(program: Program, label: str) -> tuple[int, float]:
    """The count of updates before the step in which the parameters of a label shrink most, and the share they lose."""
    optimizer, group = program.run.optimizer, program.groups[label]
    if group.frozen:
        return 0, 0.0
    decay = group.weight_decay or 0.0
    if not callable(decay):
        decay = optax.constant_schedule(decay)
    updates = -(-program.run.total_steps // group.every)
    counts = np.unique(np.linspace(0, updates - 1, min(updates, 10_000)).astype(int)) * group.every
    decays = np.broadcast_to(jax.vmap(lambda count: jnp.asarray(decay(count), float))(counts), counts.shape)
    if optimizer.decay == "decoupled":
        decays = decays * np.asarray(jax.vmap(group.learning_rate)(counts), np.float64)
    steepest = int(np.argmax(decays))
    return int(counts[steepest]), float(decays[steepest])


def _as_stated(old: np.ndarray, new: np.ndarray, shrink: float) -> bool:
    if shrink == 0:
        return old.tobytes() == new.tobytes()
    expected = old.astype(np.float64) * (1 - shrink)
    # Half a place from rounding, and as much again from the arithmetic of the share that is subtracted.
    return bool(np.all(np.abs(new.astype(np.float64) - expected) <= np.abs(np.spacing(np.abs(old)).astype(np.float64))))

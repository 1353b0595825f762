"""From a config and labels to one gradient transformation."""

from typing import Any

import jax
import optax

from trainer import config
from trainer.optim.fused import fused
from trainer.optim.scalings import Adam, Belief, Momentum, Scaling
from trainer.optim.schedules import Length, build_schedule
from trainer.optim.treatment import Treatment


def build_optimizer(
    optimizer: config.Optimizer, treatments: Any, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """One transformation for all groups.

    Args:
      optimizer: resolved settings.
      treatments: from `build_treatments`.
      seed: of the stochastic rounding of bfloat16 moments.
    """
    return fused(treatments, amsgrad=optimizer.amsgrad, clip_norm=optimizer.clip_norm or None, seed=seed)


def build_treatments(optimizer: config.Optimizer, labels: Any, length: Length) -> Any:
    """What happens to each parameter: a tree like `labels`, with one `Treatment` for each label.

    Args:
      optimizer: resolved settings.
      labels: a tree like the parameters, with a label for each leaf.
      length: that of the run, which schedules are measured by.
    """
    base = build_schedule(optimizer.schedule, length)
    found = {label: _treatment(optimizer, label, base, length) for label in optimizer.groups}
    return jax.tree.map(found.__getitem__, labels)


def group_schedule(optimizer: config.Optimizer, label: str, base: optax.Schedule, length: Length) -> optax.Schedule:
    """The learning rate of a group, where `base` is that of the run."""
    group = optimizer.groups[label]
    schedule = base
    if group.schedule is not None:
        schedule = build_schedule(group.schedule, length, f"optimizer.groups.{label}.schedule")
    return schedule if group.lr_multiplier == 1 else lambda count: group.lr_multiplier * schedule(count)


def _treatment(optimizer: config.Optimizer, label: str, base: optax.Schedule, length: Length) -> Treatment:
    group = optimizer.groups[label]
    decay: Any = group.weight_decay
    if group.decay_schedule is not None:
        decay = build_schedule(group.decay_schedule, length, f"optimizer.groups.{label}.decay_schedule")
    return Treatment(
        _scaling(optimizer, group.optimizer or optimizer.name),
        group_schedule(optimizer, label, base, length),
        # None, not 0: what is multiplied by 0 can turn an infinity into NaN, and −0 into 0.
        decay or None,
        optimizer.decay,
        group.frozen,
        group.clip_norm or None,
        group.every_steps,
        group.mu_dtype or optimizer.mu_dtype or None,
        group.nu_dtype or optimizer.nu_dtype or None,
    )


def _scaling(optimizer: config.Optimizer, name: str) -> Scaling:
    o = optimizer
    if name == "adam":
        return Adam(o.b1, o.b2, o.eps, o.eps_root, o.nesterov)
    if name == "sgd":
        return Momentum(o.b1, o.nesterov)
    return Belief(o.b1, o.b2, o.eps, o.eps_root, o.nesterov, o.rectify, o.sgd_fallback)

"""The optimizer of a run: parameter groups from settings and labels, in one transformation."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from trainer import config
from trainer.optim.fused import fused
from trainer.optim.schedules import Length, build_schedule
from trainer.optim.statistics import Statistics
from trainer.optim.statistics import build_statistics as _statistics
from trainer.optim.treatment import ParamGroup
from trainer.optim.treatment import norm as global_norm
from trainer.optim.update_rules import Adam, Belief, Momentum, Scaling

__all__ = ["Statistics", "build_groups", "build_optimizer", "build_schedules", "build_statistics", "global_norm"]


def build_schedules(run: config.Run, examples: int) -> dict[str, optax.Schedule]:
    """Every schedule of a resolved run as a function of the updates already made, by its path in the run."""
    length = Length(run.total_steps, run.batch_size, examples)
    found = {"optimizer.schedule": run.optimizer.schedule}
    for label, group in run.optimizer.groups.items():
        for name in ("schedule", "decay_schedule"):
            if getattr(group, name) is not None:
                found[f"optimizer.groups.{label}.{name}"] = getattr(group, name)
    return {path: build_schedule(schedule, length, path) for path, schedule in found.items()}


def build_groups(optimizer: config.Optimizer, schedules: Mapping[str, optax.Schedule]) -> dict[str, ParamGroup]:
    """The parameter group of each label."""
    return {label: _group(optimizer, label, schedules) for label in optimizer.groups}


def build_optimizer(
    optimizer: config.Optimizer, groups: Mapping[str, ParamGroup], labels: Any, seed: int
) -> optax.GradientTransformationExtraArgs:
    """One transformation for all groups; `labels` is a tree like the parameters."""
    tree = jax.tree.map(groups.__getitem__, labels)
    return fused(tree, amsgrad=optimizer.amsgrad, clip_norm=optimizer.clip_norm or None, seed=seed)


def build_statistics(groups: Mapping[str, ParamGroup], labels: Any, clip_norm: float | None) -> Statistics:
    """Per-label statistics of an update."""
    return _statistics(jax.tree.map(groups.__getitem__, labels), labels, clip_norm)


def _group(optimizer: config.Optimizer, label: str, schedules: Mapping[str, optax.Schedule]) -> ParamGroup:
    group = optimizer.groups[label]
    path = f"optimizer.groups.{label}"
    schedule = schedules.get(f"{path}.schedule", schedules["optimizer.schedule"])
    rate = schedule if group.lr_multiplier == 1 else lambda count: group.lr_multiplier * schedule(count)
    return ParamGroup(
        _scaling(optimizer, group.optimizer or optimizer.name),
        rate,
        # None, not 0: what is multiplied by 0 can turn an infinity into NaN, and −0 into 0.
        schedules.get(f"{path}.decay_schedule", group.weight_decay) or None,
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

"""The optimizer of a run: schedules, parameter groups, and one transformation for all of them."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from trainer import config
from trainer.optim import fused
from trainer.optim.adabelief import Belief
from trainer.optim.named import find_transform
from trainer.optim.precision import divide, global_norm
from trainer.optim.schedule_free import evaluation_params
from trainer.optim.schedules import build_schedule
from trainer.optim.statistics import Statistics, build_statistics, statistics_if
from trainer.optim.transforms import Groups, TransformGroup, mixed, split_groups
from trainer.optim.update_rules import Adam, Momentum

__all__ = ["Groups", "Statistics", "build_groups", "build_optimizer", "build_schedules", "build_statistics"]
__all__ += ["divide", "evaluation_params", "global_norm", "statistics_if"]


def build_schedules(run: config.Run, examples: int) -> dict[str, optax.Schedule]:
    """Every schedule of a resolved run as a function of the number of updates already made, by its path in the run."""
    schedules = config.schedules_of(run.optimizer).items()
    return {path: build_schedule(config.schedule_in_steps(s, path, run, examples)) for path, s in schedules}


def build_groups(optimizer: config.Optimizer, schedules: Mapping[str, optax.Schedule]) -> Groups:
    """The parameter group of each label; None for a label that is frozen."""
    return {label: _group(optimizer, label, schedules) for label in optimizer.groups}


def _group(
    optimizer: config.Optimizer, label: str, schedules: Mapping[str, optax.Schedule]
) -> fused.ParamGroup | TransformGroup | None:
    o, group, path = optimizer, optimizer.groups[label], f"optimizer.groups.{label}"
    if group.frozen:
        return None
    schedule = schedules.get(f"{path}.schedule", schedules["optimizer.schedule"])
    rate = schedule if group.lr_multiplier == 1 else lambda count: group.lr_multiplier * schedule(count)
    peak = group.lr_multiplier * (group.schedule or o.schedule).peak
    # None for 0: 0 times a parameter that is infinite would be NaN, and −0 would become 0.
    weight_decay = schedules.get(f"{path}.decay_schedule", group.weight_decay) or None
    if o.decay == "corrected" and peak == 0:  # nothing moves, and learning rate / peak would be 0/0
        weight_decay = None
    if isinstance(weight_decay, int | float):  # an array, which `fused.value_at` hides from XLA
        weight_decay = jnp.asarray(weight_decay, float)
    name = group.optimizer or o.name
    if name not in config.FUSED_OPTIMIZERS:
        options = o.options if group.optimizer is None else group.options
        # The Optax transformation counts updates of its group; our schedules count updates of the run.
        used = group.schedule or o.schedule
        constant = peak if used.name == "constant" and not used.warmup else None
        transform = find_transform(name, options, lambda count: rate(count * group.every_steps), constant)
        return TransformGroup(transform, rate, weight_decay, o.decay, group.clip_norm, group.every_steps, peak)
    rules = {
        "adabelief": Belief(o.b1, o.b2, o.eps, o.eps_root, o.nesterov, o.rectify, o.sgd_fallback),
        "adam": Adam(o.b1, o.b2, o.eps, o.eps_root, o.nesterov),
        "sgd": Momentum(o.b1, o.nesterov),
    }
    return fused.ParamGroup(
        rules[name],
        rate,
        weight_decay,
        o.decay,
        group.clip_norm,
        group.every_steps,
        group.mu_dtype or o.mu_dtype,
        group.nu_dtype or o.nu_dtype,
        peak_rate=peak,
        cautious=o.cautious,
        rounds_randomly=o.param_rounding == "stochastic",
    )


def build_optimizer(
    optimizer: config.Optimizer, groups: Groups, labels: Any, seed: int
) -> optax.GradientTransformationExtraArgs:
    """One transformation for all groups; `labels` is a tree like the parameters."""
    own, others = split_groups(groups)
    if others:
        return mixed(own, others, labels, amsgrad=optimizer.amsgrad, clip_norm=optimizer.clip_norm, seed=seed)
    return fused.fused_groups(own, labels, amsgrad=optimizer.amsgrad, clip_norm=optimizer.clip_norm, seed=seed)

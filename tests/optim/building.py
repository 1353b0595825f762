"""The optimizer and the statistics of some settings, as a run builds them."""

from typing import Any

import optax

from tests.tasks import make_run
from trainer import config
from trainer.optim import Statistics, build_groups, build_optimizer, build_schedules, build_statistics


def build(optimizer: config.Optimizer, labels: Any) -> tuple[optax.GradientTransformationExtraArgs, Statistics]:
    """The optimizer and the statistics of a run of ten steps."""
    groups = build_groups(optimizer, build_schedules(make_run(10, optimizer=optimizer), examples=10))
    statistics = build_statistics(groups, labels, optimizer.clip_norm)
    return build_optimizer(optimizer, groups, labels, seed=0), statistics

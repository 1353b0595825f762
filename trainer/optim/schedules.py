"""Learning rates as functions of the updates already made, built from `optax.schedules`."""

import optax

from trainer import config


def build_schedule(schedule: config.Schedule) -> optax.Schedule:
    """The schedule that a resolved config describes (`trainer.config.resolve` fills in `decay_steps`)."""
    descent = schedule.decay_steps - schedule.warmup_steps
    if schedule.name == "constant":
        after = optax.constant_schedule(schedule.peak)
    elif schedule.name == "linear":
        after = optax.linear_schedule(schedule.peak, schedule.final, descent)
    else:
        after = optax.cosine_decay_schedule(schedule.peak, descent, schedule.final / schedule.peak)
    if not schedule.warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, schedule.peak, schedule.warmup_steps), after], [schedule.warmup_steps]
    )

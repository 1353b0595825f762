"""From a config and labels to one gradient transformation."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from trainer import config
from trainer.optim.adabelief import scale_by_belief
from trainer.optim.schedules import build_schedule

_SCALINGS: dict[str, Callable[[config.Optimizer], optax.GradientTransformation]] = {
    "adabelief": lambda o: scale_by_belief(o.b1, o.b2, o.eps, o.eps_root),
    "adam": lambda o: optax.scale_by_adam(o.b1, o.b2, o.eps, o.eps_root),
    "sgd": lambda o: optax.trace(decay=o.b1),
}


def build_optimizer(optimizer: config.Optimizer, labels: Any) -> optax.GradientTransformation:
    """Scaling, then decay by label, then the learning rate; the parts are named in the state.

    Args:
      optimizer: resolved settings.
      labels: a tree like the parameters, with a label for each leaf.
    """
    return optax.named_chain(
        ("scaling", _SCALINGS[optimizer.name](optimizer)),
        ("decay", decay_by_label(optimizer, labels)),
        ("learning_rate", optax.scale_by_learning_rate(build_schedule(optimizer.schedule))),
    )


def decay_by_label(optimizer: config.Optimizer, labels: Any) -> optax.GradientTransformation:
    """Adds weight_decay · parameter to each update, by its label. Stateless: relabelling keeps checkpoints valid."""
    decays = jax.tree.map(lambda label: optimizer.groups[label].weight_decay, labels)

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        # A leaf without decay is left alone and not multiplied by zero, which would turn an infinity into NaN.
        return jax.tree.map(lambda u, p, decay: u + decay * p if decay else u, updates, params, decays)

    return optax.stateless(update)

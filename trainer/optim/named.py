"""Optax's optimizers by name, with checked options, and those of the user."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from trainer import config
from trainer.errors import UserError, did_you_mean

# Weight decay arguments of Optax functions. They are switched off, because `_update` applies `Group.weight_decay`.
_DECAYS = ("weight_decay", "weight_decay_rate", "adam_weight_decay")
_RATES = ("learning_rate", "warmup_steps")  # the latter works with a constant rate only
_CONSTANT_RATE_ONLY = ("optax.rprop", "optax.sm3")  # take no schedule
# These need the loss or a function of it in every update, or a key; the last is deprecated.
_LEFT_OUT = ("optax.lbfgs", "optax.contrib.momo", "optax.contrib.momo_adam", "optax.contrib.sophia")
_LEFT_OUT += ("optax.noisy_sgd", "optax.optimistic_adam")


def find_transform(
    name: str | config.Transform, options: Mapping[str, Any], learning_rate: Callable, constant: float | None
) -> optax.GradientTransformation:
    """The transformation of a name such as "optax.lion", or of the user's own dataclass.

    Args:
      name: of a function of `optax` or `optax.contrib` that takes a learning rate, or the dataclass.
      options: its other arguments.
      learning_rate: a function of the updates made before.
      constant: the learning rate if it never changes, for the few functions that take a number only.

    Raises `UserError` for a name that Optax does not have and for an option that it does not take, with the nearest.
    """
    if not isinstance(name, str):
        return name.transform(learning_rate)
    if name in _LEFT_OUT:
        raise UserError(f"optimizer {name!r} is left out: it needs more than gradients in an update, or is deprecated")
    if name not in (known := _names()):
        same = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]  # in another module
        nearest = did_you_mean(name, (*config.FUSED_OPTIMIZERS, *known)) if not same else f"; did you mean {same[0]!r}?"
        raise UserError(f"optimizer {name!r} is not known{nearest}")
    module, _, function = name.rpartition(".")
    make = getattr(importlib.import_module(module), function)
    arguments = inspect.signature(make).parameters
    # Masks of the decay are switched off with it: labels say what decays.
    own = [key for key in arguments if key not in (*_RATES, "mask", "weight_decay_mask", *_DECAYS)]
    for option in options:
        if option in arguments and option not in own:
            instead = "schedule" if option in _RATES else "groups.LABEL.weight_decay"
            raise UserError(f"option {option!r} of {name} has a setting of its own: optimizer.{instead}")
        if option not in own:
            raise UserError(f"{name} has no option {option!r}{did_you_mean(option, own)}")
    if name in _CONSTANT_RATE_ONLY and constant is None:
        reason = "its schedule (optimizer.schedule, or the group's) is not constant"
        raise UserError(f"{name} takes a constant learning rate only; {reason}")
    off = {key: None if arguments[key].default is None else 0.0 for key in _DECAYS if key in arguments}
    try:
        return make(learning_rate=constant if name in _CONSTANT_RATE_ONLY else learning_rate, **off, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} does not take its options {dict(options)}: {error}") from error


def _names() -> list[str]:
    """The functions of Optax that make an optimizer from a learning rate."""
    found = []
    for module in (optax, optax.contrib):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith(("_", "scale_by_")):
                arguments = inspect.signature(value).parameters.values()
                needed = {argument.name for argument in arguments if argument.default is argument.empty}
                if "learning_rate" in {argument.name for argument in arguments} and needed <= {"learning_rate"}:
                    found.append(f"{module.__name__}.{name}")
    return [name for name in found if name not in _LEFT_OUT]
